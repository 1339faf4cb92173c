"""Rows of the requests that run, each in a slot of its own until its request ends. Knows no vLLM."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hookmap.activations import Key
from hookmap.errors import CaptureError
from hookmap.stores.ledger import tensor_name

_FIRST = 256
"""slots of a new slab; it doubles when it is full"""
_BLOCK = 256
"""rows that are summed at once: where they are summed stays in the processor's cache"""


def side_by_side(numbers: Sequence[int]) -> slice | None:
    """From where to where they are; None where they do not follow each other, and where there are none."""
    if not numbers or list(numbers) != list(range(numbers[0], numbers[0] + len(numbers))):
        return None
    return slice(numbers[0], numbers[-1] + 1)


class Chosen:
    """Some slots, in the order of the rows that are for them."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = np.array(numbers, dtype=np.intp)
        self.needed = max(numbers, default=-1) + 1
        """how many slots there must be"""
        self._given = numbers

    @cached_property
    def side_by_side(self) -> slice | None:
        """See the function; asked only where rows are kept."""
        return side_by_side(self._given)


class Slots:
    """Numbers of rows; those of a request that has ended are given to others."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._next = 0

    def take(self, count: int) -> list[int]:
        """So many numbers that nobody has."""
        left = max(0, len(self._free) - count)
        taken = self._free[left:]
        del self._free[left:]
        new = range(self._next, self._next + count - len(taken))
        self._next = new.stop
        taken += new
        return taken

    def give_back(self, numbers: Sequence[int]) -> None:
        """Nobody needs these any more."""
        self._free.extend(numbers)
        if len(self._free) == self._next:  # nobody has any: the next ones follow each other again
            self._free, self._next = [], 0


def _as_bytes(rows: torch.Tensor) -> npt.NDArray[Any]:
    """[n, ...] as [n]: the bytes of each row."""
    flat = rows.flatten(1).view(torch.uint8).numpy()
    return flat.view(f"V{flat.shape[1]}")[:, 0]


def sum_of(shares: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum, each added to those before it."""
    total, *others = shares
    for each in others:
        total = total + each
    return total


def _add(shares: Sequence[torch.Tensor], total: torch.Tensor) -> None:
    """Write their sum, as `sum_of` makes it, into `total`; there are several."""
    first, *others = shares
    for each in others:
        first = torch.add(first, each, out=total)


def _alike(shares: Sequence[torch.Tensor]) -> bool:
    """Whether they are on the host, and of one form."""
    first = shares[0]
    return first.device.type == "cpu" and all(
        each.shape == first.shape and each.dtype == first.dtype for each in shares[1:]
    )


class Slabs:
    """For each point, one tensor [slots, ...] on the host. It is as large as the requests that ran together were."""

    def __init__(self) -> None:
        self.slabs: dict[Key, torch.Tensor] = {}
        self._rows: dict[Key, npt.NDArray[Any]] = {}
        """of each slab, its rows as so many bytes: NumPy copies each at once, in a third of PyTorch's time"""
        self._scratch: dict[tuple[torch.dtype, torch.Size], tuple[torch.Tensor, npt.NDArray[Any]]] = {}
        """where rows of a form are summed, and their bytes"""

    def put(self, key: Key, slots: Chosen, shares: Sequence[torch.Tensor]) -> None:
        """Keep the sum of `shares`, each [n, ...], in these slots."""
        if not _alike(shares):
            shares = [sum_of(shares).to("cpu")]
        rows = self._room(key, slots.needed, shares[0])
        if slots.side_by_side is not None and len(shares) > 1:
            _add(shares, self.slabs[key][slots.side_by_side])
            return
        count = shares[0].shape[0]  # `len` of a tensor is Python, and slow
        if count <= _BLOCK:
            rows[slots.numbers] = self._sum(shares)
            return
        for start in range(0, count, _BLOCK):
            stop = start + _BLOCK
            rows[slots.numbers[start:stop]] = self._sum([each[start:stop] for each in shares])

    def _room(self, key: Key, needed: int, like: torch.Tensor) -> npt.NDArray[Any]:
        """The point's rows as bytes, at least so many. Raises CaptureError for rows of another form."""
        slab = self.slabs.get(key)
        held = 0 if slab is None else slab.shape[0]
        if slab is None or held < needed:
            grown = torch.empty(max(_FIRST, needed, 2 * held), *like.shape[1:], dtype=like.dtype)
            if slab is not None:
                grown[:held] = slab
            slab = self.slabs[key] = grown
            self._rows[key] = _as_bytes(grown)
        if slab.shape[1:] != like.shape[1:] or slab.dtype != like.dtype:
            raise CaptureError(f"{tensor_name(key)}: rows of {list(like.shape[1:])} follow {list(slab.shape[1:])}.")
        return self._rows[key]

    def _sum(self, shares: Sequence[torch.Tensor]) -> npt.NDArray[Any]:
        """The sum of these rows as bytes, until the next call: memory that is new each time would cost more than it."""
        first = shares[0]
        if len(shares) == 1:
            return _as_bytes(first.contiguous())
        form = (first.dtype, first.shape[1:])
        if form not in self._scratch:
            scratch = torch.empty(_BLOCK, *first.shape[1:], dtype=first.dtype)
            self._scratch[form] = scratch, _as_bytes(scratch)
        scratch, as_bytes = self._scratch[form]
        count = first.shape[0]
        _add(shares, scratch[:count])
        return as_bytes[:count]

    def get(self, key: Key, slots: Chosen) -> torch.Tensor:
        """A copy of the rows in these slots. Raises KeyError where the point has never been seen."""
        slab = self.slabs[key]
        rows = torch.from_numpy(self._rows[key][slots.numbers].view(np.uint8))
        return rows.view(slab.dtype).reshape(len(slots.numbers), *slab.shape[1:])

    @property
    def nbytes(self) -> int:
        """Of all slabs."""
        return sum(slab.nbytes for slab in self.slabs.values())

    def size_of(self, keys: Iterable[Key], count: int) -> int:
        """Bytes of so many slots of these points."""
        return sum(count * self.slabs[key][0].nbytes for key in keys if key in self.slabs)
