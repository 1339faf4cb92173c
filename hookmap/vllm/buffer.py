"""Rows of the requests that run, each in a slot of its own until its request ends. Knows no vLLM."""

from collections.abc import Sequence

import torch

from hookmap.activations import Key

_FIRST = 256
"""slots of a new slab; it doubles when it is full"""


class Slots:
    """Numbers of rows; those of a request that has ended are given to others."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._next = 0

    def take(self, count: int) -> list[int]:
        """So many numbers that nobody has."""
        reused = self._free[len(self._free) - count :] if count <= len(self._free) else self._free[:]
        del self._free[len(self._free) - len(reused) :]
        new = range(self._next, self._next + count - len(reused))
        self._next = new.stop
        return [*reused, *new]

    def give_back(self, numbers: Sequence[int]) -> None:
        """Nobody needs these any more."""
        self._free.extend(numbers)


class Slabs:
    """For each point, one tensor [slots, ...] on the host. It is as large as the requests that ran together were."""

    def __init__(self) -> None:
        self.slabs: dict[Key, torch.Tensor] = {}

    def put(self, key: Key, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep a copy of `rows`, [n, ...], in `slots`, [n]."""
        slab = self.slabs.get(key)
        needed = int(slots.max()) + 1 if len(slots) else 0
        if slab is None or len(slab) < needed:
            size = max(_FIRST, needed, 2 * len(slab) if slab is not None else 0)
            grown = torch.empty(size, *rows.shape[1:], dtype=rows.dtype)
            if slab is not None:
                grown[: len(slab)] = slab
            slab = self.slabs[key] = grown
        slab.index_copy_(0, slots, rows.to("cpu"))

    def get(self, key: Key, slots: Sequence[int]) -> torch.Tensor:
        """A copy of the rows in these slots. Raises KeyError where the point has never been seen."""
        return self.slabs[key].index_select(0, torch.tensor(slots, dtype=torch.long))
