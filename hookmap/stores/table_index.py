"""Which lines of the table of samples count, and where each begins, without parsing their texts and tokens.

Samples that were open together are committed together: each line says how many lines of its group are `left`, and a
group without its last line does not count. So a torn end of the table needs no special case, and a resumed run repeats
the whole batch: its numbers depend on which samples share it (padding, shapes of the matrix products).
"""

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hookmap.errors import StoreError
from hookmap.stores.location import Location, reading

Vector: TypeAlias = npt.NDArray[Any]

# How each line begins.
_START = re.compile(rb'\{"sample": (\d+), "left": (\d+), "shards": (\d+), "rows": (\d+), ')
_NAMES = (b'{"sample": ', b', "left": ', b', "shards": ', b', "rows": ', b", ")
_DIGITS = 18
"""the most that a number has: what an int64 holds"""
_LONGEST = sum(map(len, _NAMES)) + 4 * _DIGITS
BLOCK_BYTES = 4 * 2**20
"""bytes of the table that are read together: little memory, and one call of numpy for many lines"""


@dataclass
class Committed:
    """The lines of the table of samples that count: those of complete groups."""

    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    """of the samples, in the order of the table"""
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    """of their lines, in bytes"""
    size: int = 0
    """bytes of the table that count"""
    shards: int = 0
    rows: int = 0


def scan(path: Location, known: Committed | None = None) -> Committed:
    """The complete groups of the table, in `known` and after it. Raises StoreError where a line is broken."""
    committed = Committed() if known is None else known
    missing = StoreError(f"{path} is missing: expected the table of samples. Copy the whole folder again.")
    with reading(path, missing):
        for block in blocks(path, committed.size):
            starts, (numbers, left, shards, rows), right = _starts_of_lines(block)
            if not right.all():
                line = len(committed.numbers) + int(np.argmin(right)) + 1
                raise broken_line(path, line, "it does not begin as one")
            ends = np.flatnonzero(left == 0)
            if not len(ends):
                block.keep(0)
                continue
            last = int(ends[-1])
            whole = int(starts[last + 1]) if last + 1 < len(starts) else len(block.lines)
            committed.numbers.frombytes(numbers[: last + 1].tobytes())
            committed.offsets.frombytes((starts[: last + 1] + block.offset).tobytes())
            committed.size = block.offset + whole
            committed.shards = max(committed.shards, int(shards[: last + 1].max()))
            committed.rows += int(rows[: last + 1].sum())
            block.keep(whole)
    return committed


@dataclass
class Block:
    """Consecutive whole lines of the table."""

    lines: bytes
    offset: int
    """where the first begins in the table, in bytes"""
    used: int
    """bytes that the reader has done with"""

    def keep(self, used: int) -> None:
        """Only the first `used` bytes are done with: the next block begins with the others."""
        self.used = used


def blocks(path: Location, offset: int) -> Iterator[Block]:
    """The table from `offset` on; a torn line at its end is left out."""
    with path.open("rb") as file:
        file.seek(offset)
        rest = b""
        while data := file.read(max(BLOCK_BYTES, len(rest))):  # longer each time, for a group larger than a block
            data = rest + data
            end = data.rfind(b"\n") + 1
            block = Block(data[:end], offset, end)
            if end:
                yield block
            rest, offset = data[block.used :], offset + block.used


def _starts_of_lines(block: Block) -> "tuple[Vector, tuple[Vector, Vector, Vector, Vector], Vector]":
    """For each line: its first byte, its first four numbers, and whether it begins as a line must.

    Reads all lines at once, a character of each at a time: a table has millions, and a regular expression for each
    line takes three times as long.
    """
    data = np.frombuffer(block.lines + bytes(_LONGEST), np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
    at, right = starts.copy(), np.ones(len(starts), bool)
    numbers = []
    for place, name in enumerate(_NAMES):
        for byte in name:
            right &= data[at] == byte
            at += 1
        if place < 4:
            number, digits = _numbers_at(data, at)
            numbers.append(number)
            right &= digits
    return starts, (numbers[0], numbers[1], numbers[2], numbers[3]), right


def _numbers_at(data: "Vector", at: "Vector") -> "tuple[Vector, Vector]":
    """The number that begins at each place, and whether one does; moves `at` past it."""
    value = np.zeros(len(at), np.int64)
    going = found = data[at] - ord("0") < 10  # unsigned bytes: below "0" wraps around
    for _ in range(_DIGITS):
        if not going.any():
            break
        value = np.where(going, value * 10 + data[at] - ord("0"), value)
        at += going
        going = going & (data[at] - ord("0") < 10)
    return value, found & ~going


def left_of(line: bytes) -> int | None:
    """How many lines of its group are left after this one; None where it does not begin as a line does."""
    start = _START.match(line)
    return int(start[2]) if start else None


def broken_line(path: Location, number: int, found: str) -> StoreError:
    return StoreError(
        f"{path}, line {number} is broken: expected a line as docs/store.md says, found {found}.\n"
        f"See every problem of this capture: hookmap inspect {path.parent} --verify"
    )
