"""max_new_tokens=0: one forward pass over given texts, equal to plain hooks, and no longer than it needs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plain_hooks
from support.opened import EACH_FAMILY, RAGGED, opened
from support.plain_hooks import FAMILIES, LAYERS
from support.raises import raises

import hookmap
from hookmap.capture.batches import harvest_batches


def by_hand(model: Any, family: plain_hooks.Family, point: str, layer: int, texts: list[list[int]]) -> torch.Tensor:
    """The point of the batch padded behind: [batch, pos, d], by hooks at paths written by hand."""
    width = max(map(len, texts))
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in texts])}
    if model.config.model_type not in ("mamba", "mamba2"):
        inputs["attention_mask"] = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts])
    places = {place: (place.module.format(i=layer), place.side) for place in family.points[point]}
    with plain_hooks.watching(model, places) as kept:
        model(**inputs, use_cache=False)
    parts = [tensors[0] * place.scale for place, tensors in kept.items()]
    return sum(parts[1:], start=parts[0])


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_rows_are_those_of_a_plain_forward_pass(name: str) -> None:
    hm, family = opened(name), FAMILIES[name]
    run = hm.capture(RAGGED, list(family.points), max_new_tokens=0)
    order = sorted(range(len(RAGGED)), key=lambda n: len(RAGGED[n]))
    assert run.texts == [""] * 3 and run.tokens == [tuple(ids) for ids in RAGGED]
    for point in family.points:
        for layer in family.only_layers.get(point, range(LAYERS)):
            expected = by_hand(hm.model, family, point, layer, [RAGGED[n] for n in order])
            for row, number in enumerate(order):
                got = run.read(number, point, layer)
                assert torch.equal(got, expected[row, : len(RAGGED[number])].reshape(got.shape)), (point, layer)


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_pads_behind_a_text_change_the_last_bits_only(name: str) -> None:
    hm, points = opened(name), list(FAMILIES[name].points)
    together = hm.capture(RAGGED, points, max_new_tokens=0)
    for number, ids in enumerate(RAGGED):
        alone = hm.capture([ids], points, max_new_tokens=0)
        for key in together.keys:
            torch.testing.assert_close(together.read(number, *key), alone.read(0, *key), atol=1e-3, rtol=1e-3)


def test_the_pass_ends_at_the_last_layer_that_is_needed() -> None:
    hm = hookmap.open(plain_hooks.build("llama"))
    assert hm.pads.why_not(harvest=True) is None  # or the capture would run the model to ask
    reached: list[str] = []
    for name in ("model.layers.0.mlp", "model.layers.1", "lm_head"):
        hm.model.get_submodule(name).register_forward_hook(lambda *_, name=name: reached.append(name))
    hm.capture(RAGGED, ["resid_mid"], [0], max_new_tokens=0)
    assert reached == []
    hm.capture(RAGGED, ["resid_post"], [0], max_new_tokens=0)
    assert reached == ["model.layers.0.mlp"]
    hm.capture(RAGGED, ["logits"], max_new_tokens=0)
    assert reached[1:] == ["model.layers.0.mlp", "model.layers.1", "lm_head"]


def test_logits_and_pattern_of_whole_texts() -> None:
    hm = hookmap.open(plain_hooks.build("qwen3"))
    run = hm.capture(RAGGED, ["logits", "pattern"], [1], max_new_tokens=0)
    for number, ids in enumerate(RAGGED):
        with torch.no_grad():
            hm.model.set_attn_implementation("eager")
            expected = hm.model(torch.tensor([ids]), output_attentions=True)
        torch.testing.assert_close(run.read(number, "logits"), expected.logits[0], atol=1e-4, rtol=1e-4)
        pattern = run["pattern", 1][number]
        torch.testing.assert_close(pattern[..., : len(ids)], expected.attentions[1][0], atol=1e-5, rtol=1e-4)


def test_a_killed_harvest_goes_on_with_the_batches_that_are_left(tmp_path: Path) -> None:
    hm = opened("llama")
    texts = [[n % 90 + 3] * (n % 7 + 1) for n in range(40)]
    whole = hm.capture(texts, ["resid_mid"], [1], 0, batch_tokens=16, store=tmp_path / "whole")

    def interrupt(where: Any) -> None:
        if where.samples_done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hm.capture(texts, ["resid_mid"], [1], 0, batch_tokens=16, store=tmp_path / "run", progress=interrupt)
    assert 0 < len(hookmap.open_store(tmp_path / "run")) < 40
    hm.capture(texts, ["resid_mid"], [1], 0, batch_tokens=16, store=tmp_path / "run", resume=True)
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file() and file.name != "manifest.json":  # it tells when and with how much memory it ran
            assert (tmp_path / "run" / file.relative_to(tmp_path / "whole")).read_bytes() == file.read_bytes()
    assert whole.tokens == [tuple(ids) for ids in texts]


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 100), st.none() | st.integers(1, 5))
def test_batches_hold_each_text_once_and_no_more_than_fits(lengths: list[int], tokens: int, size: int | None) -> None:
    batches = list(harvest_batches(lengths, tokens, size))
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[n] for n in batch) * len(batch) <= tokens
        assert size is None or len(batch) <= size


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"seed": 1}, {"stop": "a"}, {"temperature": 0.3}])
def test_settings_of_a_generation_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(hookmap.CaptureError, match=f"generates nothing: leave out {next(iter(settings))}"):
        opened("llama").capture(RAGGED, ["resid_mid"], max_new_tokens=0, **settings)


def test_a_text_longer_than_the_positions_is_an_error() -> None:
    with raises(hookmap.CaptureError, "200 tokens", "do not fit into the 128 positions"):
        opened("gpt2").capture([[1] * 200], ["resid_mid"], max_new_tokens=0)
