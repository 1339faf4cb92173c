"""What hookmap shows, on a model that was really trained: SmolLM2-135M-Instruct. `make real` runs these tests.

Each is held against plain hooks around transformers' own `generate`, or against what such a model is known to do.
"""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.coming_from import ASKED, CHECKOUT, SWEPT, differing, on_real
from support.notebooks import ANY_MODEL, session

import hookmap
from hookmap.datasets.ioi import ioi_pairs

pytestmark = pytest.mark.real

CHAT = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
CLEAN, CORRUPTED = "The capital of France is", "The capital of Italy is"


def test_rows_are_those_of_plain_hooks_around_generate(hm: Any) -> None:
    run = hm.capture([CHAT], points=["resid_pre", "resid_mid", "mixer_out", "mlp_out"], layers=[0, 15, 29],
                     max_new_tokens=8)  # fmt: skip
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    model, handles = hm.model, []
    for layer in (0, 15, 29):
        block = model.model.layers[layer]

        def keep(point: str, layer: int = layer) -> Any:
            return lambda module, args, output=None: seen.setdefault((point, layer), []).append(
                args[0] if point.startswith("resid") else output[0] if isinstance(output, tuple) else output
            )

        handles += [block.self_attn.register_forward_hook(keep("mixer_out"))]
        handles += [block.mlp.register_forward_hook(keep("mlp_out"))]
        handles += [block.post_attention_layernorm.register_forward_pre_hook(keep("resid_mid"))]
        handles += [block.input_layernorm.register_forward_pre_hook(keep("resid_pre"))]
    ids = hm.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, max_new_tokens=8, do_sample=False)
    for handle in handles:
        handle.remove()
    assert tokens[0].tolist() == list(run.tokens[0])[: tokens.shape[1]]
    assert "Paris" in run.texts[0]
    for (point, layer), rows in seen.items():
        want = torch.cat(rows, 1)
        assert torch.equal(run[point, layer][:, : want.shape[1]], want), (point, layer)


def test_the_map_is_the_shipped_one_and_every_check_passes(source: str, hm: Any) -> None:
    assert {s.point: s.terms for s in hookmap.load_map("LlamaForCausalLM").selectors("all", 0)} == {
        s.point: s.terms for s in hm.map.selectors("all", 0)
    }
    result = hookmap.verify(source)
    assert result.passed, [check for check in result.checks if not check.passed]


def test_what_attention_computes_in_each_step_is_that_of_one_whole_pass(exact: Any) -> None:
    """With a cache and pads; and the scores are those of the rotated queries and keys by hand."""
    prompts = ["The sky is", "In 1969, the first man who walked on the moon was", "2 + 2 ="]
    points = ["q_rot", "k_rot", "attn_scores", "pattern", "z", "mlp_pre", "mlp_pre_linear", "mixer_norm_scale"]
    run = exact.capture(prompts, points, [0, 15, 29], max_new_tokens=6)
    for number, sample in enumerate(run.samples):
        whole = exact.capture([list(sample.token_ids)[: sample.rows]], points, [0, 15, 29], max_new_tokens=0)
        for point, layer in run.keys:
            step, expected = run.read(number, point, layer), whole.read(0, point, layer)
            if point in ("attn_scores", "pattern"):
                step = step[..., : sample.rows]
            # Keys of the first token are some 100 times as long as others, and so is their rounding.
            scale = float(expected.clamp_min(-1e4).abs().max())
            torch.testing.assert_close(step.clamp_min(-1e4), expected.clamp_min(-1e4), rtol=1e-3, atol=1e-4 * scale)
        for layer in (0, 15, 29):
            q, k = (run.read(number, point, layer).movedim(1, 0) for point in ("q_rot", "k_rot"))
            products = q @ k.repeat_interleave(3, 0).mT / 8
            scores = run.read(number, "attn_scores", layer).movedim(1, 0)[..., : sample.rows]
            seen = torch.ones_like(scores, dtype=torch.bool).tril()
            torch.testing.assert_close(scores[seen], products[seen], rtol=1e-3, atol=1e-3)
            weights = run.read(number, "pattern", layer).movedim(1, 0)[..., : sample.rows]
            torch.testing.assert_close(scores.softmax(-1), weights, rtol=1e-4, atol=1e-6)


def test_a_batch_gives_the_rows_of_each_prompt_alone(exact: Any) -> None:
    prompts = ["The sky is", "In 1969, the first man who walked on the moon was", "2 + 2 ="]
    together = exact.capture(prompts, points="resid_post", layers=[14, 29], max_new_tokens=6, batch_size=3)
    for number, prompt in enumerate(prompts):
        alone = exact.capture(prompt, points="resid_post", layers=[14, 29], max_new_tokens=6)
        assert alone.texts[0] == together.texts[number]
        for layer in (14, 29):
            rows = together["resid_post", layer][number]
            torch.testing.assert_close(rows, alone["resid_post", layer][0], rtol=1e-4, atol=2e-2)


def test_the_lens_sees_the_answer_come_up(exact: Any) -> None:
    ids = exact.tokenizer(CLEAN, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = exact.model(ids).logits[0, -1]
    lens = exact.lens(CLEAN)
    assert lens.top_ids[-1, -1, 0] == logits.argmax()
    paris = exact.lens(CLEAN, target=" Paris")
    ranks = paris.rank[:, -1]
    assert ranks[-1] == 1 + (logits > logits[paris.target_ids[-1]]).sum()
    assert ranks[0] > 1000
    assert ranks[-1] <= 3


def test_the_parts_of_a_logit_add_up(exact: Any) -> None:
    ids = exact.tokenizer(CLEAN, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = exact.model(ids).logits[0, -1]
    right, wrong = (exact.tokenizer(word)["input_ids"][0] for word in (" Paris", " Rome"))
    parts = exact.attribute(CLEAN, target=" Paris", against=" Rome")
    assert parts.values[:, -1].sum() == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-2)


def test_patching_finds_where_the_country_is_read_and_where_the_answer_stands(exact: Any) -> None:
    """Early, the country's token holds what decides; in the end, the last token does."""
    sweep = exact.sweep(CLEAN, CORRUPTED, " Paris", against=" Rome", point="resid_post", layers=[2, 27])
    effect = sweep.effect.values
    country = sweep.effect.tokens.index(" Italy") if " Italy" in sweep.effect.tokens else 3
    assert effect[0, country] > 0.8
    assert abs(effect[0, -1]) < 0.2
    assert effect[1, -1] > 0.8
    assert abs(effect[1, country]) < 0.2


def test_it_has_induction_heads_and_they_predict_the_repeated_token(exact: Any) -> None:
    """The scores by slices of transformers' own weights; and without its ten best heads repeats are predicted worse."""
    found = exact.head_scores(samples=1)
    for kind, least in (("induction", 0.7), ("previous_token", 0.7), ("attention_sink", 0.9)):
        assert found.top(kind, 1)[0].score > least
    exact.model.set_attn_implementation("eager")
    ids = torch.tensor(found.tokens)
    with torch.no_grad():
        weights = exact.model(ids, output_attentions=True, use_cache=False).attentions
    exact.model.set_attn_implementation("sdpa")
    by_hand = torch.stack([each[0].diagonal(-49, 1, 2)[:, 1:].mean(-1) for each in weights])
    torch.testing.assert_close(found["induction"], by_hand, atol=1e-5, rtol=0)
    heads = {place: [h.head for h in found.top("induction", 10) if h.layer == place] for place in range(30)}
    gone = [{"do": "ablate", "point": "z", "layers": n, "heads": own} for n, own in heads.items() if own]
    whole, without = (exact.loss([list(found.tokens[0])], edits)[0][50:].mean() for edits in ((), gone))
    assert without > 2 * whole


def test_a_capture_on_disk_is_the_one_in_memory(hm: Any, tmp_path: Path) -> None:
    choice: dict[str, Any] = {"points": ["resid_post", "z"], "layers": [3, 20], "max_new_tokens": 4}
    here = hm.capture([CHAT], **choice)
    hm.capture([CHAT], **choice, store=tmp_path / "run")
    kept = hookmap.open_store(tmp_path / "run")
    assert kept.texts == here.texts
    for key in here.keys:
        assert kept[key].dtype == torch.bfloat16
        assert torch.equal(kept[key], here[key])


def test_its_gguf_file_is_the_same_model(source: str, hm: Any) -> None:
    files = sorted(Path(source).glob("gguf/*.gguf"))
    if not files:
        pytest.skip("this real model did not come as GGUF")
    opened = hookmap.open(files[0], device="cpu", dtype=torch.bfloat16)
    theirs = dict(hm.model.named_parameters())
    for name, weight in opened.model.named_parameters():
        assert torch.equal(weight, theirs[name]), name
    ours, folder = (each.capture([CHAT], points="resid_post", layers=29, max_new_tokens=6) for each in (opened, hm))
    assert ours.texts == folder.texts
    assert torch.equal(ours["resid_post", 29], folder["resid_post", 29])


def test_the_loss_is_the_models_own_and_a_gradient_says_what_a_small_change_does(exact: Any) -> None:
    """By a finite difference in the stream of layer 8, at one token."""
    text = "When Mary and John went to the store, John gave a drink to"
    ids = torch.tensor([exact.tokenizer(text)["input_ids"]])
    torch.testing.assert_close(
        exact.loss(text)[0].mean(), exact.model(ids, labels=ids).loss.detach(), rtol=1e-4, atol=1e-5
    )
    metric = hookmap.metrics.logit_difference(" Mary", " John")
    gradient = exact.gradients(text, metric, "resid_pre", [8]).read(0, "resid_pre", 8)[4]
    step = 0.05 * gradient / gradient.norm()
    up, down = (
        float(
            exact.measure(text, metric, [{"do": "steer", "point": "resid_pre", "layers": 8, "positions": [4], **each}])[
                0
            ]
        )
        for each in ({"vector": step}, {"vector": -step})
    )
    assert abs((up - down) / 0.1 - float(gradient.norm())) < 0.03 * float(gradient.norm())


def test_a_sweep_over_pairs_of_names_is_patches_by_plain_hooks(exact: Any) -> None:
    pairs = ioi_pairs(exact.tokenizer, 3)
    assert all(len(exact.tokenizer(each)["input_ids"]) == 1 for pair in pairs for each in (pair.answer, pair.wrong))
    found = exact.sweep(pairs, point="z", over="heads", layers=[12, 20])
    assert found.clean > 1 > -1 > found.corrupted, "it knows which name comes"
    number, (row, layer), head = 1, (1, 20), 4
    pair, project, rows = pairs[number], exact.model.model.layers[layer].self_attn.o_proj, []
    clean, corrupted = (
        exact.tokenizer(text, return_tensors="pt")["input_ids"] for text in (pair.clean, pair.corrupted)
    )
    width = project.in_features // 9

    def put(_: Any, args: Any) -> Any:
        new = args[0].clone()
        new[..., head * width : (head + 1) * width] = rows[0][..., head * width : (head + 1) * width]
        return (new,)

    with torch.no_grad():
        keep = project.register_forward_pre_hook(lambda _, args: rows.append(args[0].clone()))
        exact.model(clean)
        keep.remove()
        patch = project.register_forward_pre_hook(put)
        logits = exact.model(corrupted).logits[0, -1]
        patch.remove()
    right, wrong = (exact.tokenizer(text)["input_ids"][0] for text in (pair.answer, pair.wrong))
    assert float(found.values[number, row, head, 0]) == pytest.approx(float(logits[right] - logits[wrong]), abs=2e-3)


@pytest.mark.parametrize("name", ANY_MODEL)
def test_the_notebooks_run_on_it(name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    session(name, checked=False).run()


def test_the_page_for_those_who_come_from_nnsight_gives_the_same_numbers_on_it(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)
    nnsight, ours = (runpy.run_path(str(on_real(program, source, tmp_path))) for program in ("nnsight", "hookmap"))
    nnsight["swept"] = nnsight["swept"][:, SWEPT]
    assert differing({name: nnsight[name] for name in ASKED}, {name: ours[name] for name in ASKED}, 1e-3) == []
