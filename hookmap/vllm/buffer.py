"""Rows of the requests that run, each in a slot of its own until its request ends. Knows no vLLM."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hookmap.activations import Key
from hookmap.errors import CaptureError
from hookmap.stores.ledger import tensor_name

_FIRST = 256
"""slots of a new slab; it doubles when it is full"""


class Chosen:
    """Some slots, in the order of the rows that are for them."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = np.array(numbers, dtype=np.intp)
        self.needed = max(numbers, default=-1) + 1
        """how many slots there must be"""


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


def _as_bytes(rows: torch.Tensor) -> npt.NDArray[Any]:
    """[n, ...] as [n]: the bytes of each row."""
    flat = rows.flatten(1).view(torch.uint8).numpy()
    return flat.view(f"V{flat.shape[1]}")[:, 0]


class Slabs:
    """For each point, one tensor [slots, ...] on the host. It is as large as the requests that ran together were."""

    def __init__(self) -> None:
        self.slabs: dict[Key, torch.Tensor] = {}
        self._rows: dict[Key, npt.NDArray[Any]] = {}
        """of each slab, its rows as so many bytes: NumPy copies each at once, in a third of PyTorch's time"""

    def put(self, key: Key, slots: Chosen, rows: torch.Tensor) -> None:
        """Keep a copy of `rows`, [n, ...], in these slots."""
        slab = self.slabs.get(key)
        if slab is None or len(slab) < slots.needed:
            size = max(_FIRST, slots.needed, 2 * len(slab) if slab is not None else 0)
            grown = torch.empty(size, *rows.shape[1:], dtype=rows.dtype)
            if slab is not None:
                grown[: len(slab)] = slab
            slab = self.slabs[key] = grown
            self._rows[key] = _as_bytes(grown)
        if slab.shape[1:] != rows.shape[1:] or slab.dtype != rows.dtype:
            raise CaptureError(f"{tensor_name(key)}: rows of {list(rows.shape[1:])} follow {list(slab.shape[1:])}.")
        self._rows[key][slots.numbers] = _as_bytes(rows.to("cpu").contiguous())

    def get(self, key: Key, slots: Sequence[int]) -> torch.Tensor:
        """A copy of the rows in these slots. Raises KeyError where the point has never been seen."""
        slab = self.slabs[key]
        rows = torch.from_numpy(self._rows[key][np.array(slots, dtype=np.intp)].view(np.uint8))
        return rows.view(slab.dtype).reshape(len(slots), *slab.shape[1:])

    @property
    def nbytes(self) -> int:
        """Of all slabs."""
        return sum(slab.nbytes for slab in self.slabs.values())

    def size_of(self, keys: Iterable[Key], count: int) -> int:
        """Bytes of so many slots of these points."""
        return sum(count * self.slabs[key][0].nbytes for key in keys if key in self.slabs)
