"""A run that goes on ends as one that nothing disturbed would have, and one that is another run is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.raises import raises
from support.store_runs import tree
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.datasets import PromptRecord
from hookmap.errors import StoreError
from hookmap.loading.weights import weights_of
from hookmap.model import HookedModel
from hookmap.stores.copying import repair
from hookmap.stores.reader import CaptureStore

RAGGED = [[5, 17, 3, 60, 22, 9], [11, 2, 33], [48, 7, 7, 90, 1, 2, 3, 4, 81], [5, 5], [9, 8, 7, 6], [1, 2, 3]]
WISH: dict[str, Any] = {"points": ["resid_mid", "resid_post"], "layers": [1, 2], "max_new_tokens": 9, "batch_size": 3}


def fresh(dtype: torch.dtype = torch.float32) -> HookedModel:
    return hookmap.open(plain_hooks.build("llama", dtype), tokenizer=tiny_tokenizer())


def same(one: CaptureStore, other: CaptureStore) -> bool:
    rows = all(
        torch.equal(one.read(s.sample, *key), other.read(s.sample, *key)) for key in one.keys for s in one.samples
    )
    return rows and list(one.samples) == list(other.samples)


SAMPLED = {"do_sample": True, "seed": 4, "temperature": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{}, SAMPLED, {"max_new_tokens": 0, "batch_size": None}], ids=["greedy", "drawn", "read"]
)
@pytest.mark.parametrize("lost", [0, 1, 4])
def test_a_repaired_capture_is_resumed_into_what_it_was(tmp_path: Path, how: dict[str, Any], lost: int) -> None:
    """One sample of a batch is lost: run alone it got another text, or other last bits."""
    hm, wish = fresh(torch.bfloat16), {**WISH, **how}
    hm.capture(RAGGED, **wish, store=tmp_path / "c")
    whole = hookmap.open_store(tmp_path / "c")
    table = (tmp_path / "c" / "samples.jsonl").read_text().splitlines(keepends=True)
    place = next(n for n, line in enumerate(table) if line.startswith(f'{{"sample": {lost},'))
    (tmp_path / "c" / "samples.jsonl").write_text("".join(table).replace(table[place], "damaged\n"))
    assert repair(tmp_path / "c", tmp_path / "r").kept == 5
    (tmp_path / "c" / "samples.jsonl").write_text("".join(table))
    hm.capture(RAGGED, **wish, store=tmp_path / "r", resume=True)
    resumed = hookmap.open_store(tmp_path / "r")
    assert resumed.finished and not resumed.verify() and same(whole, resumed)


class Stop(Exception):
    pass


def interrupted(hm: HookedModel, prompts: Any, path: Path, **how: Any) -> None:
    def stop(progress: Any) -> None:
        if progress.samples_done >= 3:
            raise Stop

    with pytest.raises(Stop):
        hm.capture(prompts, **WISH, **how, store=path, progress=stop)


def records(ids: str, label: int, prompts: Any = RAGGED) -> list[PromptRecord]:
    return [PromptRecord(prompt, f"{ids}{number}", {"y": number * label}) for number, prompt in enumerate(prompts)]


def scaled(hm: HookedModel) -> None:
    with torch.no_grad():
        hm.model.model.layers[1].mlp.down_proj.weight.mul_(1.001)


def trained(hm: HookedModel) -> None:
    with torch.no_grad():
        hm.model.model.norm.weight.add_(1e-3)


OTHERS: dict[str, tuple[Callable[[HookedModel], Any] | None, Any, dict[str, Any], str]] = {
    "ids": (None, records("b", 1), {}, "ids_sha256"),
    "labels": (None, records("a", 2), {}, "labels_sha256"),
    "no ids": (None, RAGGED, {}, "ids_sha256"),
    "prompts": (None, records("a", 1, RAGGED[::-1]), {}, "prompts_sha256"),
    "a matrix": (scaled, records("a", 1), {}, "weights.sha256"),
    "a vector": (trained, records("a", 1), {}, "weights.sha256"),
    "engine": (None, records("a", 1), {"engine": "nnsight"}, "engine: the capture has .hooks., this run has .nnsight."),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_over_other_things_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, prompts, how, named = OTHERS[name]
    hm = fresh()
    interrupted(hm, records("a", 1), tmp_path / "c")
    before = tree(tmp_path / "c")
    if change:
        change(hm)
    with pytest.raises(StoreError, match=rf"cannot be resumed by this one:\n(.*\n)*.*settings\.{named}"):
        hm.capture(prompts, **WISH, **how, store=tmp_path / "c", resume=True)
    assert tree(tmp_path / "c") == before


@pytest.mark.slow
def test_the_same_run_goes_on(tmp_path: Path) -> None:
    hm = fresh()
    hm.capture(records("a", 1), **WISH, store=tmp_path / "whole")
    interrupted(hm, records("a", 1), tmp_path / "c")
    fresh().capture(records("a", 1), **WISH, store=tmp_path / "c", resume=True)
    one, other = tree(tmp_path / "whole"), tree(tmp_path / "c")
    assert {**one, "manifest.json": b""} == {**other, "manifest.json": b""}


@pytest.mark.slow
def test_edits_stored_in_an_nnsight_model_are_held_against_the_folder(tmp_path: Path) -> None:
    import nnsight

    def model(factor: float | None) -> HookedModel:
        inner = plain_hooks.build("llama")
        given = nnsight.NNsight(inner)
        if factor is not None:
            with given.edit(inplace=True):
                given.model.layers[0].mlp.output[:] *= factor
        return hookmap.open(given, tokenizer=tiny_tokenizer())

    interrupted(model(0.5), RAGGED, tmp_path / "c")
    for other in (model(None), model(0.25)):
        with raises(StoreError, "settings.edits_sha256"):
            other.capture(RAGGED, **WISH, store=tmp_path / "c", resume=True)
    done = model(0.5).capture(RAGGED, **WISH, store=tmp_path / "c", resume=True)
    whole = model(0.5).capture(RAGGED, **WISH)
    assert all(torch.equal(done.read(5, *key), whole.read(5, *key)) for key in whole.keys)


@pytest.mark.slow
def test_the_fingerprint_is_of_the_weights_and_of_nothing_else() -> None:
    hm, again = fresh(), fresh()
    first = weights_of(hm.root)
    hm.capture(RAGGED, **WISH)
    assert first is not None and weights_of(hm.root) == first == weights_of(again.root)
    assert first["tensors"] == len(list(hm.root.parameters())) and first["dtypes"] == ["float32"]
    for weight in again.root.parameters():  # each of them in turn
        with torch.no_grad():
            weight.mul_(-1)
        assert weights_of(again.root) != first
        with torch.no_grad():
            weight.mul_(-1)
    assert weights_of(again.root) == first
