"""Both stores keep every row as it was, and the folder's format is what its page says."""

import hashlib
import json
import math
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.documents import hybrid
from support.raises import raises
from support.store_runs import Run, resid, tree

from hookmap.activations import Activation, Sample, Sink
from hookmap.errors import CaptureError, SelectionError, StoreError
from hookmap.maps.parsing import parse
from hookmap.stores import open_store
from hookmap.stores.buffer import Buffer
from hookmap.stores.folder import FolderWriter, write_store
from hookmap.stores.interface import Store
from hookmap.stores.manifest import manifest_of_run
from hookmap.stores.memory import MemoryStore
from hookmap.stores.reader import CaptureStore
from hookmap.stores.shard import Block, write_shard
from hookmap.stores.whole_writer import WholeWriter

FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None  # hundreds of small captures, each with its fsyncs
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, dtype and shape too."""
    return found.dtype == expected.dtype and torch.equal(found, expected)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    points = ("resid_pre", "resid_mid", "mlp_out", "logits")
    keys = [(point, None if point == "logits" else layer) for layer in range(3) for point in points]
    chosen = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=5, unique=True))
    tensors = {key: (draw(st.sampled_from(DTYPES)), draw(st.integers(1, 5))) for key in chosen}
    numbers = draw(st.permutations(range(draw(st.integers(1, 6)))))
    batches: list[list[tuple[int, int, int]]] = [[]]
    for number in numbers:
        prompt = draw(st.integers(1, 9))
        batches[-1].append((number, prompt, prompt + draw(st.integers(0, 12))))
        if draw(st.booleans()):
            batches.append([])
    return Run(
        tensors,
        [batch for batch in batches if batch],
        shard_tokens=draw(st.integers(1, 12)),
        shard_bytes=draw(st.sampled_from((1, 40, 300, 1 << 20))),
        shuffle=draw(st.one_of(st.none(), st.integers(0, 1000))),
    )


class Memory:
    """A run in memory."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.sink = MemoryStore(run.keys)

    def store(self) -> Store:
        return self.sink


class Folder:
    """A run in a folder."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.path = folder / "capture"
        self.sink = FolderWriter.create(self.path, run.manifest)

    def store(self) -> Store:
        self.sink.close(finished=False)
        return open_store(self.path)


class Whole:
    """A run in a folder that is a capture at the end only."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.path = folder / "capture"
        self.sink = WholeWriter(self.path, run.manifest)

    def store(self) -> Store:
        self.sink.abandon()
        self.sink.close(finished=True)
        return open_store(self.path)


Place = Memory | Folder | Whole

SMALL = Run(resid(), [[(0, 3, 7), (1, 5, 6)], [(2, 2, 30)]])


@pytest.mark.parametrize("place", [Memory, Folder, Whole])
class TestEveryStore:
    """What a store promises, whatever is behind it."""

    @given(run=runs())
    @settings(max_examples=60)
    @pytest.mark.slow
    def test_every_row_comes_back_as_it_was(self, place: Callable[[Run, Path], Place], run: Run) -> None:
        with tempfile.TemporaryDirectory(dir=FAST) as folder:
            made = place(run, Path(folder))
            run.write(made.sink)
            store = made.store()
            assert list(store.samples) == [run.samples[number] for number in sorted(run.samples)]
            assert store.keys == run.keys and len(store) == len(run.samples)
            for number in run.samples:
                for key in run.keys:
                    assert same(store.read(number, *key), run.rows(number, key))

    @pytest.mark.slow
    @given(data=st.data())
    @settings(max_examples=60)
    def test_any_tokens_are_those_that_indexing_gives(
        self, place: Callable[[Run, Path], Place], data: st.DataObject
    ) -> None:
        with tempfile.TemporaryDirectory(dir=FAST) as folder:
            made = place(SMALL, Path(folder))
            SMALL.write(made.sink)
            store, rows = made.store(), SMALL.rows(2, ("resid_mid", 1))
            edge = st.one_of(st.none(), st.integers(-40, 40))
            step = data.draw(st.one_of(st.none(), st.integers(1, 5)))
            where = slice(data.draw(edge), data.draw(edge), step)
            assert same(store.read(2, "resid_mid", 1, tokens=where), rows[where])
            places = data.draw(st.lists(st.integers(0, 29), max_size=8))
            assert same(store.read(2, "resid_mid", 1, tokens=places), rows[places])
            backwards = range(29, data.draw(st.integers(-1, 29)), -3)
            assert same(store.read(2, "resid_mid", 1, tokens=backwards), rows[list(backwards)])

    def test_samples_of_one_length_are_one_tensor(self, place: type[Place], tmp_path: Path) -> None:
        run = Run(resid(), [[(1, 2, 9), (0, 5, 9)]])
        made = place(run, tmp_path)
        run.write(made.sink)
        found = made.store()["resid_mid", 1]
        assert isinstance(found, torch.Tensor)
        assert same(found, torch.stack([run.rows(0, ("resid_mid", 1)), run.rows(1, ("resid_mid", 1))]))

    def test_samples_of_several_lengths_are_a_list(self, place: type[Place], tmp_path: Path) -> None:
        made = place(SMALL, tmp_path)
        SMALL.write(made.sink)
        found = made.store()["blocks.1.hook_resid_mid"]
        assert isinstance(found, list)
        assert all(same(part, SMALL.rows(number, ("resid_mid", 1))) for number, part in enumerate(found))

    def test_texts_tokens_points_and_layers(self, place: type[Place], tmp_path: Path) -> None:
        made = place(SMALL, tmp_path)
        SMALL.write(made.sink)
        store = made.store()
        assert store.texts == [SMALL.samples[number].text for number in range(3)]
        assert store.tokens == [SMALL.samples[number].token_ids for number in range(3)]
        assert store.points == ("resid_pre", "resid_mid") and store.layers == (0, 1)

    def test_an_open_sample_cannot_be_read(self, place: type[Place], tmp_path: Path) -> None:
        made = place(SMALL, tmp_path)
        made.sink.write(Activation(0, "resid_pre", 0, 0, torch.zeros(2, 16)))
        store = made.store()
        assert len(store) == 0 and store["resid_pre", 0] == []
        with raises(SelectionError, "sample 0", "no finished samples"):
            store.read(0, "resid_pre", 0)

    def test_norms_are_the_mean_length_of_rows(self, place: type[Place], tmp_path: Path) -> None:
        made = place(SMALL, tmp_path)
        SMALL.write(made.sink)
        rows = torch.cat([SMALL.rows(number, ("resid_pre", 0)) for number in range(3)]).double()
        assert made.store().norms("resid_pre", 0) == pytest.approx((rows**2).sum(1).sqrt().mean().item(), rel=1e-6)

    def test_one_long_row_and_rows_that_are_not_finite_are_told(self, place: type[Place], tmp_path: Path) -> None:
        made = place(SMALL, tmp_path)
        rows = {key: torch.ones(5, 16) for key in SMALL.keys}
        rows["resid_mid", 1][0] = 100
        rows["resid_mid", 1][3, 2], rows["resid_mid", 1][4, 0] = torch.inf, torch.nan
        for (point, layer), tensor in rows.items():
            made.sink.write(Activation(0, point, layer, 0, tensor))
        made.sink.finish(Sample(0, "a", "b", (1, 2, 3, 4, 5, 6), 5, 5))
        store = made.store()
        found = store.row_norms("resid_mid", 1)
        assert (found.rows, found.not_finite, found.first_not_finite) == (3, 2, (0, 3))
        assert (found.mean, found.median, found.largest) == pytest.approx((408 / 3, 4, 400))
        assert found.share == pytest.approx(400 / 408)
        assert math.isnan(store.norms("resid_mid", 1)) and store.row_norms("resid_mid", 0).not_finite == 0

    def test_a_row_of_large_numbers_has_a_norm(self, place: type[Place], tmp_path: Path) -> None:
        """Their squares are beyond float32."""
        made = place(SMALL, tmp_path)
        for point, layer in SMALL.keys:
            made.sink.write(Activation(0, point, layer, 0, torch.full((1, 16), 1e30)))
        made.sink.finish(Sample(0, "a", "b", (1, 2), 1, 1))
        assert made.store().norms("resid_pre", 0) == pytest.approx(4e30)

    def test_what_is_read_is_the_callers_own(self, place: type[Place], tmp_path: Path) -> None:
        made = place(SMALL, tmp_path)
        SMALL.write(made.sink)
        store = made.store()
        store.read(0, "resid_pre", 0).zero_()
        assert same(store.read(0, "resid_pre", 0), SMALL.rows(0, ("resid_pre", 0)))

    def test_a_sample_may_have_no_rows(self, place: type[Place], tmp_path: Path) -> None:
        made = place(SMALL, tmp_path)
        made.sink.finish(Sample(0, "", "", (1,), 1, 0))
        SMALL.write(made.sink, skip=frozenset({0, 1}))
        store = made.store()
        assert store.read(0, "resid_pre", 0).shape == (0, 16) and len(store.read(2, "resid_pre", 0)) == 30

    @pytest.mark.parametrize(
        ("write", "message"),
        [
            (Activation(0, "resid_pre", 0, 3, torch.zeros(1, 16)), "expected the rows from 2 on, got rows from 3 on"),
            (Activation(0, "resid_pre", 0, 1, torch.zeros(1, 16)), "expected the rows from 2 on, got rows from 1 on"),
            (Activation(0, "resid_pre", 7, 0, torch.zeros(1, 16)), "resid_pre.7 is not captured here: .*resid_mid.1"),
            (
                Activation(0, "resid_pre", 0, 2, torch.zeros(1, 17)),
                r"expected rows of .* \[16\], as before, got .*\[17\]",
            ),
            (Activation(0, "resid_pre", 0, 2, torch.zeros(1, 16).half()), "float32.*got torch.float16"),
            (Activation(0, "resid_mid", 0, 0, torch.zeros(16)), r"expected \[tokens, d\], got shape \[16\]"),
        ],
    )
    def test_rows_that_do_not_fit_are_refused(
        self, place: type[Place], tmp_path: Path, write: Activation, message: str
    ) -> None:
        made = place(SMALL, tmp_path)
        made.sink.write(Activation(0, "resid_pre", 0, 0, torch.zeros(2, 16)))
        with pytest.raises(CaptureError, match=message):
            made.sink.write(write)
        made.store()

    def test_a_sample_with_missing_rows_is_refused(self, place: type[Place], tmp_path: Path) -> None:
        made = place(SMALL, tmp_path)
        for key in SMALL.keys[:-1]:
            made.sink.write(Activation(0, *key, 0, torch.zeros(2, 16)))
        with raises(CaptureError, "should have 2 rows of each tensor: resid_mid.1 has 0."):
            made.sink.finish(Sample(0, "", "", (1, 2, 3), 1, 2))
        made.store()

    def test_nothing_comes_after_the_end_of_a_sample(self, place: type[Place], tmp_path: Path) -> None:
        made = place(SMALL, tmp_path)
        SMALL.write(made.sink)
        with raises(CaptureError, "sample 0 is finished and gets rows"):
            made.sink.write(Activation(0, "resid_pre", 0, 7, torch.zeros(1, 16)))
        with raises(CaptureError, "finished twice"):
            made.sink.finish(SMALL.samples[0])
        made.store()

    @pytest.mark.parametrize(
        ("ask", "message"),
        [
            (lambda store: store.read(3, "resid_pre", 0), "sample 3 is not in this capture: .* 0 to 2"),
            (lambda store: store["resid_pre", 5], "does not hold resid_pre of layer 5. It holds .* layers 0, 1"),
            (lambda store: store["resid_post", 0], "does not hold resid_post of layer 0. Did you mean resid_"),
            (lambda store: store.read(0, "resid_pre"), "tensor of each layer: say which"),
            (lambda store: store["residmid", 0], "did you mean resid_mid"),
            (
                lambda store: store.read(0, "resid_pre", 0, tokens=[7]),
                "positions 7 are not in sample 0: it has rows 0 to 6",
            ),
            (lambda store: store.read(0, "resid_pre", 0, tokens=range(-2, 3)), "positions -2 are not in sample 0"),
            (lambda store: store.read(0, "resid_pre", 0, tokens=3), "tokens must be a slice"),
            (lambda store: store.read(0, "resid_pre", 0, 3), "resid_pre of layer 0 has no call 3"),
            (lambda store: store.read(0, "resid_pre", "0"), "layer '0' is not a whole number"),
        ],
    )
    def test_what_is_not_there_is_refused_with_what_is(
        self, place: type[Place], tmp_path: Path, ask: Callable[[Store], object], message: str
    ) -> None:
        made = place(SMALL, tmp_path)
        SMALL.write(made.sink)
        store = made.store()
        with pytest.raises(SelectionError, match=message):
            ask(store)


def written(run: Run, path: Path) -> CaptureStore:
    with FolderWriter.create(path, run.manifest) as writer:
        run.write(writer)
    return open_store(path)


class TestTheFolder:
    """The format, held against the safetensors package, the json module and the kernel."""

    @pytest.mark.slow
    @given(run=runs())
    @settings(max_examples=40)
    def test_the_safetensors_package_reads_the_same_rows(self, run: Run) -> None:
        with tempfile.TemporaryDirectory(dir=FAST) as folder:
            path = Path(folder) / "capture"
            assert written(run, path).verify() == []
            names = [tensor["name"] for tensor in json.loads((path / "manifest.json").read_text())["tensors"]]
            for line in map(json.loads, (path / "samples.jsonl").read_text().splitlines()):
                for place, (name, key) in enumerate(zip(names, run.keys, strict=True)):
                    parts = []
                    for shard, first, end, row, start, rows in line["spans"]:
                        if first <= place < end:
                            assert start == sum(map(len, parts))
                            with safe_open(path / "shards" / f"{shard:06d}.safetensors", "pt") as file:
                                parts.append(file.get_slice(name)[row : row + rows].clone())
                    assert same(torch.cat(parts), run.rows(line["sample"], key))

    def test_no_row_lies_in_two_places_and_none_is_wasted(self, tmp_path: Path) -> None:
        run = Run(resid(width=64), [[(0, 3, 40), (1, 7, 9)], [(2, 1, 33)]])
        store = written(run, tmp_path / "c")
        rows = sum(sample.rows for sample in run.samples.values())
        tensors = 0
        for file in (tmp_path / "c" / "shards").iterdir():
            with safe_open(file, "pt") as shard:
                tensors += sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118 - no mapping
        assert tensors == rows * 4 * 64 * 2 == store.describe()["bytes"]

    @pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts a process's reads")
    def test_reading_rows_reads_their_bytes_and_a_header(self, tmp_path: Path) -> None:
        run = Run(resid(layers=8, width=512), [[(0, 4, 600)]], shard_tokens=256)
        store = written(run, tmp_path / "c")
        store.sample(0)  # the table's line, once
        before = _bytes_read()
        assert same(store.read(0, "resid_mid", 5, tokens=slice(100, 110)), run.rows(0, ("resid_mid", 5))[100:110])
        cold = _bytes_read() - before
        store.read(0, "resid_mid", 5, tokens=slice(100, 110))
        warm = _bytes_read() - before - cold
        assert warm < 10 * 512 * 2 + 1000  # 10 rows; the rest is /proc/self/io itself
        assert cold - warm < 3000  # the header of the one shard that holds them, of 0.8 MB

    def test_shards_end_with_the_pass_that_fills_them(self, tmp_path: Path) -> None:
        run = Run(resid(), [[(0, 3, 50), (1, 7, 40)]], shard_tokens=16)
        written(run, tmp_path / "c")
        for file in sorted((tmp_path / "c" / "shards").iterdir())[:-1]:
            with safe_open(file, "pt") as shard:
                rows = {shard.get_slice(name).get_shape()[0] for name in shard.keys()}  # noqa: SIM118
            assert len(rows) == 1 and 16 <= rows.pop() <= 17

    def test_a_long_prompt_is_written_tensor_by_tensor(self, tmp_path: Path) -> None:
        run = Run(resid(layers=8, width=64), [[(0, 500, 502)]], shard_tokens=16, shard_bytes=100_000)
        written(run, tmp_path / "c")
        sizes = [file.stat().st_size for file in (tmp_path / "c" / "shards").iterdir()]
        assert max(sizes) < 2 * 100_000 + 500 * 64 * 2  # not the 1 MB of the pass

    def test_only_json_and_safetensors_are_in_it(self, tmp_path: Path) -> None:
        written(SMALL, tmp_path / "c")
        assert {Path(name).suffix for name in tree(tmp_path / "c")} == {".json", ".jsonl", ".safetensors"}

    def test_describe_is_plain_data(self, tmp_path: Path) -> None:
        found = json.loads(json.dumps(written(SMALL, tmp_path / "c").describe()))
        assert found["finished"] and found["samples"] == 3 and found["rows"] == 43
        first = found["tensors"][0]
        assert (first["name"], first["dtype"], first["shape"]) == ("resid_pre.0", "BF16", [43, 16])
        assert first["mean_norm"] == pytest.approx(open_store(tmp_path / "c").norms("resid_pre", 0))
        assert found["texts"][2]["text"] == SMALL.samples[2].text
        assert found["bytes_on_disk"] == sum(map(len, tree(tmp_path / "c").values()))

    def test_a_store_in_memory_is_written_whole(self, tmp_path: Path) -> None:
        memory = MemoryStore(SMALL.keys)
        SMALL.write(memory)
        write_store(memory, tmp_path / "c", SMALL.manifest)
        store = open_store(tmp_path / "c")
        assert store.finished and list(store.samples) == list(memory.samples)
        assert all(same(store.read(2, *key), SMALL.rows(2, key)) for key in SMALL.keys)

    def test_a_view_does_not_keep_what_it_is_a_view_of(self) -> None:
        whole, buffer = torch.zeros(1000, 16), Buffer([("resid_pre", 0)], 256, 2**20)
        buffer.add(Activation(0, "resid_pre", 0, 0, whole[:1]))
        whole += 1  # neither its memory nor its values
        [[rows]] = [block.pieces for block in buffer.blocks()]
        assert rows.untyped_storage().nbytes() == 64 and not rows.any()


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


class TestBeginning:
    """A folder is taken only where nothing can be lost by it."""

    def test_a_folder_with_other_things_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("x")
        with raises(StoreError, "is not empty and is no capture: it holds thesis.tex", "-o DIR"):
            FolderWriter.create(tmp_path, SMALL.manifest)
        assert tree(tmp_path) == {"thesis.tex": b"x"}

    def test_a_capture_is_not_overwritten(self, tmp_path: Path) -> None:
        written(SMALL, tmp_path / "c")
        before = tree(tmp_path / "c")
        with raises(StoreError, "already holds a capture", "--resume", "hookmap inspect"):
            FolderWriter.create(tmp_path / "c", SMALL.manifest)
        assert tree(tmp_path / "c") == before

    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_text("x")
        with raises(StoreError, "is a file"):
            FolderWriter.create(tmp_path / "f", SMALL.manifest)

    def test_what_a_killed_beginning_left_is_no_obstacle(self, tmp_path: Path) -> None:
        (tmp_path / "shards").mkdir()
        (tmp_path / "samples.jsonl").touch()
        (tmp_path / ".manifest.json.tmp").write_text('{"form')
        assert written(SMALL, tmp_path).verify() == []

    def test_resume_needs_a_capture(self, tmp_path: Path) -> None:
        with raises(StoreError, "expected a folder", "hookmap capture"):
            FolderWriter.resume(tmp_path / "none", SMALL.manifest)

    def test_resume_names_every_difference(self, tmp_path: Path) -> None:
        written(SMALL, tmp_path / "c")
        before = tree(tmp_path / "c")
        other = Run(resid(layers=3), SMALL.batches, shard_tokens=9, settings={"seed": 1, "top_p": 0.9})
        with pytest.raises(StoreError) as caught:
            FolderWriter.resume(tmp_path / "c", other.manifest.model_copy(update={"model": "gpt2"}))
        for line in (
            'model: the capture has "tiny", this run has "gpt2"',
            "layers: the capture has [0, 1], this run has [0, 1, 2]",
            "shard_tokens: the capture has 8, this run has 9",
            "settings.seed: the capture has 0, this run has 1",
            'settings.top_p: the capture has "nothing", this run has 0.9',
        ):
            assert f"  - {line}\n" in str(caught.value)
        assert tree(tmp_path / "c") == before

    def test_a_difference_inside_the_settings_is_named_alone(self, tmp_path: Path) -> None:
        ours, other = (
            SMALL.manifest.model_copy(update={"settings": {"generation": {"a": 1, "n": n}}}) for n in (4, 64)
        )
        with FolderWriter.create(tmp_path / "c", ours) as writer:
            SMALL.write(writer)
        with pytest.raises(StoreError) as caught:
            FolderWriter.resume(tmp_path / "c", other)
        assert "  - settings.generation.n: the capture has 4, this run has 64\n" in str(caught.value)

    def test_a_capture_with_a_map_of_schema_1_is_resumed_under_the_same_map(self, tmp_path: Path) -> None:
        old = hybrid()
        before = SMALL.manifest.model_copy(update={"map": old})
        today = SMALL.manifest.model_copy(update={"map": parse(old).to_document()})
        with FolderWriter.create(tmp_path / "c", before) as writer:
            SMALL.write(writer)
        with FolderWriter.resume(tmp_path / "c", today):
            pass
        other = {**old, "kinds": [{**kind, "norm_placement": "post"} for kind in old["kinds"]]}
        with raises(StoreError, 'map.kinds.parallel.norm_placement: the capture has "pre"'):
            FolderWriter.resume(tmp_path / "c", before.model_copy(update={"map": parse(other).to_document()}))

    def test_a_place_that_cannot_be_written_is_not_said_to_be_full(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with raises(StoreError, "cannot write to", "Nothing was written") as caught:
            FolderWriter.create(tmp_path / "file" / "c", SMALL.manifest)
        assert "room" not in str(caught.value) and "kept" not in str(caught.value)

    def test_two_writers_at_once_are_refused(self, tmp_path: Path) -> None:
        with FolderWriter.create(tmp_path / "c", SMALL.manifest) as writer:
            SMALL.write(writer)
            with raises(StoreError, "is being written by another process"):
                FolderWriter.resume(tmp_path / "c", SMALL.manifest)

    def test_resuming_a_finished_capture_changes_nothing(self, tmp_path: Path) -> None:
        written(SMALL, tmp_path / "c")
        before = tree(tmp_path / "c")
        with FolderWriter.resume(tmp_path / "c", SMALL.manifest) as writer:
            assert writer.finished == {0, 1, 2}
            assert not open_store(tmp_path / "c").finished
        assert tree(tmp_path / "c") == before

    def test_a_run_under_other_versions_is_told(self, tmp_path: Path) -> None:
        manifest = SMALL.manifest.model_copy(update={"versions": ({"torch": "1.0"},)})
        with FolderWriter.create(tmp_path / "c", manifest):
            pass
        with FolderWriter.resume(tmp_path / "c", SMALL.manifest):
            pass
        assert open_store(tmp_path / "c").manifest.versions == ({"torch": "1.0"}, *SMALL.manifest.versions)

    def test_it_cannot_be_finished_with_open_samples(self, tmp_path: Path) -> None:
        with (
            raises(StoreError, "cannot be closed as finished: samples [4] are not"),
            FolderWriter.create(tmp_path / "c", SMALL.manifest) as writer,
        ):
            writer.write(Activation(4, "resid_pre", 0, 0, torch.zeros(2, 16)))
        assert not open_store(tmp_path / "c").finished


@pytest.mark.parametrize("url", ["s3://bucket/run", "memory://run", "file:///tmp/run"])
def test_a_url_to_write_to_is_refused_and_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with raises(StoreError, "local folders only"):
        FolderWriter.create(url, manifest_of_run([("resid_pre", 0)], model="m"))
    assert not list(tmp_path.iterdir())


def unsigned(table: bytes) -> bytes:
    """Without the lines' own checksums, as an older table is: what is wrong inside a line is met then."""
    return re.sub(rb', "crc32": \d+', b"", table)


def _edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes())) and None


FIRST = "shards/000000.safetensors"


class TestDamage:
    """Nothing torn is readable as good, and the message says what to do."""

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: (path / "manifest.json").unlink(), "is not a capture: it has no manifest.json"),
            (_edit("manifest.json", lambda text: text[:100]), r"manifest\.json is broken: expected JSON"),
            (_edit("manifest.json", lambda text: b"[]"), "expected format 'hookmap-capture', found a list"),
            (
                _edit("manifest.json", lambda text: text.replace(b'"format_version": 1', b'"format_version": 4')),
                "expected format_version 1 or 2 or 3, found 4.*pip install -U hookmap",
            ),
            (_edit("manifest.json", lambda text: text.replace(b'"BF16"', b'"BF17"')), "tensors.0.*BF17"),
            (_edit("manifest.json", lambda text: text.replace(b'"layers"', b'"leyers"')), "(?s)layers.*leyers"),
            (_edit("samples.jsonl", lambda text: text[:-1]), "expected 3 samples of 43 rows, found 2 of 13"),
            (_edit("samples.jsonl", lambda text: b"x" + text), "line 1 is broken"),
            (lambda path: (path / "samples.jsonl").unlink(), r"samples\.jsonl is missing"),
        ],
    )
    def test_a_broken_folder_does_not_open(self, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
        written(SMALL, tmp_path / "c")
        damage(tmp_path / "c")
        with pytest.raises(StoreError, match=message):
            open_store(tmp_path / "c")

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: (path / FIRST).unlink(), "a shard that the table of samples names, found no such file"),
            (_edit(FIRST, lambda data: data[:-1]), r"expected \d+ bytes, as its header says, found \d+ bytes"),
            (_edit(FIRST, lambda data: data[:5]), "expected a safetensors header"),
            (_edit(FIRST, lambda data: b"\xff" * 8 + data[8:]), "expected a safetensors header"),
            (
                _edit(FIRST, lambda data: data[:8] + b"[" + data[9:]),
                "a safetensors header, found one that does not parse",
            ),
            (
                _edit(FIRST, lambda data: data.replace(b"resid_mid.1", b"resid_mid.7")),
                "expected it.*found no such tensor",
            ),
            (
                _edit(FIRST, lambda data: data.replace(b"BF16", b"F16 ")),
                "a safetensors header, found one that does not",
            ),
            (_edit(FIRST, lambda data: data.replace(b'"BF16"', b'"F16" ')), "expected BF16 rows.*found F16"),
            (
                _edit("samples.jsonl", lambda text: unsigned(text).replace(b'"prompt":', b'"Prompt":')),
                "line 1 is broken.*'prompt'",
            ),
            (
                _edit(
                    "samples.jsonl", lambda text: unsigned(text).replace(b"[0, 0, 4, 3, 0, 5]", b"[0, 0, 4, 5, 0, 5]")
                ),
                "found 8",
            ),
        ],
    )
    def test_broken_rows_are_not_read_and_verify_tells(
        self, tmp_path: Path, damage: Callable[[Path], None], message: str
    ) -> None:
        written(SMALL, tmp_path / "c")
        damage(tmp_path / "c")
        store = open_store(tmp_path / "c")
        with pytest.raises(StoreError, match=message):
            [store.read(number, "resid_mid", 1) for number in range(3)]
        assert store.verify()

    @pytest.mark.slow
    def test_verify_finds_every_changed_byte(self, tmp_path: Path) -> None:
        written(SMALL, tmp_path / "c")
        chance = random.Random(0)
        for name, whole in tree(tmp_path / "c").items():
            if name == "manifest.json":
                continue
            for place in chance.sample(range(len(whole)), 25):
                changed = bytearray(whole)
                changed[place] ^= 1 << chance.randrange(8)
                (tmp_path / "c" / name).write_bytes(changed)
                try:
                    store = open_store(tmp_path / "c")
                except StoreError:
                    continue  # found already
                assert store.verify(), (name, place)
            (tmp_path / "c" / name).write_bytes(whole)
        assert open_store(tmp_path / "c").verify() == []

    def test_verify_tells_all_problems_at_once(self, tmp_path: Path) -> None:
        written(Run(resid(), [[(number, 3, 9)] for number in range(4)]), tmp_path / "c")
        (tmp_path / "c" / "shards" / "000001.safetensors").unlink()
        (tmp_path / "c" / "shards" / ".000009.safetensors.tmp").touch()
        _edit(FIRST, lambda data: data[:-1] + bytes([data[-1] ^ 1]))(tmp_path / "c")
        found = open_store(tmp_path / "c").verify()
        assert len(found) == 3
        assert "000000.safetensors was changed" in found[0] and "no such file" in found[1] and "left over" in found[2]

    def test_a_damaged_capture_is_not_resumed(self, tmp_path: Path) -> None:
        written(SMALL, tmp_path / "c")
        (tmp_path / "c" / FIRST).unlink()
        with raises(StoreError, "missing or cut short, the first is 000000", "hookmap inspect"):
            FolderWriter.resume(tmp_path / "c", SMALL.manifest)


def test_importing_the_package_of_stores_imports_no_torch() -> None:
    code = "import sys, hookmap.stores; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_both_sinks_are_sinks() -> None:
    def typed(sink: Sink) -> None: ...

    typed(MemoryStore(SMALL.keys))


def test_pieces_of_any_size_make_the_file_that_the_whole_makes(tmp_path: Path) -> None:
    whole = torch.randn(300, 64).bfloat16()
    sums = set()
    for number, sizes in enumerate([[300], [128, 172], [1, 128, 171], [128, 129, 43], [1] * 300]):
        path = tmp_path / f"{number}.safetensors"
        blocks = [Block("resid_pre.0", 300, torch.split(whole, sizes)), Block("z.1", 2, [whole[:2]])]
        info = write_shard(path, blocks).info(0)
        with safe_open(path, "pt") as file:
            assert same(file.get_tensor("resid_pre.0"), whole) and same(file.get_tensor("z.1"), whole[:2])
        assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and info.bytes == path.stat().st_size
        sums.add(info.sha256)
    assert len(sums) == 1
