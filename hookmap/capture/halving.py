"""Rows that run together, and in smaller parts where memory runs out."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Row = TypeVar("Row")


def in_parts(rows: Sequence[Row], run: Callable[[Sequence[Row]], Sequence[Row]], most: int | None = None) -> int | None:
    """Run all rows, together or in parts of at most `most`. Returns the size of part to begin with next time.

    run: runs a part and returns the rows that must run again because memory ran out, in order; none where all is done.
    From then on parts have half as many rows as had to run again. It never returns a single row: it raises, or gives
    the row up.
    """
    waiting = list(rows)
    while waiting:
        part = waiting[:most]
        again = run(part)
        waiting = [*again, *waiting[len(part) :]]
        if again:
            most = len(again) // 2
    return most
