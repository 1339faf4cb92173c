"""The table of samples as it is indexed, held against reading it line by line."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookmap.activations import Sample
from hookmap.errors import StoreError
from hookmap.stores import table_index
from hookmap.stores.table import Entry, Span, Table, encode_group
from hookmap.stores.table_index import scan

TEXTS = st.sampled_from(["", "plain", 'say "id": "a"', "\\", 'é "\n"id": "b', '"id": "'])
IDS = st.sampled_from([None, "", "a", "b", 'q"uote', "back\\slash", "é", '"id": "a"'])
LABELS = st.sampled_from([None, {"id": "a"}, {"x": {"id": "b"}, "y": 'the "id": "a"'}])


def sample(number: int, text: str = "", id: str | None = None, labels: dict[str, object] | None = None) -> Sample:
    return Sample(number, text, text, (1, 2, 3), 2, rows=number % 7, id=id, labels=labels)


def lines(groups: list[list[Sample]]) -> bytes:
    made = []
    for shard, group in enumerate(groups):
        entries = [Entry(each, (Span(shard, 0, 1, 0, 0, each.rows),)) for each in group]
        made.append(encode_group(entries, shard + 1))
    return b"".join(made)


def one_by_one(data: bytes) -> tuple[list[int], list[int], int, int, int]:
    """What of a table counts, as docs/store.md says it: numbers, offsets, size, shards, rows."""
    numbers: list[int] = []
    offsets: list[int] = []
    size = shards = rows = offset = 0
    waiting: list[tuple[int, int, int]] = []
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        found = json.loads(line)
        waiting.append((found["sample"], offset, found["rows"]))
        offset += len(line)
        if found["left"] == 0:
            numbers += [each[0] for each in waiting]
            offsets += [each[1] for each in waiting]
            size, shards, rows = offset, found["shards"], rows + sum(each[2] for each in waiting)
            waiting = []
    return numbers, offsets, size, shards, rows


GROUPS = st.lists(st.lists(st.integers(0, 10**17), min_size=1, max_size=5), max_size=6)


@pytest.mark.slow
@settings(max_examples=60)
@given(GROUPS, st.integers(0, 3000), st.integers(1, 700), st.data())
def test_a_scan_finds_what_reading_line_by_line_finds(
    groups: list[list[int]], torn: int, block: int, data: st.DataObject
) -> None:
    whole = lines([[sample(number, data.draw(TEXTS)) for number in group] for group in groups])
    text = whole[: max(0, len(whole) - torn)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_index, "BLOCK_BYTES", block)
        path = Path(folder, "samples.jsonl")
        path.write_bytes(text)
        found = scan(path)
        assert (list(found.numbers), list(found.offsets), found.size, found.shards, found.rows) == one_by_one(text)
        path.write_bytes(whole)
        again = scan(path, found)  # as the writer goes on from what it knows
        assert (list(again.numbers), list(again.offsets), again.size, again.shards, again.rows) == one_by_one(whole)


@pytest.mark.parametrize(
    "wrong",
    [b"\n", b"{}\n", b'{"sample": , "left": 0, "shards": 1, "rows": 1, "x": 1}\n', b"x" * 300 + b"\n",
     b'{"sample": -1, "left": 0, "shards": 1, "rows": 1, "x": 1}\n',
     b'{"sample": 1, "left": 0, "rows": 1, "shards": 1}\n',
     b'{"sample": 12345678901234567890123, "left": 0, "shards": 1, "rows": 1, "x": 1}\n'],
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_line_that_does_not_begin_as_one_is_named(tmp_path: Path, wrong: bytes, place: int) -> None:
    good = lines([[sample(number)] for number in range(7)]).splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_bytes(b"".join([*good[:place], wrong, *good[place:]]))
    with pytest.raises(StoreError, match=re.escape(f"line {place + 1} is broken")):
        scan(tmp_path / "samples.jsonl")


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXTS, IDS, LABELS), max_size=8), st.randoms(), st.integers(1, 700))
def test_samples_are_found_by_number_and_by_id_whatever_their_texts_say(
    told: list[tuple[str, str | None, dict[str, object] | None]], order: object, block: int
) -> None:
    samples = [sample(number, *each) for number, each in enumerate(told)]
    mixed = samples.copy()
    order.shuffle(mixed)  # type: ignore[attr-defined]
    torn = lines([[sample(99, id="a")]])[:-1]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_index, "BLOCK_BYTES", block)
        path = Path(folder, "samples.jsonl")
        path.write_bytes(lines([[each] for each in mixed]) + torn)
        found = Table(path)
        assert list(found) == samples and [found[place] for place in range(len(samples))] == samples
        assert [entry.sample for entry in found.entries()] == samples
        for id in ("", "a", "b", 'q"uote', "back\\slash", "é", '"id": "a"', "none"):
            assert found.with_id(id) == [each.sample for each in samples if each.id == id], id


def test_an_id_of_a_line_that_does_not_count_is_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(lines([[sample(number, id=f"q/{number}", labels={"id": "q/7"})] for number in range(4)]))
    kept = scan(path)
    del kept.numbers[1], kept.offsets[1]  # as a repair leaves out a line
    found = Table(path, kept)
    assert [found.with_id(f"q/{number}") for number in range(4)] == [[0], [], [2], [3]]
    path.write_bytes(lines([[sample(5, labels={"id": "q/7"})]]))
    assert Table(path).with_id("q/7") == [], "an id among the labels is a label"
