"""A capture is what plain PyTorch hooks see in a plain `model.generate`, bit for bit, and the tokens are the same."""

import pytest
import torch
from support import plain_hooks
from support.opened import EACH_FAMILY, RAGGED, opened
from support.plain_hooks import FAMILIES, LAYERS, Reference
from support.raises import raises

import hookmap
from hookmap.capture.result import Capture
from hookmap.loading.sampling import own_seed

NEW = 7
SINGLE = [[5, 17, 3, 60, 22, 9]]


def same(run: Capture, reference: Reference, name: str, prompts: list[list[int]], ends: frozenset[int] = frozenset()):
    """Tokens and every point that was written down by hand are equal, row by row."""
    family = FAMILIES[name]
    width = max(map(len, prompts))
    for number, ids in enumerate(prompts):
        new = reference.sequences[number, width:].tolist()
        end = next((place + 1 for place, token in enumerate(new) if token in ends), len(new))
        assert run.tokens[number] == (*ids, *new[:end])
        rows = len(ids) + end - 1
        for point in family.points:
            for layer in range(LAYERS):
                expected = reference.point(family, point, layer)[number, width - len(ids) :][:rows]
                got = run.read(number, point, layer)
                assert got.dtype == expected.dtype
                assert got.shape == expected.shape, (point, layer)
                assert torch.equal(got, expected), (point, layer, (got - expected).abs().max())


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_single_prompt(name: str) -> None:
    hm, points = opened(name), list(FAMILIES[name].points)
    reference = plain_hooks.generate(hm.model, FAMILIES[name], SINGLE, max_new_tokens=NEW, do_sample=False)
    run = hm.capture(SINGLE, points, max_new_tokens=NEW)
    assert reference.passes == NEW
    assert run["resid_pre", 0].shape == (1, len(SINGLE[0]) + NEW - 1, hm.map.d_model)
    same(run, reference, name, SINGLE)


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_padded_batch(name: str) -> None:
    hm, points = opened(name), list(FAMILIES[name].points)
    reference = plain_hooks.generate(hm.model, FAMILIES[name], RAGGED, max_new_tokens=NEW, do_sample=False)
    run = hm.capture(RAGGED, points, max_new_tokens=NEW)
    same(run, reference, name, RAGGED)


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_early_end_of_sequence_in_a_batch(name: str) -> None:
    """A row that ends early keeps its rows up to the last token that was fed, and nothing of the junk behind it."""
    hm, points = opened(name), list(FAMILIES[name].points)
    free = plain_hooks.generate(hm.model, FAMILIES[name], RAGGED, max_new_tokens=NEW, do_sample=False)
    width = max(map(len, RAGGED))
    ends = sorted({int(free.sequences[0, width + 2]), int(free.sequences[1, width])})
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": ends}
    reference = plain_hooks.generate(hm.model, FAMILIES[name], RAGGED, **settings)
    run = hm.capture(RAGGED, points, max_new_tokens=NEW, eos_token_id=ends)
    assert run.samples[1].rows == len(RAGGED[1])  # its first token ends it
    same(run, reference, name, RAGGED, frozenset(ends))


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_sampled_with_a_seed(name: str) -> None:
    """Each prompt draws what plain `generate` of it alone draws; the tensors are those of the batch."""
    hm, points = opened(name), list(FAMILIES[name].points)
    settings = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.7, "top_k": 20, "top_p": 0.95}
    run = hm.capture(RAGGED, points, seed=3, **settings)
    for number, ids in enumerate(RAGGED):
        torch.manual_seed(own_seed(3, number))
        alone = plain_hooks.generate(hm.model, FAMILIES[name], [ids], **settings)
        assert run.tokens[number] == tuple(alone.sequences[0].tolist())
    drawn = [tokens[len(ids) :] for tokens, ids in zip(run.tokens, RAGGED, strict=True)]
    width = max(map(len, RAGGED))

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        left = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(drawn):
            left[row, tokens[min(ids.shape[1] - width, len(tokens) - 1)]] = 0
        return left

    settings = {"max_new_tokens": NEW, "do_sample": False, "logits_processor": [force]}
    reference = plain_hooks.generate(hm.model, FAMILIES[name], RAGGED, **settings)
    same(run, reference, name, RAGGED)


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_a_batch_shows_what_each_prompt_alone_shows(name: str) -> None:
    """Padding changes the arithmetic in the last bits only."""
    hm, points = opened(name), list(FAMILIES[name].points)
    together = hm.capture(RAGGED, points, max_new_tokens=1)
    for number, ids in enumerate(RAGGED):
        alone = hm.capture([ids], points, max_new_tokens=1)
        for point, layer in together.keys:
            torch.testing.assert_close(
                together.read(number, point, layer), alone.read(0, point, layer), atol=1e-3, rtol=1e-3
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["granite", "opt", "gemma2", "falcon_7b", "qwen3_moe"])
def test_bfloat16_stays_bfloat16_and_sums_round_as_the_model_rounds(name: str) -> None:
    hm = hookmap.open(plain_hooks.build(name, torch.bfloat16))
    reference = plain_hooks.generate(hm.model, FAMILIES[name], RAGGED, max_new_tokens=NEW, do_sample=False)
    run = hm.capture(RAGGED, list(FAMILIES[name].points), max_new_tokens=NEW)
    assert run.read(0, "resid_post", 0).dtype == torch.bfloat16
    same(run, reference, name, RAGGED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt", "granite", "llama", "gpt2", "olmo2", "gemma3"])
def test_the_sums_of_the_map_hold_bit_for_bit(name: str) -> None:
    """In bfloat16 a sum that is rounded elsewhere than the model rounds shows."""
    hm = hookmap.open(plain_hooks.build(name, torch.bfloat16))
    run = hm.capture(RAGGED, max_new_tokens=3)
    for left, a, b in (("resid_mid", "resid_pre", "mixer_out"), ("resid_post", "resid_mid", "mlp_out")):
        for layer in range(LAYERS):
            assert torch.equal(run.read(2, left, layer), run.read(2, a, layer) + run.read(2, b, layer)), (left, layer)


def test_chunked_prefill_is_several_passes_and_the_same_rows() -> None:
    """A visit is not a token: 3 passes for 6 prompt tokens."""
    hm, family = opened("qwen3"), FAMILIES["qwen3"]
    settings = {"max_new_tokens": NEW, "prefill_chunk_size": 2}
    reference = plain_hooks.generate(hm.model, family, SINGLE, do_sample=False, **settings)
    assert reference.passes == 3 + NEW - 1
    run = hm.capture(SINGLE, list(family.points), **settings)
    same(run, reference, "qwen3", SINGLE)


def test_without_a_cache_each_row_is_kept_once() -> None:
    """use_cache=False feeds everything again on each pass; only the new positions are rows."""
    hm, family = opened("qwen3"), FAMILIES["qwen3"]
    cached = hm.capture(RAGGED, list(family.points), max_new_tokens=NEW)
    run = hm.capture(RAGGED, list(family.points), max_new_tokens=NEW, use_cache=False)
    assert run.tokens == cached.tokens
    for key in run.keys:
        for number in range(len(RAGGED)):
            torch.testing.assert_close(run.read(number, *key), cached.read(number, *key), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_logits_of_every_position() -> None:
    """transformers computes the prompt's last logits only; asked for, all are there, and the tokens stay the same."""
    for name in ("qwen3", "gemma2", "bloom"):
        hm = opened(name)
        run = hm.capture(RAGGED, ["logits"], max_new_tokens=NEW)
        assert run.tokens == hm.capture(RAGGED, ["resid_pre"], [0], max_new_tokens=NEW).tokens
        for number, ids in enumerate(RAGGED):
            logits = run.read(number, "logits")
            assert logits.shape == (len(ids) + NEW - 1, plain_hooks.VOCABULARY)
            # Each generated token is the most likely one after the token before it.
            assert logits[len(ids) - 1 :].argmax(-1).tolist() == list(run.tokens[number][len(ids) :])
            with torch.no_grad():
                expected = hm.model(torch.tensor([run.tokens[number][:-1]])).logits[0]
            torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_points_of_the_whole_model() -> None:
    hm = opened("llama")
    run = hm.capture(SINGLE, ["embed", "final_norm", "logits"], max_new_tokens=4)
    fed = torch.tensor([run.tokens[0][:-1]])
    assert torch.equal(run["embed"], hm.model.model.embed_tokens(fed))
    with torch.no_grad():
        torch.testing.assert_close(hm.model.lm_head(run["final_norm"]), run["logits"], atol=1e-5, rtol=1e-5)


def test_one_new_token_is_one_pass_and_the_prompt_rows() -> None:
    hm = opened("gpt2")
    run = hm.capture(SINGLE, ["resid_mid"], [1], max_new_tokens=1)
    assert run["resid_mid", 1].shape == (1, len(SINGLE[0]), 32)
    assert run.steps() == (0,) * len(SINGLE[0])


def test_names_layers_and_steps() -> None:
    """Aliases and negative layers read the same tensor; keys come in forward order, however they were asked for."""
    run = opened("llama").capture(RAGGED, ["resid_post", "embed", "resid_mid"], [2, -3], max_new_tokens=3)
    assert run.keys == (("embed", None), ("resid_mid", 0), ("resid_post", 0), ("resid_mid", 2), ("resid_post", 2))
    mid = run["resid_mid", 2]
    assert [t.shape for t in mid] == [(len(ids) + 2, 32) for ids in RAGGED]
    for other in (run["blocks.2.hook_resid_mid"], run["resid_mid", -1], run["hook_resid_mid", 2]):
        assert all(map(torch.equal, mid, other))
    assert run.steps(1) == (0, 0, 0, 1, 2)
    with raises(hookmap.SelectionError, "layer 1"):
        run["resid_mid", 1]


def test_batches_of_any_size_have_the_same_samples() -> None:
    hm = opened("llama")
    runs = [hm.capture(RAGGED, ["resid_mid"], [1], max_new_tokens=4, batch_size=size) for size in (1, 2, 3)]
    for run in runs[1:]:
        assert run.tokens == runs[0].tokens
        for a, b in zip(run["resid_mid", 1], runs[0]["resid_mid", 1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
