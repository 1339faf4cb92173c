"""A set of whole numbers, kept as ranges: ten million consecutive samples are one range."""

import bisect
from collections.abc import Iterable, Iterator, MutableSet, Sequence

import numpy as np


class NumberSet(MutableSet[int]):
    """Behaves as a set of ints. Memory grows with the gaps between the numbers, not with their count."""

    def __init__(self, numbers: "Iterable[int]" = ()) -> None:
        """An array, in any order, is added in one step: ten million numbers in a second."""
        found = np.asarray(numbers) if isinstance(numbers, Sequence) else np.fromiter(numbers, np.int64)
        if (found[1:] <= found[:-1]).any():
            found = np.unique(found)
        breaks = np.flatnonzero(found[1:] - found[:-1] != 1)
        # Two lists: the first number of each range, and the number after its last.
        self._starts: list[int] = found[np.concatenate([[0], breaks + 1])].tolist() if len(found) else []
        self._stops: list[int] = (found[np.concatenate([breaks, [-1]])] + 1).tolist() if len(found) else []

    @classmethod
    def of_ranges(cls, ranges: Iterable[tuple[int, int]]) -> "NumberSet":
        """What `ranges` gives, as a set again."""
        return cls([number for first, last in ranges for number in range(first, last + 1)])

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        place = bisect.bisect_right(self._starts, number) - 1
        return place >= 0 and number < self._stops[place]

    def __iter__(self) -> Iterator[int]:
        """Ascending."""
        for start, stop in zip(self._starts, self._stops, strict=True):
            yield from range(start, stop)

    def __len__(self) -> int:
        return sum(self._stops) - sum(self._starts)

    def __repr__(self) -> str:
        shown = ", ".join(f"{a}–{b - 1}" for a, b in zip(self._starts[:8], self._stops[:8], strict=True))
        return f"NumberSet({shown}{', …' if len(self._starts) > 8 else ''})"

    def add(self, value: int) -> None:
        """A number between two ranges joins them."""
        place = bisect.bisect_right(self._starts, value)  # of the first range after it
        if place and value < self._stops[place - 1]:
            return
        before = place > 0 and self._stops[place - 1] == value
        after = place < len(self._starts) and self._starts[place] == value + 1
        if before and after:
            self._stops[place - 1] = self._stops.pop(place)
            del self._starts[place]
        elif before:
            self._stops[place - 1] += 1
        elif after:
            self._starts[place] -= 1
        else:
            self._starts.insert(place, value)
            self._stops.insert(place, value + 1)

    def discard(self, value: int) -> None:
        """Removing a number inside a range splits it."""
        if value not in self:
            return
        place = bisect.bisect_right(self._starts, value) - 1
        start, stop = self._starts[place], self._stops[place]
        left = [(a, b) for a, b in ((start, value), (value + 1, stop)) if a < b]
        self._starts[place : place + 1] = [a for a, _ in left]
        self._stops[place : place + 1] = [b for _, b in left]

    def update(self, numbers: Iterable[int]) -> None:
        """Add all of these."""
        if self._starts:
            for number in numbers:
                self.add(number)
        else:
            made = NumberSet(numbers)
            self._starts, self._stops = made._starts, made._stops

    def ranges(self) -> list[tuple[int, int]]:
        """The first and the last number of each range, ascending."""
        return [(start, stop - 1) for start, stop in zip(self._starts, self._stops, strict=True)]

    def copy(self) -> "NumberSet":
        """Another set of the same numbers."""
        made = NumberSet()
        made._starts, made._stops = self._starts.copy(), self._stops.copy()
        return made
