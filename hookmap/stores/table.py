"""The two tables of a capture, JSON Lines: samples and shards. Lines are only ever added.

Samples that were open together are committed together: each line says how many lines of its group are `left`, and a
group without its last line does not count. So a torn end of the table is no special case, and a resumed run starts
again with the whole batch, whose numbers depend on who was in it (padding, shapes of the matrix products).
"""

import bisect
import itertools
import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from hookmap.activations import Sample
from hookmap.errors import StoreError
from hookmap.stores.location import Location
from hookmap.stores.shard import ShardInfo

SAMPLES = "samples.jsonl"
SHARDS = "shards.jsonl"

OPTIONAL = ("positions", "id", "labels")
"""fields of a sample that stand in its line only where there is something to say"""

# A line begins with these, so that a table is indexed without parsing texts and tokens.
_START = re.compile(rb'\{"sample": (\d+), "left": (\d+), "shards": (\d+), "rows": (\d+), ')


class Span(NamedTuple):
    """Where rows of one sample are: in one shard, alike in a run of consecutive tensors."""

    shard: int
    first: int
    """place, in the manifest's list of tensors, of the first tensor that this is said of"""
    end: int
    """place after the last"""
    row: int
    """the first of the rows, in the shard's tensor"""
    start: int
    """which row of the sample that is"""
    rows: int


@dataclass(frozen=True)
class Entry:
    """One line of the table of samples."""

    sample: Sample
    spans: tuple[Span, ...]


@dataclass
class Committed:
    """What of the table of samples counts: the groups that are whole."""

    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    """of the samples, as they stand in the table"""
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    """of their lines, in bytes"""
    size: int = 0
    """bytes of the table that count"""
    shards: int = 0
    rows: int = 0


def encode_group(entries: Sequence[Entry], shards: int) -> bytes:
    """The lines of samples that are committed together; `shards`: how many the capture has with them."""
    lines = []
    for left, entry in zip(reversed(range(len(entries))), entries, strict=True):
        sample = entry.sample
        line = {
            "sample": sample.sample,
            "left": left,
            "shards": shards,
            "rows": sample.rows,
            "prompt_tokens": sample.prompt_tokens,
            "prompt": sample.prompt,
            "text": sample.text,
            "token_ids": sample.token_ids,
            "spans": entry.spans,
            **{name: value for name in OPTIONAL if (value := getattr(sample, name)) is not None},
        }
        lines.append(json.dumps(line) + "\n")
    return "".join(lines).encode("ascii")


def scan(path: Location, known: Committed | None = None) -> Committed:
    """The groups of the table that are whole, from `known` on. Raises StoreError where a line inside is broken."""
    committed = Committed() if known is None else known
    numbers: list[int] = []
    offsets: list[int] = []
    rows = 0
    try:
        with path.open("rb") as file:
            offset = file.seek(committed.size)
            for line in file:
                start = _START.match(line)
                if not line.endswith(b"\n"):
                    break
                if start is None:
                    raise broken_line(path, len(committed.numbers) + len(numbers) + 1, "it does not begin as one")
                number, left, shards, count = map(int, start.groups())
                numbers.append(number)
                offsets.append(offset)
                offset, rows = offset + len(line), rows + count
                if not left:
                    committed.numbers.extend(numbers)
                    committed.offsets.extend(offsets)
                    committed.size, committed.shards, committed.rows = offset, shards, committed.rows + rows
                    numbers, offsets, rows = [], [], 0
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: expected the table of samples. Copy the whole folder again.") from error
    return committed


def left_of(line: bytes) -> int | None:
    """How many lines of its group are left after this one; None where it does not begin as a line does."""
    start = _START.match(line)
    return int(start[2]) if start else None


def decode_entry(line: bytes, path: Location, number: int) -> Entry:
    """One line of the table of samples. Raises StoreError that names the line where it is broken."""
    try:
        found = json.loads(line)
        sample = Sample(
            sample=_whole(found["sample"]),
            prompt=_text(found["prompt"]),
            text=_text(found["text"]),
            token_ids=tuple(map(_whole, found["token_ids"])),
            prompt_tokens=_whole(found["prompt_tokens"]),
            rows=_whole(found["rows"]),
            positions=_positions(found),
            id=None if found.get("id") is None else _text(found["id"]),
            labels=_labels(found.get("labels")),
        )
        return Entry(sample, tuple(Span(*map(_whole, span)) for span in found["spans"]))
    except (ValueError, KeyError, TypeError) as error:
        raise broken_line(path, number, repr(error)) from error


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number, found {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found {value!r}")
    return value


def _positions(found: Mapping[str, Any]) -> tuple[int, ...] | Literal["mean"] | None:
    value = found.get("positions")
    if value is None:
        return None
    if value == "mean":
        return "mean"
    positions = tuple(map(_whole, value))
    if len(positions) != found["rows"] or any(a >= b for a, b in itertools.pairwise(positions)):
        raise ValueError(f"expected {found['rows']} ascending positions, found {len(positions)}: {positions[:5]}")
    return positions


def _labels(value: Any) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"expected labels by name, found {value!r}")
    return value


def broken_line(path: Location, number: int, found: str) -> StoreError:
    return StoreError(
        f"{path}, line {number} is broken: expected a line as docs/store.md says, found {found}.\n"
        f"See every problem of this capture: hookmap inspect {path.parent} --verify"
    )


class Table(Sequence[Sample]):
    """The finished samples by number, each read from disk when it is asked for."""

    def __init__(self, path: Location, committed: Committed | None = None) -> None:
        """`committed`: which lines count, where that is known already."""
        self.path = path
        self.committed = scan(path) if committed is None else committed
        places = range(len(self.committed.numbers))
        self._order = array("q", sorted(places, key=self.committed.numbers.__getitem__))
        self.numbers = array("q", (self.committed.numbers[place] for place in self._order))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[p] for p in range(*place.indices(len(self)))]
        return self._entry(self._order[place]).sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[place] for place in range(len(self)))

    def entry(self, number: int) -> Entry | None:
        """The line of the sample with this number, or None where there is none."""
        place = bisect.bisect_left(self.numbers, number)
        if place == len(self.numbers) or self.numbers[place] != number:
            return None
        return self._entry(self._order[place])

    def groups(self) -> Iterator[list[int]]:
        """The numbers of samples that were committed together, as they stand in the table."""
        group: list[int] = []
        before = 0
        with self.path.open("rb") as file:
            for number, offset in zip(self.committed.numbers, self.committed.offsets, strict=True):
                file.seek(offset)
                left = left_of(file.readline()) or 0
                if group and left >= before:
                    yield group
                    group = []
                group.append(number)
                before = left
        if group:
            yield group

    def _entry(self, line: int) -> Entry:
        with self.path.open("rb") as file:
            file.seek(self.committed.offsets[line])
            return decode_entry(file.readline(), self.path, line + 1)


def encode_shards(shards: Sequence[ShardInfo]) -> bytes:
    """Lines of the table of shards."""
    return "".join(json.dumps(asdict(shard)) + "\n" for shard in shards).encode("ascii")


def read_shards(path: Location, count: int) -> Iterator[tuple[ShardInfo, int]]:
    """The first `count` lines of the table of shards, each with the offset of its end. Raises StoreError."""
    end = number = 0
    try:
        with path.open("rb") as file:
            while number < count and (line := file.readline()).endswith(b"\n"):
                end += len(line)
                yield decode_shard(line, path, number), end
                number += 1
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: expected the table of shards. Copy the whole folder again.") from error
    if number < count:
        raise StoreError(f"{path} is cut short: expected {count} shards, as {SAMPLES} says, found {number}.")


def decode_shard(line: bytes, path: Location, number: int) -> ShardInfo:
    """One line of the table of shards, which is of shard `number`. Raises StoreError where it is not."""
    try:
        found = json.loads(line)
        info = ShardInfo(_whole(found["shard"]), _whole(found["bytes"]), _text(found["sha256"]))
        if info.shard != number:
            raise ValueError(f"expected shard {number}, found shard {info.shard}")
        return info
    except (ValueError, KeyError, TypeError) as error:
        raise broken_line(path, number + 1, repr(error)) from error
