"""The rows of decoding: of all tensors that a forward pass of one column shows, copied together when it has shown them.

One copy of many small tensors costs a fraction of one for each. A tensor waits for it only where nothing writes over
it before. That is proved on its first pass: it is copied at once, too, and held against itself at the end of the pass.
What was changed there is never made to wait; of what waits, autograd's count of writes is held on every later pass.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Protocol

import torch

from hookmap.capture.engines.pass_rows import PassRows
from hookmap.errors import CaptureError
from hookmap.maps.selectors import Selector

BLOCK_BYTES = 2**18
"""of one tensor's rows in a block; 56 tensors of a small model need some 14 MB"""
BLOCK_PASSES = 64
_PAGES = sum(getattr(mmap, name, 0) for name in ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_POPULATE"))
"""pages of a block are the process's own, and there at once: a fault for each costs more than the block"""


class Taker(Protocol):
    """Gets the rows of one selector back."""

    selector: Selector

    def steps(self, passes: Sequence[PassRows], block: torch.Tensor) -> None:
        """`block`: [batch, passes, ...], which is written over afterwards; `passes`: which rows of each are kept."""


Shown = tuple[Taker, PassRows, torch.Tensor, int]
"""a tensor of the running pass, [batch, 1, ...]: the model's own where it waits, else a copy; and how often it was
written to, as autograd counts it, or -1"""


class StepRows:
    """Takes the tensors of one observer, pass by pass."""

    may_wait = False
    """whether nothing of hookmap writes in this run"""

    def __init__(self) -> None:
        self.waiting: set[Taker] = set()
        """those whose tensor is copied when the pass has shown all"""
        self.shown: list[Shown] = []
        """of the running pass"""
        self._tried: list[tuple[Shown, torch.Tensor]] = []
        """on its first pass, a tensor and its copy"""
        self._known: set[Taker] = set()
        """takers that were tried"""
        self._groups: list[_Group] = []
        self._takers: list[Taker] = []
        """of the groups, in the order in which a pass shows them"""

    def add(self, taker: Taker, rows: PassRows, tensor: torch.Tensor) -> None:
        """The one column of a pass. It is copied now where its taker does not wait."""
        if taker in self.waiting:
            self.shown.append((taker, rows, tensor, tensor._version))
            return
        copy = tensor.clone()
        if self.may_wait and taker not in self._known:
            self._known.add(taker)
            if not tensor.is_inference():  # autograd does not count the writes to it
                self._tried.append(((taker, rows, tensor, tensor._version), copy))
        self.shown.append((taker, rows, copy, -1))

    def end(self) -> None:
        """The pass has shown all. Raises CaptureError where what waited was written over, or is of another shape."""
        if not self.shown:
            return
        shown, self.shown = self.shown, []
        if self.waiting:
            self._check(shown)
        self._judge()
        if [taker for taker, *_ in shown] != self._takers or not all(group.fits(shown) for group in self._groups):
            self.flush()
            self._regroup(shown)
        for group in self._groups:
            group.take(shown)

    def flush(self) -> None:
        """Hand all rows to their takers."""
        for group in self._groups:
            group.flush()

    def _check(self, shown: Sequence[Shown]) -> None:
        """Raises CaptureError where a tensor that waited was written over."""
        written = [taker for taker, _, tensor, version in shown if version >= 0 and tensor._version != version]
        if changed := [str(taker.selector) for taker in written]:
            raise CaptureError(
                f"{', '.join(changed)}: written over later in a forward pass, and not in the first ones: "
                'by a hook of yours? The copy came too late. engine="nnsight" (--engine nnsight) copies at once.'
            )

    def _judge(self) -> None:
        """Whose tensors may wait, of those that were tried in this pass."""
        for (taker, _, tensor, version), copy in self._tried:
            if tensor._version == version and torch.equal(tensor, copy):
                self.waiting.add(taker)
        self._tried.clear()

    def _regroup(self, shown: Sequence[Shown]) -> None:
        numbers: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
        for number, (taker, rows, tensor, _) in enumerate(shown):
            if tensor.shape[:2] != (rows.batch, 1):
                raise CaptureError(
                    f"{taker.selector}: expected a tensor of [{rows.batch}, 1, ...] (batch, tokens fed), "
                    f"got {list(tensor.shape)}, and another shape before."
                )
            numbers.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(number)
        self._groups = [_Group(alike, shown) for alike in numbers.values()]
        self._takers = [taker for taker, *_ in shown]


class _Group:
    """Tensors of one shape, dtype and device, in a block [passes, tensors, batch, 1, ...]."""

    def __init__(self, numbers: Sequence[int], shown: Sequence[Shown]) -> None:
        first = shown[numbers[0]][2]
        self._numbers = numbers
        self._takers = [shown[number][0] for number in numbers]
        self._like = (first.shape, first.dtype, first.device)
        passes = max(1, min(BLOCK_PASSES, BLOCK_BYTES // max(1, first.nbytes)))
        self._block = new_block((passes, len(numbers), *first.shape), first.dtype, first.device)
        self._places = self._block.unbind(0)
        """of each pass: made once, since a view costs as much as the copy into it"""
        self._passes: list[PassRows] = []

    def fits(self, shown: Sequence[Shown]) -> bool:
        shape, dtype, device = self._like
        tensors = [shown[number][2] for number in self._numbers]
        return all(t.shape == shape and t.dtype is dtype and t.device == device for t in tensors)

    def take(self, shown: Sequence[Shown]) -> None:
        torch.stack([shown[number][2] for number in self._numbers], out=self._places[len(self._passes)])
        self._passes.append(shown[self._numbers[0]][1])
        if len(self._passes) == len(self._places):
            self.flush()

    def flush(self) -> None:
        passes, self._passes = self._passes, []
        for number, taker in enumerate(self._takers if passes else ()):
            taker.steps(passes, self._block[: len(passes), number].squeeze(2).transpose(0, 1))


def new_block(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that is returned to the system with the block.

    Heap memory would not be: the cache of keys and values grows around the blocks and leaves holes where they were.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and hasattr(mmap, "MAP_ANONYMOUS") and size:
        with contextlib.suppress(OSError):  # the system has no more mappings to give
            pages = mmap.mmap(-1, size, flags=_PAGES)
            return torch.frombuffer(pages, dtype=dtype)[: math.prod(shape)].view(shape)
    return torch.empty(shape, dtype=dtype, device=device)
