"""What a data set says of a sample stays with it: its id, its labels, and which tokens its rows are of."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from support.raises import raises

from hookmap.activations import Activation, Sample
from hookmap.cli.main import main
from hookmap.errors import SelectionError, StoreError
from hookmap.stores import open_store
from hookmap.stores.folder import FolderWriter, write_store
from hookmap.stores.interface import Store
from hookmap.stores.manifest import manifest_of_run
from hookmap.stores.memory import MemoryStore

KEYS = (("resid_pre", 0), ("resid_mid", 0))
CHOSEN = (2, 3, 7, 11)
IDS = tuple(range(50, 63))


def rows(sample: Sample, key: tuple[str, int | None]) -> torch.Tensor:
    seed = torch.Generator().manual_seed(10 * sample.sample + KEYS.index(key))
    return torch.randn(sample.rows, 5, generator=seed).bfloat16()


SAMPLES = (
    Sample(0, "a", "b", IDS, 4, 12, id="math/1", labels={"right": True, "tags": ["x", None], "score": 0.1, "é": {}}),
    Sample(1, "a", "b", IDS, 4, 4, positions=CHOSEN, id="math/2"),
    Sample(2, "a", "b", IDS, 4, 1, positions="mean", labels={}),
    Sample(3, "a", "b", IDS, 4, 0, positions=()),
    Sample(4, "a", "b", IDS, 4, 12),
)


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    memory = MemoryStore(KEYS)
    for sample in SAMPLES:
        for key in KEYS:
            memory.write(Activation(sample.sample, *key, 0, rows(sample, key)))
        memory.finish(sample)
    if request.param == "memory":
        return memory
    write_store(memory, tmp_path / "c", manifest_of_run(KEYS))
    return open_store(tmp_path / "c")


def test_a_sample_comes_back_as_it_was(store: Store) -> None:
    assert list(store.samples) == list(SAMPLES)
    for sample in SAMPLES:
        assert torch.equal(store.read(sample.sample, "resid_mid", 0), rows(sample, ("resid_mid", 0)))


def test_a_sample_is_found_by_its_id(store: Store) -> None:
    assert store.by_id("math/2") == SAMPLES[1]
    with pytest.raises(
        SelectionError, match=r"no sample of this capture has the id 'math/3'. Did you mean 'math/\d'\?"
    ):
        store.by_id("math/3")


def test_an_id_of_several_samples_is_refused() -> None:
    memory = MemoryStore(KEYS)
    for number in (3, 5):
        memory.finish(Sample(number, "", "", (1,), 1, 0, id="same"))
    with raises(SelectionError, "id 'same' is of several samples here: 3, 5"):
        memory.by_id("same")


def test_tokens_are_positions_whatever_was_kept(store: Store) -> None:
    kept = rows(SAMPLES[1], ("resid_mid", 0))
    for tokens, places in (([7], [2]), ([11, 2, 2], [3, 0, 0]), (range(2, 4), [0, 1]), ([], [])):
        assert torch.equal(store.read(1, "resid_mid", 0, tokens=tokens), kept[places])


@given(start=st.integers(-15, 15) | st.none(), stop=st.integers(-15, 15) | st.none(), step=st.integers(1, 4))
@settings(max_examples=50)
def test_a_slice_is_of_positions_and_gives_those_that_were_kept(start: int | None, stop: int | None, step: int) -> None:
    memory = MemoryStore(KEYS)
    sample = SAMPLES[1]
    for key in KEYS:
        memory.write(Activation(1, *key, 0, rows(sample, key)))
    memory.finish(sample)
    wanted = set(range(len(IDS))[start:stop:step])
    expected = [place for place, position in enumerate(CHOSEN) if position in wanted]
    found = memory.read(1, "resid_mid", 0, tokens=slice(start, stop, step))
    assert torch.equal(found, rows(sample, ("resid_mid", 0))[expected])


@pytest.mark.parametrize(
    ("sample", "tokens", "message"),
    [
        (1, [2, 4, 12], "positions 4, 12 are not in sample 1: it has rows of the positions 2, 3, 7, 11."),
        (1, range(2, 5), "positions 4 are not in sample 1"),
        (1, [True], "positions True are not in sample 1"),
        (1, "27", "tokens must be a slice, a range, a sequence of positions or None, not '27'"),
        (2, [0], "sample 2 is one mean over positions: read it without tokens"),
        (2, slice(0, 1), "sample 2 is one mean over positions"),
        (3, [0], "positions 0 are not in sample 3"),
        (4, [12], "it has rows 0 to 11 "),
    ],
)
def test_a_position_that_was_not_kept_is_refused(store: Store, sample: int, tokens: object, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        store.read(sample, "resid_mid", 0, tokens=tokens)


@pytest.mark.parametrize("wrong", ["[2, 2, 7, 11]", "[2, 3, 7]", "[11, 7, 3, 2]", '"median"', "[-1, 3, 7, 11]"])
def test_positions_that_cannot_be_are_a_broken_line(tmp_path: Path, wrong: str) -> None:
    with FolderWriter.create(tmp_path / "c", manifest_of_run(KEYS)) as writer:
        for key in KEYS:
            writer.write(Activation(1, *key, 0, rows(SAMPLES[1], key)))
        writer.finish(SAMPLES[1])
    table = tmp_path / "c" / "samples.jsonl"
    table.write_text(table.read_text().replace('"positions": [2, 3, 7, 11]', f'"positions": {wrong}'))
    with pytest.raises(StoreError, match=r"samples.jsonl, line 1 is broken"):
        open_store(tmp_path / "c").sample(1)


def test_inspect_shows_id_labels_and_positions(tmp_path: Path) -> None:
    memory = MemoryStore(KEYS)
    for sample in SAMPLES[:3]:
        for key in KEYS:
            memory.write(Activation(sample.sample, *key, 0, rows(sample, key)))
        memory.finish(sample)
    write_store(memory, tmp_path / "c", manifest_of_run(KEYS))
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "c")]).output
    for text in ("math/1", 'right: true  tags: ["x", null]', "rows of positions 2, 3, 7, 11", "one row: a mean"):
        assert text in shown
    found = json.loads(CliRunner().invoke(main, ["inspect", str(tmp_path / "c"), "--json"]).stdout)
    assert found["texts"][1]["positions"] == [2, 3, 7, 11] and found["texts"][0]["labels"]["right"] is True
