"""Repair keeps every sample that is right and no other; merge keeps every sample once."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from click.testing import CliRunner
from support.raises import raises
from support.store_runs import Run, demo_run, resid, tree, write_or_resume

from hookmap.activations import Sample, Sink
from hookmap.cli.main import main
from hookmap.errors import StoreError
from hookmap.stores import open_store
from hookmap.stores.copying import merge, repair
from hookmap.stores.folder import FolderWriter
from hookmap.stores.shard import read_header

RUN = Run(resid(), [[(0, 3, 7), (1, 5, 6)], [(2, 2, 30)], [(3, 1, 4), (4, 2, 2)], [(5, 4, 9)]], shard_tokens=12)
"""shards: 0 and 1 of the first batch, 2 to 4 of the second, 5 of the third, 6 of the last"""


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    write_or_resume(tmp_path / "c", RUN)
    return tmp_path / "c"


def change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def drop_line(path: Path, number: int) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:number], "garbage\n", *lines[number + 1 :]]))


DAMAGES: dict[str, tuple[Callable[[Path], None], set[int], str]] = {
    "a changed byte": (lambda c: change_byte(c / "shards/000005.safetensors"), {3, 4}, "was changed"),
    "a missing shard": (lambda c: (c / "shards/000003.safetensors").unlink(), {2}, "no such file"),
    "a shard cut short": (lambda c: change_cut(c / "shards/000006.safetensors"), {5}, "is broken"),
    "a broken line": (lambda c: drop_line(c / "samples.jsonl", 1), {1}, "samples.jsonl, line 2 is broken"),
    "a line that ends its group": (lambda c: drop_line(c / "samples.jsonl", 4), {4}, "line 5 is broken"),
    "a wrong span": (lambda c: edit(c / "samples.jsonl", "[3, 0, 4, 0, ", "[3, 0, 4, 1, "), {2}, "expected"),
    "no checksum": (lambda c: drop_line(c / "shards.jsonl", 0), {0, 1}, "has no checksum of shard 0"),
    "a torn end": (lambda c: change_cut(c / "samples.jsonl"), {5}, ""),
    "a strange file": (lambda c: (c / "shards/000099.safetensors").write_bytes(b"?"), set(), ""),
}


def change_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def rows_are_right(path: Path, expected: set[int]) -> None:
    store = open_store(path)
    assert store.verify() == []
    assert {sample.sample for sample in store.samples} == expected
    for sample in store.samples:
        assert sample == RUN.samples[sample.sample]
        for key in RUN.keys:
            assert torch.equal(store.read(sample.sample, *key), RUN.rows(sample.sample, key))


def test_a_sound_capture_is_repaired_into_itself(capture: Path, tmp_path: Path) -> None:
    found = repair(capture, tmp_path / "new")
    assert (found.kept, found.lost) == (6, {})
    rows_are_right(tmp_path / "new", set(RUN.samples))
    assert open_store(tmp_path / "new").finished


@pytest.mark.parametrize("name", DAMAGES)
def test_repair_keeps_what_is_right_and_tells_what_is_not(capture: Path, tmp_path: Path, name: str) -> None:
    damage, lost, reason = DAMAGES[name]
    damage(capture)
    before = tree(capture)
    found = repair(capture, tmp_path / "new")
    rows_are_right(tmp_path / "new", set(RUN.samples) - lost)
    assert found.kept == 6 - len(lost) and reason in " ".join(found.lost.values())
    assert tree(capture) == before, "the damaged capture stays as it is"
    if found.lost:
        assert not open_store(tmp_path / "new").finished
        with FolderWriter.resume(tmp_path / "new", RUN.manifest) as writer:
            missing = [[one for one in batch if one[0] in lost] for batch in RUN.batches]
            replace(RUN, batches=[batch for batch in missing if batch]).write(writer)
        rows_are_right(tmp_path / "new", set(RUN.samples))


@pytest.mark.parametrize("lines", [5, 3, 1, 0])
@pytest.mark.parametrize("finished", [True, False])
def test_a_table_that_is_cut_is_told_and_its_copy_is_not_finished(
    capture: Path, tmp_path: Path, lines: int, finished: bool
) -> None:
    """Cut between two lines, between two groups too: what is left looks whole. The manifest knows better."""
    if not finished:
        capture = tmp_path / "open"
        with pytest.raises(KeyboardInterrupt), FolderWriter.create(capture, RUN.manifest) as writer:
            RUN.write(writer)
            raise KeyboardInterrupt
    table = (capture / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (capture / "samples.jsonl").write_bytes(b"".join(table[:lines]))
    with raises(StoreError, "expected 6 samples of 58 rows, found", "hookmap store repair"):
        open_store(capture)
    whole = lines if finished else {5: 5, 3: 3, 1: 0, 0: 0}[lines]  # a group counts whole while it is written
    found = repair(capture, tmp_path / "new")
    assert (found.kept, found.missing, found.lost) == (whole, 6 - whole, {})
    assert "expected 6 samples of 58 rows" in " ".join(found.changed)
    rows_are_right(tmp_path / "new", set(range(whole)))
    assert not open_store(tmp_path / "new").finished
    code, text = run("repair", capture, "-o", tmp_path / "again")
    assert code == 0 and f"lost {6 - whole}" in text and "changed: " in text and "--resume" in text


@pytest.mark.slow
def test_a_line_that_was_altered_is_lost_and_no_other(capture: Path, tmp_path: Path) -> None:
    """Every byte of the table in turn: no altered line is taken for a sample, whatever was altered."""
    table = (capture / "samples.jsonl").read_bytes()
    ends = [place for place, byte in enumerate(table) if byte == ord("\n")]
    chance = random.Random(0)
    for number, place in enumerate(chance.sample(range(len(table)), 40)):
        broken = bytearray(table)
        broken[place] ^= 1 << chance.randrange(7)
        (capture / "samples.jsonl").write_bytes(broken)
        hit = sum(end < place for end in ends)
        new = tmp_path / str(number)
        try:
            found = repair(capture, new)
        except StoreError:
            assert broken[place] == ord("\n") or place in ends
            continue
        kept = {sample.sample for sample in open_store(new).samples}
        assert kept >= set(RUN.samples) - {hit, hit + 1}  # two, where the line's end was hit, or one was made
        rows_are_right(new, kept)
        assert not open_store(new).finished and (found.lost or found.missing or kept == set(RUN.samples))
        assert found.changed


def test_an_altered_table_is_not_gone_on_with(tmp_path: Path) -> None:
    """Going on would put a fresh checksum under it."""
    with pytest.raises(KeyboardInterrupt), FolderWriter.create(tmp_path / "c", RUN.manifest) as writer:
        replace(RUN, batches=RUN.batches[:2]).write(writer)
        raise KeyboardInterrupt
    edit(tmp_path / "c" / "samples.jsonl", '"prompt": "prompt 1', '"prompt": "prompt 7')
    before = tree(tmp_path / "c")
    with pytest.raises(StoreError, match=r"samples.jsonl, line 2 is not as it was written.*hookmap store repair"):
        FolderWriter.resume(tmp_path / "c", RUN.manifest)
    assert tree(tmp_path / "c") == before
    assert "line 2 is broken" in open_store(tmp_path / "c").verify()[0]


def test_a_capture_is_repaired_from_where_it_is(capture: Path, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.put(str(capture), "/away/c", recursive=True)
    assert repair("memory://away/c", tmp_path / "new").kept == 6
    rows_are_right(tmp_path / "new", set(RUN.samples))
    system.rm("/away", recursive=True)
    code, text = run("repair", "memory://away/c", "-o", tmp_path / "none")
    assert code == 1 and "memory://away/c is not a capture" in text
    code, text = run("repair", capture, "-o", "memory://away/d")
    assert code == 1 and "is a URL: captures are written to local folders only" in text


def test_every_damage_at_once(capture: Path, tmp_path: Path) -> None:
    change_byte(capture / "shards/000005.safetensors")
    drop_line(capture / "samples.jsonl", 0)
    found = repair(capture, tmp_path / "new")
    assert set(found.lost) == {"line 1", "sample 3", "sample 4"}
    rows_are_right(tmp_path / "new", {1, 2, 5})


def test_what_nothing_can_be_known_of_is_refused(capture: Path, tmp_path: Path) -> None:
    (capture / "samples.jsonl").unlink()
    with raises(StoreError, "samples.jsonl is missing"):
        repair(capture, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_samples_of_an_unfinished_run_stay_unfinished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), FolderWriter.create(tmp_path / "c", RUN.manifest) as writer:
        replace(RUN, batches=RUN.batches[:2]).write(writer)
        raise KeyboardInterrupt
    assert repair(tmp_path / "c", tmp_path / "new").kept == 3
    assert not open_store(tmp_path / "new").finished


# --- merge -----------------------------------------------------------------------------------------------------------


def part(path: Path, batches: list[int], **changes: object) -> Path:
    run = replace(RUN, batches=[RUN.batches[n] for n in batches], **changes)
    write_or_resume(path, run)
    return path


def test_parts_of_a_run_are_merged_into_the_run(capture: Path, tmp_path: Path) -> None:
    first = part(tmp_path / "a", [0, 2], settings={"seed": 0, "prompts": 3, "prompts_sha256": "x"})
    second = part(tmp_path / "b", [1, 3], settings={"seed": 0, "prompts": 2, "prompts_sha256": "y"})
    found = merge([first, second], tmp_path / "m")
    assert (found.samples, found.duplicates, found.renumbered) == (6, [], False)
    rows_are_right(tmp_path / "m", set(RUN.samples))
    shards = {file.name: read_header(file) for file in (tmp_path / "m" / "shards").iterdir()}
    assert len(shards) == 6, "batches stay batches, so shards stay as large"


def test_a_sample_that_comes_twice_is_kept_once_and_told(tmp_path: Path) -> None:
    first, second = part(tmp_path / "a", [0, 1]), part(tmp_path / "b", [1, 2])
    found = merge([first, second], tmp_path / "m")
    assert found.samples == 5 and found.duplicates == [f"sample 2 of {second} is sample 2 of {first}"]
    rows_are_right(tmp_path / "m", {0, 1, 2, 3, 4})


class Named:
    """A sink that gives each sample an id, and another number."""

    def __init__(self, sink: Sink, shift: int) -> None:
        self.sink, self.shift = sink, shift

    def write(self, activation: object) -> None:
        self.sink.write(replace(activation, sample=activation.sample - self.shift))

    def finish(self, sample: Sample) -> None:
        self.sink.finish(replace(sample, sample=sample.sample - self.shift, id=f"q/{sample.sample}"))


def test_workers_that_number_alike_keep_their_ids(tmp_path: Path) -> None:
    for name, batches, shift in (("a", [0, 1], 0), ("b", [2, 3], 3), ("d", [3], 5)):
        with FolderWriter.create(tmp_path / name, RUN.manifest) as writer:
            replace(RUN, batches=[RUN.batches[n] for n in batches]).write(Named(writer, shift))
    found = merge([tmp_path / "a", tmp_path / "b", tmp_path / "d"], tmp_path / "m")
    assert found.samples == 6 and found.renumbered
    assert found.duplicates == [f"sample 0 of {tmp_path / 'd'} (id q/5) is sample 2 of {tmp_path / 'b'} (id q/5)"]
    store = open_store(tmp_path / "m")
    assert store.verify() == [] and [sample.sample for sample in store.samples] == list(range(6))
    for number in RUN.samples:
        found_number = store.by_id(f"q/{number}").sample
        for key in RUN.keys:
            assert torch.equal(store.read(found_number, *key), RUN.rows(number, key))


def named(path: Path, batches: list[int], id_of: Callable[[int], str | None], **changes: object) -> Path:
    """Samples of RUN, under ids of our own."""

    class Renaming:
        def __init__(self, sink: Sink) -> None:
            self.write, self.sink = sink.write, sink

        def finish(self, sample: Sample) -> None:
            self.sink.finish(replace(sample, id=id_of(sample.sample), **changes))

    with FolderWriter.create(path, RUN.manifest) as writer:
        replace(RUN, batches=[RUN.batches[n] for n in batches]).write(Renaming(writer))
    return path


def ids_and_rows(path: Path) -> set[tuple[str | None, bytes]]:
    store = open_store(path)
    assert store.verify() == []
    return {(s.id, store.read(s.sample, "resid_mid", 1).view(torch.int16).numpy().tobytes()) for s in store.samples}


def test_an_id_of_different_samples_loses_none(tmp_path: Path) -> None:
    """Every sample of four prompts was once two of them, whatever their prompts were."""
    first = named(tmp_path / "a", [0], lambda n: f"q{n}")
    second = named(tmp_path / "b", [2], lambda n: f"q{n - 3}")
    taken = named(tmp_path / "d", [3], lambda n: "q0.2")
    with raises(StoreError, "ids are of different samples:", "sample 3", "has the id of sample 0 of") as error:
        merge([first, second], tmp_path / "m", same_ids="refuse")
    assert "sample 4" in str(error.value) and not (tmp_path / "m").exists()
    found = merge([first, second, taken], tmp_path / "m")
    assert found.samples == 5 and not found.duplicates and len(found.renamed) == 2
    store = open_store(tmp_path / "m")
    assert [sample.id for sample in store.samples] == ["q0", "q1", "q0.3", "q1.2", "q0.2"]
    for sample, number in zip(store.samples, (0, 1, 3, 4, 5), strict=True):
        assert torch.equal(store.read(sample.sample, "resid_mid", 1), RUN.rows(number, ("resid_mid", 1)))


@pytest.mark.parametrize("id", ["q", None])
def test_one_capture_with_an_id_twice_loses_none(tmp_path: Path, id: str | None) -> None:
    first = named(tmp_path / "a", [0, 1, 2, 3], lambda n: id)
    assert merge([first], tmp_path / "m").samples == 6
    assert {rows for _, rows in ids_and_rows(tmp_path / "m")} == {rows for _, rows in ids_and_rows(first)}
    found = merge([first, first], tmp_path / "twice")
    assert found.samples == 6 and len(found.duplicates) == 6


def test_a_sample_with_other_labels_is_another_one(tmp_path: Path) -> None:
    first = named(tmp_path / "a", [0], lambda n: f"q{n}", labels={"y": 1, "z": 2})
    again = named(tmp_path / "b", [0], lambda n: f"q{n}", labels={"z": 2, "y": 1})
    other = named(tmp_path / "d", [0], lambda n: f"q{n}", labels={"y": 0, "z": 2})
    found = merge([first, again, other], tmp_path / "m")
    assert found.samples == 4 and len(found.duplicates) == 2
    store = open_store(tmp_path / "m")
    assert store.by_id("q0").labels == {"y": 1, "z": 2} and store.by_id("q0.2").labels == {"y": 0, "z": 2}


def test_captures_of_different_runs_are_refused_with_every_difference(tmp_path: Path) -> None:
    first = part(tmp_path / "a", [0])
    other = part(tmp_path / "b", [1], settings={"seed": 1})
    wide = part(tmp_path / "w", [1], tensors=resid(width=32))
    with pytest.raises(StoreError) as error:
        merge([first, other, wide], tmp_path / "m")
    assert f"{other}: settings.seed: the capture has 0, this run has 1" in str(error.value)
    assert f"{wide}: resid_pre.0: the first has BF16 rows of [16], this one BF16 rows of [32]" in str(error.value)
    assert not (tmp_path / "m").exists()


def test_merging_a_part_that_is_not_finished_gives_no_finished_capture(tmp_path: Path) -> None:
    first, second = part(tmp_path / "a", [0]), tmp_path / "b"
    with pytest.raises(KeyboardInterrupt), FolderWriter.create(second, RUN.manifest) as writer:
        replace(RUN, batches=RUN.batches[1:2]).write(writer)
        raise KeyboardInterrupt
    merge([first, second], tmp_path / "m")
    assert not open_store(tmp_path / "m").finished


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["store", *map(str, arguments)])
    return done.exit_code, done.output


def test_the_command_verifies_and_repairs(capture: Path, tmp_path: Path) -> None:
    assert run("verify", capture)[0] == 0
    change_byte(capture / "shards/000005.safetensors")
    code, text = run("verify", capture)
    assert code == 1 and "000005.safetensors was changed" in text and "hookmap store repair" in text
    code, text = run("repair", capture, "-o", tmp_path / "new")
    assert code == 0 and "lost: sample 3: " in text and "kept 4 samples" in text and "--resume" in text
    assert run("verify", tmp_path / "new")[0] == 0


def test_the_command_merges(tmp_path: Path) -> None:
    first, second = part(tmp_path / "a", [0]), part(tmp_path / "b", [0, 1])
    code, text = run("merge", first, second, "-o", tmp_path / "m", "--json")
    assert code == 0 and '"samples": 3' in text and f"sample 0 of {second} is sample 0 of {first}" in text
    code, text = run("merge", first, "-o", second)
    assert code == 1 and "already holds a capture" in text


@pytest.mark.slow
def test_a_large_capture_is_copied_with_its_batches(tmp_path: Path) -> None:
    write_or_resume(tmp_path / "c", demo_run())
    repair(tmp_path / "c", tmp_path / "new")
    table = (tmp_path / "c" / "samples.jsonl").read_text(), (tmp_path / "new" / "samples.jsonl").read_text()
    assert table[0].count('"left": 0') == table[1].count('"left": 0')
    shutil.rmtree(tmp_path / "c")
    assert len(open_store(tmp_path / "new")) == len(demo_run().samples)
