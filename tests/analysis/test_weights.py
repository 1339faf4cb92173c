"""Weights by name are held against the model: what they multiply gives what the model gives there."""

from typing import Any

import pytest
import torch
import transformers
from support import plain_hooks
from support.opened import EACH_STRUCTURE, RAGGED, opened
from support.raises import raises

import hookmap

IDS = [RAGGED[0]]


def named(hm: Any, point: str, layer: int | None = None) -> dict[str, Any]:
    return {each.name: each for each in hm.weights(point, layer)}


def biased(result: torch.Tensor, weight: Any) -> torch.Tensor:
    return result if weight.bias is None else result + weight.bias


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_the_heads_outputs_times_w_o_are_the_attention_s_output(name: str) -> None:
    hm = opened(name)
    for layer in range(hm.map.num_layers):
        if hm.map.unavailable("z", layer) is not None:
            continue
        run = hm.capture(IDS, ["z", "mixer_out_raw"], [layer], max_new_tokens=0)
        w = named(hm, "z", layer)["W_O"]
        assert w.axes == ("heads", "d_head", "out") and w.tensor is not None
        found = torch.einsum("nhd,hdo->no", run.read(0, "z", layer), w.tensor)
        close(biased(found, w), run.read(0, "mixer_out_raw", layer))


@pytest.mark.slow
@pytest.mark.parametrize("pre_norm", [False, True], ids=["bart", "pegasus"])
def test_the_weights_of_cross_attention_are_its_own(pre_norm: bool) -> None:
    config = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 16, "encoder_attention_heads": 2}
    config |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40}
    torch.manual_seed(0)
    if pre_norm:
        model: Any = transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**config))
    else:
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**config))
    hm = hookmap.open(model)
    for layer, block in enumerate(model.model.decoder.layers):
        reads, writes = named(hm, "cross_attn_in", layer), named(hm, "cross_attn_out", layer)
        assert {name for name, each in reads.items() if each.side == "reads"} == {"W_Q"}
        torch.testing.assert_close(reads["W_Q"].tensor, block.encoder_attn.q_proj.weight.T)
        torch.testing.assert_close(writes["W_O"].tensor, block.encoder_attn.out_proj.weight.T)
        assert writes["W_O"].bias is not None and writes.keys() == {"W_O"}
        norm = block.encoder_attn_layer_norm if pre_norm else block.self_attn_layer_norm
        assert reads["w_norm"].tensor.data_ptr() == norm.weight.data_ptr()


@pytest.fixture(scope="module")
def mixture() -> Any:
    """Of experts, one of which all tokens share."""
    config = transformers.Qwen2MoeConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        moe_intermediate_size=8, shared_expert_intermediate_size=24,
        num_experts=4, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return hookmap.open(transformers.Qwen2MoeForCausalLM(config))


def test_a_shared_expert_has_a_product_of_its_own(mixture: Any) -> None:
    hm = mixture
    run = hm.capture(IDS, ["shared_expert_out", "mlp_in"], [1], max_new_tokens=0)
    expert = hm.model.model.layers[1].mlp.shared_expert
    (w_out,) = hm.weights("shared_expert_out", 1)
    assert w_out.tensor is not None and w_out.name == "W_out" and w_out.side == "writes"
    x = run.read(0, "mlp_in", 1)
    hidden = torch.nn.functional.silu(x @ expert.gate_proj.weight.T) * (x @ expert.up_proj.weight.T)
    gate = torch.sigmoid(x @ hm.model.model.layers[1].mlp.shared_expert_gate.weight.T)
    close(gate * (hidden @ w_out.tensor), run.read(0, "shared_expert_out", 1))


def test_a_point_without_weights_says_what_has_them(mixture: Any) -> None:
    for point, told in (
        ("resid_mid", "attn_out and mlp_out"),
        ("pattern", "from q and k"),
        ("router_weights", "W_router"),
        ("expert_out", "mlp_in and mlp_out have the weights of all"),
        ("mlp_norm_scale", "a norm computes it"),
    ):
        with raises(hookmap.SelectionError, f"no weights write to {point}", told):
            mixture.weights(point, 1)


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_what_attention_reads_times_w_q_w_k_w_v_are_q_k_v(name: str) -> None:
    hm = opened(name)
    for layer in range(hm.map.num_layers):
        points = [p for p in ("q", "k", "v") if hm.map.unavailable(p, layer) is None]
        if not points or hm.map.unavailable("k", layer) is not None:  # of latent attention, several products make them
            continue
        run = hm.capture(IDS, [*points, "attn_in"], [layer], max_new_tokens=0)
        reads = named(hm, "attn_in", layer)
        for point in points:
            w = named(hm, point, layer)[f"W_{point.upper()}"]
            assert w.axes == ("in", "heads", "d_head") and torch.equal(w.tensor, reads[f"W_{point.upper()}"].tensor)
            x = run.read(0, "attn_in", layer)
            found, expected = torch.einsum("ni,ihd->nhd", x, w.tensor), run.read(0, point, layer)
            if w.bias is None:
                close(found, expected)
            else:  # the bias is the projection's own, as it is: the same for every token
                close((expected - found).std(0), torch.zeros_like(expected[0]))


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_a_dense_mlp_is_computed_with_its_weights(name: str) -> None:
    hm = opened(name)
    for layer in range(hm.map.num_layers):
        if hm.map.unavailable("mlp_post", layer) is not None:
            continue
        run = hm.capture(IDS, ["mlp_in", "mlp_post", "mlp_out_raw"], [layer], max_new_tokens=0)
        x, post = run.read(0, "mlp_in", layer), run.read(0, "mlp_post", layer)
        w = named(hm, "mlp_post", layer)
        close(biased(post @ w["W_out"].tensor, w["W_out"]), run.read(0, "mlp_out_raw", layer))
        inner = biased(x @ w["W_in"].tensor, w["W_in"])
        assert inner.shape == post.shape
        if "W_gate" in w:  # post = act(gate) * inner: with the gate's sign, whatever the function is
            ratio = post / inner
            gate = biased(x @ w["W_gate"].tensor, w["W_gate"])
            order = gate.flatten().argsort()
            high = ratio.flatten()[order][-20:]
            assert bool((high > 0).all()) and float((high - gate.flatten()[order][-20:]).abs().max()) < 0.3 * float(
                high.max()
            )


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_what_the_activation_function_reads_is_what_the_mlp_reads_times_one_weight(name: str) -> None:
    """Gated or not: GPT-2's only inner product is W_in, of a gated MLP the argument is W_gate's, the factor W_in's."""
    hm = opened(name)
    for layer in range(hm.map.num_layers):
        points = [p for p in ("mlp_pre", "mlp_pre_linear") if hm.map.unavailable(p, layer) is None]
        if not points:
            continue
        run = hm.capture(IDS, ["mlp_in", *points], [layer], max_new_tokens=0)
        for point, w_name in zip(points, ["W_in"] if len(points) == 1 else ["W_gate", "W_in"], strict=True):
            [w] = hm.weights(point, layer)
            assert (w.name, w.side, w.axes) == (w_name, "writes", ("in", "out"))
            close(biased(run.read(0, "mlp_in", layer) @ w.tensor, w), run.read(0, point, layer))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_heads_results_and_bare_logits_have_the_weights_of_what_they_are_made_of(name: str) -> None:
    hm = opened(name)
    [result], [w_o] = hm.weights("attn_result", 1), hm.weights("z", 1)
    assert (result.name, result.side, result.axes) == ("W_O", "writes", ("heads", "d_head", "out"))
    assert torch.equal(result.tensor, w_o.tensor)
    if "logits_raw" in hm.map.points:
        run = hm.capture(IDS, ["final_norm", "logits_raw"], max_new_tokens=0)
        w_u = named(hm, "logits_raw")["W_U"]
        close(run.read(0, "final_norm") @ w_u.tensor, run.read(0, "logits_raw"))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_experts_in_one_parameter_give_the_mixture_s_output(name: str) -> None:
    hm, layer = opened(name), 1
    points = ["mlp_in", "mlp_out_raw", "router_indices", "router_weights"]
    run = hm.capture(IDS, points, [layer], max_new_tokens=0)
    x = run.read(0, "mlp_in", layer)
    reads, writes = hm.weights("mlp_in", layer), hm.weights("mlp_out", layer)

    def fused(weights: Any, name: str, experts: bool = True) -> Any:
        return next((w.tensor for w in weights if w.name == name and (w.axes[0] == "experts") == experts), None)

    indices, factors = run.read(0, "router_indices", layer), run.read(0, "router_weights", layer)
    total = torch.zeros_like(x)
    for row in range(len(x)):
        for expert, factor in zip(indices[row].tolist(), factors[row], strict=True):
            gate, inner = (x[row] @ fused(reads, n)[expert] for n in ("W_gate", "W_in"))
            total[row] += factor * ((torch.nn.functional.silu(gate) * inner) @ fused(writes, "W_out")[expert])
    if (shared := fused(writes, "W_out", experts=False)) is not None:
        gate, inner = (x @ fused(reads, n, experts=False) for n in ("W_gate", "W_in"))
        total += (torch.nn.functional.silu(gate) * inner) @ shared
    close(total, run.read(0, "mlp_out_raw", layer))


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_the_embedding_and_the_unembedding(name: str) -> None:
    hm = opened(name)
    run = hm.capture(IDS, ["embed"], max_new_tokens=0)
    w_e, w_u = named(hm, "embed")["W_E"], named(hm, "logits")["W_U"]
    rows, embed = w_e.tensor[torch.tensor(IDS[0])], run.read(0, "embed")
    scale = (rows * embed).sum() / rows.square().sum()  # Gemma's embedding module scales its rows
    close(rows * scale, embed)
    assert w_u.tensor.shape == (hm.map.d_model, hm.map.d_vocab)
    assert (w_e.path in w_u.tied or w_u.path in w_e.tied or w_e.path == w_u.path) == (
        hm.model.get_parameter(w_e.path) is hm.model.get_parameter(w_u.path)
    )


def test_what_is_written_to_a_view_is_written_to_the_model() -> None:
    hm = hookmap.open(plain_hooks.build("gpt2"))
    w = named(hm, "z", 1)["W_O"]
    with torch.no_grad():
        w.tensor[2] = 0.0
    parameter = hm.model.get_parameter(w.path)
    assert not parameter[16:24].any() and parameter[:16].any()


@pytest.mark.parametrize(
    ("point", "layer", "says"),
    [("resid_mid", 1, "attn_in"), ("z", None, "say which"), ("nothing", 1, "unknown point"), ("z", 99, "out of range")],
)
def test_a_point_without_weights_says_so(point: str, layer: int | None, says: str) -> None:
    with raises(hookmap.SelectionError, says):
        opened("llama").weights(point, layer)
