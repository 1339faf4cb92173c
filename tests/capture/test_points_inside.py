"""Scores, rotated queries and keys, activations and scales of norms: found, shown in every step, and written."""

from typing import Any

import numpy as np
import pytest
import torch
from support import plain_hooks
from support.opened import EACH_STRUCTURE, RAGGED, opened
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.loading import modules
from hookmap.maps.parsing import parse
from hookmap.verification.checks import checks_of

POINTS = (
    "mixer_norm_scale", "q_rot", "k_rot", "attn_scores", "pattern", "mlp_norm_scale", "mlp_pre", "mlp_pre_linear",
    "final_norm_scale", "logits_raw",
)  # fmt: skip


def there(hm: Any) -> list[str]:
    return [point for point in POINTS if point in hm.map.points]


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_every_step_of_a_generation_is_as_in_one_whole_pass(name: str) -> None:
    hm = opened(name)
    run = hm.capture(RAGGED, there(hm), max_new_tokens=6)
    for number, sample in enumerate(run.samples):
        whole = hm.capture([list(sample.token_ids)[: sample.rows]], there(hm), max_new_tokens=0)
        for key in run.keys:
            step, expected = run.read(number, *key), whole.read(0, *key)
            if step.ndim == 3 and key[0] in ("attn_scores", "pattern"):
                step = step[..., : expected.shape[-1]]
            torch.testing.assert_close(step.clamp_min(-1e4), expected.clamp_min(-1e4), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_writing_them_is_proved(name: str) -> None:
    hm = opened(name)
    for kind in hm.map.kinds:
        for point in POINTS:
            if point in kind.points and not point.endswith("scale"):
                assert hm.proofs.of(hm.map.selectors([point], [kind.layers[0]])[0]).reason is None, point


def test_a_head_whose_pattern_is_ablated_gives_nothing() -> None:
    hm = opened("llama")
    edits = [{"do": "ablate", "point": "pattern", "layers": [1], "heads": [2]}]
    run = hm.capture(RAGGED, ["pattern", "z"], [1], max_new_tokens=3, interventions=edits)
    for number in range(len(RAGGED)):
        assert not run.read(number, "z", 1)[:, 2].any() and not run.read(number, "pattern", 1)[:, 2].any()
        assert run.read(number, "z", 1)[:, 1].any()


@pytest.mark.parametrize(
    ("point", "other"),
    [
        ("q_rot", "q"),
        ("k_rot", "k"),
        ("k_rot", "v"),
        ("mlp_pre", "mlp_pre_linear"),
        ("mixer_norm_scale", "mlp_norm_scale"),
    ],
)
def test_a_map_with_another_tensor_in_its_place_is_refuted(point: str, other: str) -> None:
    model = plain_hooks.build("llama")
    found = hookmap.discover(model)
    (kind,) = found.kinds
    wrong = kind.model_copy(update={"points": {**kind.points, point: kind.points[other]}})
    with modules.eager(model):
        checks = list(checks_of(found.model_copy(update={"kinds": (wrong,)}), model, cheap=True))
    assert not all(check.passed for check in checks)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_scores_are_those_of_rotated_queries_and_keys_by_hand(name: str) -> None:
    """As the configs say: a scale, Gemma 2's cap, and a mask of what is behind a query, or before its window."""
    hm = opened(name)
    config = hm.model.config
    run = hm.capture(RAGGED, ["q_rot", "k_rot", "attn_scores", "pattern"], [1], max_new_tokens=3)
    for number in range(len(RAGGED)):
        q, k = (run.read(number, point, 1).movedim(1, 0).numpy() for point in ("q_rot", "k_rot"))
        scores, weights = (run.read(number, point, 1).movedim(1, 0) for point in ("attn_scores", "pattern"))
        scale = getattr(config, "query_pre_attn_scalar", q.shape[-1]) ** -0.5
        by_hand = q @ np.repeat(k, len(q) // len(k), 0).swapaxes(-1, -2) * scale
        if cap := getattr(config, "attn_logit_softcapping", None):
            by_hand = cap * np.tanh(by_hand / cap)
        count = q.shape[1]
        seen = np.tril(np.ones((count, count), bool))
        own = scores[..., :count].numpy()
        np.testing.assert_allclose(own[:, seen], by_hand[:, seen], rtol=1e-4, atol=1e-5)
        assert (own[:, ~seen] < -1e30).all()
        powers = np.exp(np.where(seen, by_hand, -np.inf))
        np.testing.assert_allclose(weights[..., :count], powers / powers.sum(-1, keepdims=True), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_eager_attention_is_on_while_such_a_point_is_read_and_put_back() -> None:
    model = plain_hooks.build("llama")
    hm = hookmap.open(model, tokenizer=tiny_tokenizer())
    for loaded in ("sdpa", "eager"):
        model.set_attn_implementation(loaded)  # type: ignore[operator]
        before = hm.capture(RAGGED, ["resid_post"], [1], max_new_tokens=2)
        hm.capture(RAGGED, ["attn_scores", "q_rot"], [1], max_new_tokens=2)
        assert model.config._attn_implementation == loaded  # type: ignore[union-attr]
        after = hm.capture(RAGGED, ["resid_post"], [1], max_new_tokens=2)
        for number in range(len(RAGGED)):
            assert torch.equal(before.read(number, "resid_post", 1), after.read(number, "resid_post", 1))


def test_the_document_is_read_back() -> None:
    found = opened("qwen3").map
    assert parse(found.to_document()) == found
    assert found.kinds[0].points["pattern"].write is not None


def test_scores_behind_the_keys_that_are_seen_are_minus_infinity() -> None:
    run = opened("llama").capture(RAGGED, ["attn_scores", "pattern"], [1], max_new_tokens=2)
    scores = run.read(1, "attn_scores", 1)
    torch.testing.assert_close(scores.float().softmax(-1), run.read(1, "pattern", 1), rtol=1e-4, atol=1e-6)
