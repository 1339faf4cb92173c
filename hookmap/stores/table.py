"""The two tables of a capture, JSON Lines: samples and shards. Lines are only ever appended.

Which lines count, and where each begins: table_index.
"""

import bisect
import itertools
import json
import re
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from hookmap.activations import Sample
from hookmap.documents import read_json
from hookmap.errors import StoreError
from hookmap.stores.location import Location, reading
from hookmap.stores.shard import ShardInfo
from hookmap.stores.table_index import Committed, Vector, blocks, broken_line, left_of, scan

SAMPLES = "samples.jsonl"
SHARDS = "shards.jsonl"

OPTIONAL = ("positions", "id", "labels", "image_positions", "pictures", "encoder_token_ids")
"""fields of a sample that its line has only where they are set"""

_CHECKSUM = b', "crc32": '

_ID = re.compile(rb'"id": ("(?:[^"\\\n]|\\.)*")')


class Span(NamedTuple):
    """Where rows of one sample are: in one shard, at the same place in a run of consecutive tensors."""

    shard: int
    first: int
    """index, in the manifest's list of tensors, of the first tensor of the run"""
    end: int
    """index after the last"""
    row: int
    """the first of the rows, in the shard's tensor"""
    start: int
    """which row of the sample this is"""
    rows: int


@dataclass(frozen=True)
class Entry:
    """One line of the table of samples."""

    sample: Sample
    spans: tuple[Span, ...]


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
        body = json.dumps(line).encode("ascii")[:-1]
        lines.append(b"%b%b%d}\n" % (body, _CHECKSUM, zlib.crc32(body)))
    return b"".join(lines)


def is_intact(line: bytes) -> bool | None:
    """Whether a line of the table of samples is as it was written; None where it has no checksum."""
    body, mark, rest = line.rpartition(_CHECKSUM)
    return rest == b"%d}\n" % zlib.crc32(body) if mark else None


def altered_line(path: Location, size: int) -> int | None:
    """Number, from 1, of the first altered line in the first `size` bytes of the table; None where none is."""
    with reading(path), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if (size := size - len(line)) < 0:
                return None
            if is_intact(line) is False:
                return number
    return None


def decode_entry(line: bytes, path: Location, number: int) -> Entry:
    """One line of the table of samples. Raises StoreError that names the line where it is broken."""
    try:
        if is_intact(line) is False:
            raise ValueError("another line than was written: its checksum differs")
        found = read_json(line)
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
            image_positions=_image_positions(found),
            pictures=_pictures(found.get("pictures")),
            encoder_token_ids=None if (ids := found.get("encoder_token_ids")) is None else tuple(map(_whole, ids)),
        )
        return Entry(sample, tuple(Span(*map(_whole, span)) for span in found["spans"]))
    except (ValueError, KeyError, TypeError) as error:
        raise broken_line(path, number, repr(error)) from error


def _plain(text: bytes) -> str:
    """The value of a JSON string; most have no escapes."""
    value = json.loads(text) if b"\\" in text else text[1:-1].decode()
    return str(value)


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


def _image_positions(found: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = found.get("image_positions")
    if value is None:
        return None
    positions = tuple(map(_whole, value))
    inside = not positions or positions[-1] < found["prompt_tokens"]
    if not inside or any(a >= b for a, b in itertools.pairwise(positions)):
        raise ValueError(f"expected ascending image_positions inside the prompt, found {positions[:5]}")
    return positions


def _pictures(value: Any) -> tuple[Mapping[str, str], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or any(not isinstance(each, dict) or "sha256" not in each for each in value):
        raise ValueError(f"expected pictures with a sha256, found {value!r:.80}")
    return tuple({name: _text(text) for name, text in each.items()} for each in value)


def _labels(value: Any) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"expected labels by name, found {value!r}")
    return value


class Table(Sequence[Sample]):
    """The finished samples by number, each read from disk on access."""

    def __init__(self, path: Location, committed: Committed | None = None) -> None:
        """`committed`: the index of the table, if it is known already."""
        self.path = path
        self.committed = scan(path) if committed is None else committed
        numbers = np.frombuffer(self.committed.numbers, np.int64)
        self.numbers, self._order = self.committed.numbers, None
        if (numbers[1:] < numbers[:-1]).any():  # batches that ended out of order, or a merge
            order = np.argsort(numbers, kind="stable")
            self._order = array("q", order.tobytes())
            self.numbers = array("q", numbers[order].tobytes())

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[p] for p in range(*place.indices(len(self)))]
        return self._entry(self._line(range(len(self))[place])).sample

    def __iter__(self) -> Iterator[Sample]:
        return (entry.sample for entry in self.entries())

    def entries(self) -> Iterator[Entry]:
        """The lines, by number of the sample."""
        with reading(self.path), self.path.open("rb") as file:
            for line in map(self._line, range(len(self))):
                if (offset := self.committed.offsets[line]) != file.tell():
                    file.seek(offset)
                yield decode_entry(file.readline(), self.path, line + 1)

    def entry(self, number: int) -> Entry | None:
        """The line of the sample with this number, or None where there is none."""
        place = bisect.bisect_left(self.numbers, number)
        if place == len(self.numbers) or self.numbers[place] != number:
            return None
        return self._entry(self._line(place))

    def with_id(self, id: str) -> list[int]:
        """Numbers of the samples with this id in the data set. The first call reads the table once."""
        lines = np.flatnonzero(self._hashes == hash(id)).tolist()
        found = (self._entry(line).sample for line in lines)
        return sorted(sample.sample for sample in found if sample.id == id)

    @cached_property
    def _hashes(self) -> Vector:
        """Hash of the first id in each line. It may be one inside the labels: `with_id` reads the line and compares."""
        offsets = np.frombuffer(self.committed.offsets, np.int64)
        hashes = np.zeros(len(offsets), np.int64)
        for block in blocks(self.path, 0):
            ends = np.flatnonzero(np.frombuffer(block.lines, np.uint8) == ord("\n"))
            starts = np.concatenate([np.zeros(1, np.int64), ends + 1])
            found = [(match.start(), hash(_plain(match[1]))) for match in _ID.finditer(block.lines)]
            places, values = np.array(found[::-1], np.int64).reshape(-1, 2).T  # the first of a line is set last
            begins = starts[np.searchsorted(starts, places, "right") - 1] + block.offset
            lines = np.searchsorted(offsets, begins)
            counts = lines < len(offsets)
            counts[counts] = offsets[lines[counts]] == begins[counts]  # or the id is in a line that does not count
            hashes[lines[counts]] = values[counts]
        return hashes

    def _line(self, place: int) -> int:
        return place if self._order is None else self._order[place]

    def groups(self) -> Iterator[list[int]]:
        """The numbers of samples that were committed together, in the order of the table."""
        group: list[int] = []
        before = 0
        with reading(self.path), self.path.open("rb") as file:
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
        with reading(self.path), self.path.open("rb") as file:
            file.seek(self.committed.offsets[line])
            return decode_entry(file.readline(), self.path, line + 1)


def encode_shards(shards: Sequence[ShardInfo]) -> bytes:
    """Lines of the table of shards."""
    return "".join(json.dumps(asdict(shard)) + "\n" for shard in shards).encode("ascii")


def read_shards(path: Location, count: int) -> Iterator[tuple[ShardInfo, int]]:
    """The first `count` lines of the table of shards, each with the offset of its end. Raises StoreError."""
    end = number = 0
    missing = StoreError(f"{path} is missing: expected the table of shards. Copy the whole folder again.")
    with reading(path, missing), path.open("rb") as file:
        while number < count and (line := file.readline()).endswith(b"\n"):
            end += len(line)
            yield decode_shard(line, path, number), end
            number += 1
    if number < count:
        raise StoreError(f"{path} is cut short: expected {count} shards, as {SAMPLES} says, found {number}.")


def decode_shard(line: bytes, path: Location, number: int) -> ShardInfo:
    """One line of the table of shards. Raises StoreError where it is not about shard `number`."""
    try:
        found = read_json(line)
        info = ShardInfo(_whole(found["shard"]), _whole(found["bytes"]), _text(found["sha256"]))
        if info.shard != number:
            raise ValueError(f"expected shard {number}, found shard {info.shard}")
        return info
    except (ValueError, KeyError, TypeError) as error:
        raise broken_line(path, number + 1, repr(error)) from error
