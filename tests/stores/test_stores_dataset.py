"""Every row once in an epoch, in an order that has forgotten the one on disk, with what belongs to it."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.raises import raises
from support.store_runs import Run, resid, write_or_resume
from torch.utils.data import DataLoader

from hookmap.activations import Activation, Sample
from hookmap.errors import SelectionError
from hookmap.stores import open_store
from hookmap.stores.folder import FolderWriter
from hookmap.stores.manifest import manifest_of_run
from hookmap.stores.reader import CaptureStore

WIDTH = 4


def numbered(path: Path, samples: int = 60, rows: int = 40, shard_bytes: int = 1 << 20) -> CaptureStore:
    """Row r of sample s says [s, r] in resid_pre, and [-s, -r] in resid_mid."""
    keys = (("resid_pre", 0), ("resid_mid", 0))
    manifest = manifest_of_run(keys, shard_tokens=100, shard_bytes=shard_bytes)
    with FolderWriter.create(path, manifest) as writer:
        for first in range(0, samples, 5):
            for sample in range(first, first + 5):
                for sign, key in zip((1, -1), keys, strict=True):
                    tensor = torch.tensor([[float(sign * sample), float(sign * row)] for row in range(rows)])
                    writer.write(Activation(sample, *key, 0, tensor))
            for sample in range(first, first + 5):
                writer.finish(Sample(sample, "", "", (0,) * (rows + 1), 1, rows, labels={"odd": sample % 2 == 1}))
    return open_store(path)


def seen(batches: object) -> list[tuple[int, int]]:
    found = []
    for batch in batches:
        assert torch.equal(batch["resid_pre.0"], -batch["resid_mid.0"]), "the tensors of a row stay together"
        found += [(int(s), int(r)) for s, r in batch["resid_pre.0"].tolist()]
    return found


ALL = sorted((sample, row) for sample in range(60) for row in range(40))


@pytest.mark.parametrize("shuffle", [0, 1, 500, 10_000])
@pytest.mark.parametrize("batch", [32, 700])
@pytest.mark.parametrize("shard_bytes", [1 << 20, 300], ids=["whole", "tensors in several shards"])
def test_each_row_comes_once(tmp_path: Path, shuffle: int, batch: int, shard_bytes: int) -> None:
    store = numbered(tmp_path / "c", shard_bytes=shard_bytes)
    data = store.dataset(["resid_pre", "resid_mid"], 0, batch_size=batch, shuffle_rows=shuffle)
    assert data.rows == 2400
    batches = list(data)
    assert sorted(seen(batches)) == ALL
    assert [len(b["resid_pre.0"]) for b in batches[:-1]] == [batch] * (len(batches) - 1)
    assert (seen(batches) == ALL) == (shuffle == 0 and shard_bytes > 300) or shard_bytes == 300


def test_a_capture_without_rows_has_no_batches(tmp_path: Path) -> None:
    data = numbered(tmp_path / "c", samples=0).dataset(["resid_pre", "resid_mid"], 0, shuffle_rows=500)
    assert data.rows == 0 and list(data) == []


def test_the_rows_of_any_capture_come_once(tmp_path: Path) -> None:
    run = Run(resid(width=WIDTH), [[(0, 3, 7), (1, 5, 6)], [(2, 2, 30)], [(3, 1, 4)]], shard_tokens=12, shard_bytes=90)
    for name, run_ in (("steps", run), ("any order", replace(run, shuffle=3))):
        write_or_resume(tmp_path / name, run_)
        data = open_store(tmp_path / name).dataset("resid_mid", batch_size=7, shuffle_rows=20, where=True)
        count = 0
        for batch in data:
            for place, (sample, row) in enumerate(
                zip(batch["sample"].tolist(), batch["position"].tolist(), strict=True)
            ):
                for layer in (0, 1):
                    expected = run.rows(sample, ("resid_mid", layer))[row]
                    assert torch.equal(batch[f"resid_mid.{layer}"][place], expected)
                count += 1
        assert count == 47


def test_the_order_is_the_seeds_and_another_in_each_pass(tmp_path: Path) -> None:
    store = numbered(tmp_path / "c")
    how = {"batch_size": 50, "shuffle_rows": 300}
    first, same = (store.dataset(["resid_pre", "resid_mid"], 0, seed=7, **how) for _ in range(2))
    one, two = seen(first), seen(first)
    assert [seen(same), seen(same)] == [one, two] and one != two
    assert seen(store.dataset(["resid_pre", "resid_mid"], 0, seed=8, **how)) != one


def test_rows_of_a_sample_are_spread_over_the_epoch(tmp_path: Path) -> None:
    """With a third of the rows in the buffer. In order, each sample's rows are neighbours, all 39 pairs of them; at
    random some 40 * 39 / 2400 = 0.65 pairs a sample are, 39 in all. Under 5 times that: by chance never."""
    store = numbered(tmp_path / "c")
    order = seen(store.dataset(["resid_pre", "resid_mid"], 0, batch_size=100, shuffle_rows=800, seed=1))
    pairs = sum(a[0] == b[0] for a, b in itertools.pairwise(order))
    assert pairs < 200
    firsts = Counter(sample for sample, _ in order[:600])
    assert len(firsts) > 25, "a quarter of the epoch has seen many samples"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_workers_share_the_rows(tmp_path: Path, workers: int) -> None:
    store = numbered(tmp_path / "c")
    data = store.dataset(["resid_pre", "resid_mid"], 0, batch_size=64, shuffle_rows=200)
    context = "forkserver"  # a worker gets the data set by pickle, as on any system
    with_workers = DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=context)
    assert sorted(seen(with_workers)) == ALL


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.slow
def test_each_pass_of_workers_has_another_order(tmp_path: Path, persistent: bool) -> None:
    """Persistent ones once gave the first order for ever."""
    data = numbered(tmp_path / "c").dataset(["resid_pre", "resid_mid"], 0, batch_size=64, shuffle_rows=200)
    loader = DataLoader(data, batch_size=None, num_workers=2, persistent_workers=persistent)
    passes = [seen(loader) for _ in range(3)]
    assert all(sorted(each) == ALL for each in passes) and len({tuple(each) for each in passes}) == 3


@pytest.mark.parametrize("shuffle", [0, 200])
def test_a_pass_begins_where_it_is_told(tmp_path: Path, shuffle: int) -> None:
    store = numbered(tmp_path / "c")
    how = {"batch_size": 50, "shuffle_rows": shuffle}
    whole = store.dataset(["resid_pre", "resid_mid"], 0, **how)
    passes = [seen(whole) for _ in range(4)]
    data = store.dataset(["resid_pre", "resid_mid"], 0, **how)
    for batch in (0, 1, 17, 48, 99):
        data.set_epoch(2, batch)
        assert seen(data) == passes[2][50 * batch :]
        assert seen(data) == passes[3], "the next pass is whole"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of two cores
@pytest.mark.parametrize(("workers", "persistent"), [(2, True), (3, False)])
def test_workers_go_on_where_a_pass_was_left(tmp_path: Path, workers: int, persistent: bool) -> None:
    """Wherever it was left: also where a worker, whose share is smaller, had given all of it."""
    store = numbered(tmp_path / "c", samples=55)  # 11 shards of 200 rows: shares of other lengths

    def loader(epoch: int, batch: int) -> DataLoader:
        data = store.dataset(["resid_pre", "resid_mid"], 0, batch_size=30, shuffle_rows=100)
        data.set_epoch(epoch, batch)
        return DataLoader(data, batch_size=None, num_workers=workers, persistent_workers=persistent)

    whole = [seen([batch]) for batch in loader(1, 0)]
    assert sorted(row for batch in whole for row in batch) == ALL[: 55 * 40]
    for left in (1, 7, len(whole) - 3, len(whole) - 1):
        later = loader(1, left)
        assert [seen([batch]) for batch in later] == whole[left:], left
        if persistent and left == 7:
            assert seen(later) == seen(loader(2, 0))


@pytest.mark.parametrize("where", [(-1,), (0, -1), (0.5,), (0, True)])
def test_a_place_that_is_none_is_refused(tmp_path: Path, where: tuple[int, ...]) -> None:
    with raises(SelectionError, "expected epoch and batch"):
        numbered(tmp_path / "c", samples=5).dataset("resid_pre", 0).set_epoch(*where)


def test_sample_position_and_label_belong_to_their_row(tmp_path: Path) -> None:
    store = numbered(tmp_path / "c")
    for batch in store.dataset("resid_pre", 0, batch_size=64, shuffle_rows=200, where=True, label="odd"):
        assert torch.equal(batch["resid_pre.0"], torch.stack([batch["sample"], batch["position"]], 1).float())
        assert batch["label"] == [sample % 2 == 1 for sample in batch["sample"].tolist()]


def test_a_buffer_that_no_row_leaves_untouched_is_not_given_away_twice(tmp_path: Path) -> None:
    store = numbered(tmp_path / "c")
    batches = list(store.dataset(["resid_pre", "resid_mid"], 0, batch_size=64, shuffle_rows=200))
    for batch in batches:  # a batch is the caller's own
        batch["resid_pre.0"].zero_()
    assert all(not batch["resid_pre.0"].any() for batch in batches)


@pytest.mark.parametrize(
    ("points", "layers", "how", "message"),
    [
        ("mlp_out", 0, {}, "this capture does not hold mlp_out"),
        ("resid_pre", 5, {}, "this capture does not hold resid_pre of layer 5"),
        (["resid_pre", "resid_pre"], 0, {}, "Expected each once"),
        ("resid_pre", 0, {"batch_size": 0}, "expected batch_size over 0"),
    ],
)
def test_what_is_not_there_is_refused(
    tmp_path: Path, points: str, layers: int, how: dict[str, int], message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        numbered(tmp_path / "c", samples=5).dataset(points, layers, **how)


def test_a_label_that_a_sample_does_not_have_is_refused(tmp_path: Path) -> None:
    with raises(SelectionError, "sample 0 has no label 'even': it has odd"):
        next(iter(numbered(tmp_path / "c", samples=5).dataset("resid_pre", label="even", shuffle_rows=0)))
