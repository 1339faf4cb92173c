"""The lens and the attributions of every family, against the model's own logits and hand calculation."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.opened import EACH_STRUCTURE
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.analysis import lens
from hookmap.analysis.attribution import BIAS, ROUNDING
from hookmap.analysis.lens import figures_of
from hookmap.analysis.unembedding import unembedding_of
from hookmap.model import HookedModel

TOKENS = [5, 9, 3, 4, 20, 11]


def opened(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> HookedModel:
    """The family with weights of its norms and biases drawn too: as they begin, ones and zeros, they hide mistakes."""
    model = plain_hooks.build(name, dtype)
    torch.manual_seed(3)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.ndim == 1 and not path.endswith(("A_log", ".D", "dt_bias", "e_score_correction_bias")):
                weight.add_(0.3 * torch.randn_like(weight))
    return hookmap.open(model, **options)


def logits_of(hm: HookedModel, tokens: list[int]) -> torch.Tensor:
    """Hugging Face's own, [pos, d_vocab]."""
    with torch.no_grad():
        found: torch.Tensor = hm.model(input_ids=torch.tensor([tokens])).logits[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_the_lens_at_the_last_layer_is_the_models_own_logits_to_the_bit(name: str) -> None:
    hm = opened(name)
    run = hm.capture([TOKENS], ["resid_post"], -1, max_new_tokens=0)
    found = unembedding_of(hm)(run.read(0, "resid_post", -1)[None])[0]
    assert torch.equal(found, logits_of(hm, TOKENS))


@pytest.mark.parametrize("name", [p for p in EACH_STRUCTURE if p.values != ("bert",)])  # its stream is normed itself
def test_the_parts_of_an_attribution_sum_to_the_logit(name: str) -> None:
    hm = opened(name)
    logits = logits_of(hm, TOKENS)
    if name == "gemma2":
        logits = 30 * torch.atanh(logits.double() / 30).float()  # before the soft-cap
    single = hm.attribute(TOKENS, target=13, positions="all")
    difference = hm.attribute(TOKENS, target=13, against=8)
    assert single.before_soft_cap == (name == "gemma2")
    assert torch.allclose(single.values.sum(0), logits[:, 13], atol=1e-4)
    assert torch.allclose(difference.values.sum(0), logits[-1:, 13] - logits[-1:, 8], atol=1e-4)
    assert difference.values.abs().max() > 0.01
    assert single.parts[0] == "resid_pre[0]" and single.parts[-1] == BIAS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "mamba", "cohere", "gpt2"])
def test_in_half_precision_the_sum_holds_to_the_precision_of_the_model(name: str) -> None:
    hm = opened(name, torch.bfloat16)
    found = hm.attribute(TOKENS, positions="all", heads=name == "gpt2")
    assert (found.values.sum(0) - found.logit).abs().max() < 0.05 * found.logit.abs().max()


def test_an_attribution_of_a_gpt2_is_what_is_calculated_by_hand() -> None:
    hm = opened("gpt2")
    found = hm.attribute(TOKENS, target=13, against=8)
    seen: list[torch.Tensor] = []
    gpt = hm.model.transformer
    hook = gpt.h[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output[0, -1]))
    end = gpt.ln_f.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1]))
    logits_of(hm, TOKENS)
    hook.remove(), end.remove()
    branch, stream = seen
    statistic = (stream.var(unbiased=False) + gpt.ln_f.eps).sqrt()
    direction = hm.model.lm_head.weight[13] - hm.model.lm_head.weight[8]
    by_hand = ((branch - branch.mean()) / statistic * gpt.ln_f.weight) @ direction
    bias = gpt.ln_f.bias @ direction
    assert torch.allclose(found.values[found.parts.index("mlp_out[1]"), 0], by_hand, atol=1e-5)
    assert torch.allclose(found.values[found.parts.index(BIAS), 0], bias, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "granite", "gptj", "falcon_7b"])
def test_heads_and_bias_are_what_the_mixer_adds(name: str) -> None:
    hm = opened(name)
    whole, split = hm.attribute(TOKENS, target=13), hm.attribute(TOKENS, target=13, heads=True)
    for layer in range(plain_hooks.LAYERS):
        own = [n for n, part in enumerate(split.parts) if part.startswith(f"mixer_out[{layer}]")]
        assert len(own) == 4 + (name == "gpt2"), split.parts  # four heads, and a bias where there is one
        assert torch.allclose(
            split.values[own].sum(0), whole.values[whole.parts.index(f"mixer_out[{layer}]")], atol=1e-4
        )


def test_heads_are_refused_where_a_norm_stands_behind_them() -> None:
    with raises(hookmap.SelectionError, "heads of layer 0", "more than a constant"):
        opened("gemma2").attribute(TOKENS, heads=True)


def test_the_figures_of_the_lens_are_those_of_its_distribution() -> None:
    hm = opened("llama")
    found = hm.lens(TOKENS, layers=[0, 2], top=3, target=13)
    run = hm.capture([TOKENS], ["resid_post"], max_new_tokens=0)
    own = hm.model.lm_head(hm.model.model.norm(run.read(0, "resid_post", 0))).softmax(-1).detach()
    final = logits_of(hm, TOKENS).softmax(-1)
    assert (found.layers, found.positions) == ((0, 2), tuple(range(6)))
    assert torch.equal(found.top_ids[0], own.topk(3).indices)
    assert torch.allclose(found.top_probabilities[0], own.topk(3).values, atol=1e-6)
    assert torch.allclose(found.probability[0], own[:, 13], atol=1e-6)
    assert found.rank[0].tolist() == [sorted(row.tolist(), reverse=True).index(row[13]) + 1 for row in own]
    assert torch.allclose(found.entropy[0], -(own * own.log()).sum(-1), atol=1e-4)
    assert torch.allclose(found.kl[0], (final * (final / own).log()).sum(-1), atol=1e-4)
    assert torch.allclose(found.kl[1], torch.zeros(6), atol=1e-5)
    assert found.grid("kl").values.shape == (2, 6)


def test_long_texts_go_through_the_unembedding_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    hm = opened("gemma2")
    whole = hm.lens(TOKENS)
    monkeypatch.setattr(lens, "CHUNK", 4)
    pieces = hm.lens(TOKENS)
    assert torch.equal(whole.top_ids, pieces.top_ids) and torch.allclose(whole.kl, pieces.kl, atol=1e-6)


def test_a_stored_capture_gives_the_lens_that_a_prompt_gives(tmp_path: Path) -> None:
    hm = opened("gpt2", tokenizer=tiny_tokenizer())
    texts = ["to be or not", "that is the question to be"]
    hm.capture(texts, ["resid_mid", "resid_post"], max_new_tokens=0, positions=[1, -1], store=tmp_path / "run")
    stored = hm.lens(hookmap.open_store(tmp_path / "run"), "resid_mid", sample=1)
    direct = hm.lens(texts[1], "resid_mid", positions=[1, -1])
    assert stored.positions == direct.positions == (1, 5)
    assert stored.tokens == ("is", "be") and stored.target_tokens == direct.target_tokens
    assert torch.equal(stored.top_ids, direct.top_ids) and torch.allclose(stored.kl, direct.kl, atol=1e-5)


def test_a_target_is_one_token(tmp_path: Path) -> None:
    hm = opened("gpt2", tokenizer=tiny_tokenizer())
    assert hm.lens("to be", target="question").target_tokens == ("question",) * 2
    for wrong, why in (("to be", "is 2 tokens"), (97, "from 0 to 96")):
        with pytest.raises(hookmap.SelectionError, match=why):
            hm.lens("to be", target=wrong)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"point": "mlp_in"}, "not in the space of the residual stream"),
        ({"point": "resid_pots"}, "did you mean resid_post"),
        ({"layers": 7}, "out of range"),
        ({"source": [[1, 2], [3, 4]]}, "a lens is of one prompt, got 2"),
    ],
)
def test_what_has_no_lens_is_refused_with_the_reason(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(hookmap.SelectionError, match=why):
        opened("llama").lens(**{"source": TOKENS, **arguments})


@pytest.mark.parametrize(
    ("held", "arguments", "why"),
    [
        ({"layers": [0, 2]}, {"layers": [1, 2]}, r"holds no resid_post of layers \[1\]: it holds \[0, 2\]"),
        ({"layers": [0]}, {"point": "resid_mid"}, "holds no resid_mid of layers any"),
        ({"layers": [0, 2]}, {"sample": 3}, "no sample 3: it has 1"),
        ({"mean": True}, {}, "sample 0 is a mean over positions"),
        ({"layers": [0]}, {}, "name a target, or capture it too"),
    ],
)
def test_a_capture_that_does_not_hold_what_a_lens_reads_is_refused(
    held: dict[str, Any], arguments: dict[str, Any], why: str
) -> None:
    hm = opened("llama")
    run = hm.capture([TOKENS], ["resid_post"], max_new_tokens=0, **held)
    with pytest.raises(hookmap.SelectionError, match=why):
        hm.lens(run, **arguments)


@pytest.mark.slow
def test_logits_that_are_no_chain_of_steps_are_refused_with_the_operation() -> None:
    import transformers as tf

    class Centred(tf.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits - output.logits.mean(-1, keepdim=True)
            return output

    hm = hookmap.open(Centred(plain_hooks.FAMILIES["llama"].config()).eval())
    with raises(hookmap.SelectionError, "no lens for Centred: `sub` of 2 tensors stands between"):
        hm.lens(TOKENS)


@pytest.mark.slow
def test_a_head_that_mixes_positions_is_refused_by_the_proof() -> None:
    class Mixing(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + x.mean(1, keepdim=True))

    hm = opened("llama")
    mixing = Mixing(32, 97, bias=False)
    mixing.weight = hm.model.lm_head.weight
    hm.model.lm_head = mixing
    with raises(hookmap.SelectionError, "give other logits than the model"):
        unembedding_of(hookmap.open(hm.model))


def test_a_stream_that_is_normed_itself_has_a_lens_and_no_attribution() -> None:
    import transformers as tf

    torch.manual_seed(0)
    config = tf.OpenAIGPTConfig(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    hm = hookmap.open(tf.AutoModelForCausalLM.from_config(config).eval())
    assert torch.allclose(hm.lens(TOKENS).kl[-1], torch.zeros(6), atol=1e-5)
    with raises(hookmap.SelectionError, "norm the stream itself"):
        hm.attribute(TOKENS)


class _Squashed(torch.nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


class _Cubed(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).pow(3)


class _Unsaid(torch.nn.Module):
    """A branch of half the stream that the map does not know."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "block" else getattr(self.block, name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        whole: torch.Tensor = self.block(x, *args, **kwargs) + x / 2
        return whole


@pytest.mark.parametrize(
    ("place", "make", "why"),
    [
        ("model.norm", lambda old: _Squashed(32), "neither a layer norm nor an RMS norm"),
        ("lm_head", lambda old: _Cubed(32, 97, bias=False), "not linear: the sum misses the logit"),
        ("model.layers.1", _Unsaid, "the stream is not the sum of what the branches add"),
    ],
)
def test_an_attribution_that_would_not_sum_to_the_logit_is_refused(place: str, make: Any, why: str) -> None:
    hm = opened("llama")
    known = hm.map
    hm.model.set_submodule(place, make(hm.model.get_submodule(place)))
    with pytest.raises(hookmap.SelectionError, match=why):
        HookedModel(hm.model, None, known).attribute(TOKENS, target=13)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"axes": ("batch", "pos", "stream", "d_model")}, "the blocks have several residual streams"),
        ({"unavailable": {"mlp_out": "it is nowhere"}}, "the blocks have no mlp_out: it is nowhere"),
    ],
)
def test_a_map_without_summands_has_no_attribution(change: dict[str, Any], why: str) -> None:
    hm = opened("llama")
    lacking = change.get("unavailable", {})
    kinds = tuple(
        kind.model_copy(update={"points": {n: p for n, p in kind.points.items() if n not in lacking}, **change})
        for kind in hm.map.kinds
    )
    with pytest.raises(hookmap.SelectionError, match=why):
        HookedModel(hm.model, None, hm.map.model_copy(update={"kinds": kinds})).attribute(TOKENS)


def test_without_a_final_norm_the_parts_are_their_own_logits() -> None:
    hm = opened("llama")
    known = hm.map.model_copy(update={"final_norm_path": None})
    hm.model.model.norm = torch.nn.Identity()
    found = HookedModel(hm.model, None, known).attribute(TOKENS, target=13)
    run = hm.capture([TOKENS], ["mlp_out"], [1], max_new_tokens=0)
    by_hand = run.read(0, "mlp_out", 1)[-1] @ hm.model.lm_head.weight[13]
    assert torch.allclose(found.values[found.parts.index("mlp_out[1]"), 0], by_hand, atol=1e-5)
    assert torch.allclose(found.values.sum(0), logits_of(hm, TOKENS)[-1:, 13], atol=1e-4)


def test_the_ranks_of_a_target_are_the_span_of_its_ties() -> None:
    from scipy.stats import rankdata

    hm = opened("llama", torch.bfloat16)
    logits = logits_of(hm, TOKENS).float()
    tied = next(t for t in range(97) if (logits[-1] == logits[-1, t]).sum() > 1)
    found = hm.lens(TOKENS, layers=-1, target=tied)
    best = [rankdata(-row, "min")[tied] for row in logits.numpy()]
    worst = [rankdata(-row, "max")[tied] for row in logits.numpy()]
    assert found.rank[0].tolist() == best and found.worst_rank[0].tolist() == worst
    assert worst[-1] > best[-1]
    assert found.grid("worst_rank").values[0].tolist() == worst
    assert found.as_json()["worst_rank"] == [worst]


def test_ranks_are_of_the_logits_and_not_of_what_is_left_of_them_as_probabilities() -> None:
    """Logits that differ in the last bits stay apart where one token has all the probability."""
    logits = torch.tensor([[300.0, 1.0, 1.0 + 2e-7, 1.0 + 4e-7]])
    assert len(logits.unique()) == 4 and len(logits.log_softmax(-1).unique()) == 2
    found = figures_of(logits, None, torch.tensor([1]), 1)
    assert (found["rank"].item(), found["worst_rank"].item()) == (4, 4)


def test_rounding_hides_no_branch_that_the_map_does_not_know() -> None:
    hm = opened("llama", torch.bfloat16)
    known = hm.map
    hm.model.set_submodule("model.layers.1", _Unsaid(hm.model.get_submodule("model.layers.1")))
    with pytest.raises(hookmap.SelectionError, match=r"is left, besides the rounding of bfloat16 \(0\.\d+ at most\)"):
        HookedModel(hm.model, None, known).attribute(TOKENS, target=13)


def test_a_stream_in_bfloat16_that_was_far_larger_once_is_its_parts_and_rounding(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One token's feature 7 is 20,000 from the start, and the last MLP takes it away: its steps are 128 there."""
    model, large = plain_hooks.build("llama"), TOKENS[0]
    last = model.model.layers[-1].mlp.down_proj
    hidden: list[torch.Tensor] = []
    with torch.no_grad():
        model.model.embed_tokens.weight[large, 7] = 20_000
        hook = last.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        model(torch.tensor([TOKENS]))
        hook.remove()
        first = hidden[0][0, 0]
        last.weight[7] = -19_990 * first / first.square().sum()
    narrow = hookmap.open(model.to(torch.bfloat16))
    with caplog.at_level(logging.WARNING, "hookmap"):
        found = narrow.attribute(TOKENS, target=13, positions=[0])
    (told,) = [record.getMessage() for record in caplog.records]
    assert "at position 0 the stream reached" in told and "bfloat16 has steps of 128" in told and "float32" in told
    assert found.parts[-2:] == (ROUNDING, BIAS)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0, :1, 13].float()
    torch.testing.assert_close(found.logit, logits, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.values.sum(0), logits, rtol=0.05, atol=0.02)
    run = narrow.capture(TOKENS, "all", "all", max_new_tokens=0)
    parts = [run.read(0, "resid_pre", 0)]
    parts += [run.read(0, point, layer) for layer in run.layers for point in ("mixer_out", "mlp_out")]
    stream = run.read(0, "resid_post", run.layers[-1]).float()[0]
    left = (stream - torch.stack(parts).float().sum(0)[0]).abs()
    assert left.max() > 0.04 * stream.abs().max(), "more than rounding at the end of the stream"
    assert f"up to {float(left.max()):.3g} was rounded away" in told


def test_an_attribution_is_of_one_prompt() -> None:
    with raises(hookmap.SelectionError, "of one prompt, got 2"):
        opened("llama").attribute([TOKENS, TOKENS])


@pytest.mark.slow
def test_factors_and_caps_are_read_from_the_dataflow_with_their_numbers() -> None:
    import transformers as tf

    torch.manual_seed(0)
    config = tf.GraniteConfig(**plain_hooks._COMMON, logits_scaling=8.0, embedding_multiplier=3.0)
    granite = hookmap.open(tf.AutoModelForCausalLM.from_config(config).eval())
    assert str(unembedding_of(granite)) == "model.norm → lm_head → ÷ 8"
    assert str(unembedding_of(opened("gemma2"))) == "model.norm → lm_head → ÷ 30 → tanh → × 30"
    assert str(unembedding_of(opened("cohere"))) == "model.norm → lm_head → × 0.0625"
    assert torch.equal(granite.lens(TOKENS).kl[-1], torch.zeros(6))


def test_a_head_that_computes_more_inside_is_one_step() -> None:
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = tf.CamembertConfig(vocab_size=97, max_position_embeddings=64, is_decoder=True, **sizes)
    hm = hookmap.open(tf.AutoModelForCausalLM.from_config(config).eval())
    assert str(unembedding_of(hm)) == "lm_head"
    assert torch.allclose(hm.lens(TOKENS).kl[-1], torch.zeros(6), atol=1e-5)


@pytest.mark.slow
def test_a_final_norm_that_the_map_does_not_name_is_known_by_what_it_does() -> None:
    hm, twin = opened("llama"), opened("llama")  # what is read of a model is kept with its module: two of them
    other = HookedModel(twin.model, None, twin.map.model_copy(update={"final_norm_path": None}))
    found, by_name = other.attribute(TOKENS, target=13), hm.attribute(TOKENS, target=13)
    assert unembedding_of(other).norm is not None
    assert torch.equal(found.values, by_name.values)
