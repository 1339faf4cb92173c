"""What happens to one selector's tensor on each forward pass: its rows are copied, summed, or only the last is held."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from hookmap.activations import Activation
from hookmap.capture.engines.pass_rows import BatchLayout, PassRows
from hookmap.capture.engines.step_rows import BLOCK_BYTES, StepRows, new_block
from hookmap.capture.engines.transfer import Transfer
from hookmap.capture.overflow import Cast, RowNumber
from hookmap.capture.rows import DTYPES, NUMBERS, RowSelection
from hookmap.errors import CaptureError
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector

Deliver = Callable[[int, int, torch.Tensor], None]
"""(row of the batch, number of the first row within its sample, rows [n, ...] on the host)"""


class Collector(Protocol):
    """Takes one selector's tensor on every forward pass that keeps rows of it."""

    def take(self, rows: PassRows, tensor: torch.Tensor) -> None:
        """`tensor`: [batch, new, ...], the model's own; the rows to keep are copied now."""

    def nothing(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a sample without rows has of such a tensor: [0, ...], on the host."""

    def finish(self, counts: Sequence[int]) -> None:
        """The batch is done. Deliver what is still held. `counts`: the rows of each sample."""

    def lost(self) -> list[RowNumber]:
        """The rows that became infinite in the dtype of the selection."""


class EveryRow:
    """Delivers each kept row."""

    def __init__(
        self, selector: Selector, transfer: Transfer, deliver: Deliver, dtype: torch.dtype | None, steps: StepRows
    ) -> None:
        self.selector = selector
        self._transfer, self._deliver, self._cast, self._steps = transfer, deliver, Cast(dtype), steps
        self.lost = self._cast.lost

    def take(self, rows: PassRows, tensor: torch.Tensor) -> None:
        if rows.new == 1 and tensor.nbytes <= BLOCK_BYTES // 2:
            self._steps.add(self, rows, tensor)
        else:
            self._steps.flush()
            gathered = self._cast(rows.gather(tensor), rows.numbers)
            self._transfer.send(gathered, lambda host: self._arrived(rows, host))

    def nothing(self, tensor: torch.Tensor) -> torch.Tensor:
        return _nothing(tensor.shape[2:], self._cast.dtype or tensor.dtype)

    def finish(self, counts: Sequence[int]) -> None:
        self._steps.flush()

    def steps(self, passes: Sequence[PassRows], block: torch.Tensor) -> None:
        """See `Taker`."""
        own = new_block(tuple(block.shape), self._cast.dtype or block.dtype, block.device)
        if self._cast(block, lambda: _numbers(passes, len(block)), lead=2, out=own) is block:
            own.copy_(block)
        self._transfer.send(own, lambda host: self._steps_arrived(passes, host))

    def _arrived(self, rows: PassRows, host: torch.Tensor) -> None:
        start = 0
        for row, kept in enumerate(rows.columns):
            if kept:
                self._deliver(row, rows.first[row], host[start : start + len(kept)])
                start += len(kept)

    def _steps_arrived(self, passes: Sequence[PassRows], host: torch.Tensor) -> None:
        for row in range(host.shape[0]):
            kept = [number for number, rows in enumerate(passes) if rows.columns[row]]
            if kept:
                whole = kept[-1] - kept[0] + 1 == len(kept)
                own = host[row, kept[0] : kept[-1] + 1] if whole else host[row, kept]
                if own.nbytes * host.shape[0] < host.untyped_storage().nbytes():
                    own = own.clone()  # few rows: a view would keep the whole block in memory
                self._deliver(row, passes[kept[0]].first[row], own)


class MeanRow:
    """One row per sample: the mean, summed in float32 in the order of the tokens."""

    def __init__(self, transfer: Transfer, deliver: Deliver, dtype: torch.dtype | None) -> None:
        self._transfer, self._deliver, self._cast = transfer, deliver, Cast(dtype)
        self.lost = self._cast.lost
        self._sum: torch.Tensor | None = None

    def take(self, rows: PassRows, tensor: torch.Tensor) -> None:
        if self._sum is None:
            self._sum = tensor.new_zeros((tensor.shape[0], *tensor.shape[2:]), dtype=torch.float32)
            self._cast.dtype = self._cast.dtype or tensor.dtype
        if rows.whole and rows.new == 1:
            self._sum += tensor[:, 0]
        else:
            self._sum.index_add_(0, rows.indices(tensor.device)[1], rows.gather(tensor).float())

    def nothing(self, tensor: torch.Tensor) -> torch.Tensor:
        return _nothing(tensor.shape[2:], self._cast.dtype or tensor.dtype)

    def finish(self, counts: Sequence[int]) -> None:
        if self._sum is None:
            return
        total, self._sum = self._sum, None
        numbers = torch.tensor([max(1, count) for count in counts], device=total.device)
        means = self._cast(total / numbers.view(-1, *[1] * (total.ndim - 1)), lambda: _one_number_each(counts))
        self._transfer.send(means, lambda host: _one_row_each(host, counts, self._deliver))


class LastRow:
    """One row per sample: its last one."""

    def __init__(self, transfer: Transfer, deliver: Deliver, dtype: torch.dtype | None) -> None:
        self._transfer, self._deliver, self._cast = transfer, deliver, Cast(dtype)
        self.lost = self._cast.lost
        self._last: torch.Tensor | None = None

    def take(self, rows: PassRows, tensor: torch.Tensor) -> None:
        if self._last is None:
            self._last = tensor.new_zeros((tensor.shape[0], *tensor.shape[2:]))
        if rows.whole:
            self._last.copy_(tensor[:, -1])
            return
        for row, kept in enumerate(rows.columns):
            if kept:
                self._last[row] = tensor[row, kept[-1]]

    def nothing(self, tensor: torch.Tensor) -> torch.Tensor:
        return _nothing(tensor.shape[2:], self._cast.dtype or tensor.dtype)

    def finish(self, counts: Sequence[int]) -> None:
        if self._last is not None:
            last, self._last = self._cast(self._last, lambda: _one_number_each(counts)), None
            self._transfer.send(last, lambda host: _one_row_each(host, counts, self._deliver))


class PatternRows:
    """Attention weights. Their rows grow with the keys; each is padded with zeros to the final number of keys."""

    def __init__(
        self,
        transfer: Transfer,
        deliver: Deliver,
        dtype: torch.dtype | None,
        pads: Sequence[int],
        keys: int,
        absent: float = 0.0,
    ) -> None:
        """`pads`: columns before each row's first token. `keys`: the final number of keys. `absent`: of no key."""
        self._transfer, self._deliver, self._cast = transfer, deliver, Cast(dtype)
        self.lost = self._cast.lost
        self._pads, self._keys, self._absent = pads, keys, absent

    def take(self, rows: PassRows, tensor: torch.Tensor) -> None:
        """See `Collector`; `tensor`: [batch, new, heads, keys seen]."""
        for row, kept in enumerate(rows.columns):
            if kept:
                numbers = [(row, rows.first[row] + n) for n in range(len(kept))]
                own = self._cast(tensor[row, list(kept)], lambda numbers=numbers: numbers)  # type: ignore[misc]
                placed = by_position(own, rows.end, self._pads[row], self._keys, self._absent)
                self._transfer.send(placed, self._to(row, rows.first[row]))

    def nothing(self, tensor: torch.Tensor) -> torch.Tensor:
        return _nothing((*tensor.shape[2:-1], self._keys), self._cast.dtype or tensor.dtype)

    def finish(self, counts: Sequence[int]) -> None:
        """See `Collector`."""

    def _to(self, row: int, first: int) -> Callable[[torch.Tensor], None]:
        return lambda host: self._deliver(row, first, host)


def collector_of(
    selector: Selector,
    keys: int | None,
    layout: BatchLayout,
    selection: RowSelection,
    transfer: Transfer,
    steps: StepRows,
    write: Callable[[Activation], None],
) -> Collector:
    """What takes the rows of a selector, pass by pass, and hands them to `write` in order of position.

    `keys`: the length of a row of attention weights.
    """
    samples, point, layer, run = layout.samples, selector.point, selector.layer, selector.call

    def deliver(row: int, first: int, rows: torch.Tensor) -> None:
        write(Activation(samples[row], point, layer, first, rows, run))

    name = PointName.of(point)
    dtype = None if selection.dtype is None or name.base in NUMBERS else DTYPES[selection.dtype]
    if selector.has_keys:
        pads = [layout.pads(row) for row in range(len(samples))]
        absent = -math.inf if name.base == "attn_scores" else 0.0
        return PatternRows(transfer, deliver, dtype, pads, keys or layout.width, absent)
    if selection.mean:
        return MeanRow(transfer, deliver, dtype)
    if selection.one_row:
        return LastRow(transfer, deliver, dtype)
    return EveryRow(selector, transfer, deliver, dtype, steps)


def by_position(weights: torch.Tensor, end: int, pads: int, keys: int, absent: float = 0.0) -> torch.Tensor:
    """Attention weights [query, heads, keys seen] -> [query, heads, keys]: key n is the sample's position n.

    `end`: columns that the batch was fed. A cache holds the last keys (a sliding window drops the first ones), so the
    last key is always column `end - 1`. Of keys that are not there, the value is `absent`.
    """
    first = end - weights.shape[-1] - pads
    if first + pads < 0:
        raise CaptureError(
            f"{weights.shape[-1]} keys after {end} tokens: this cache has places for tokens to come, and "
            "which key is which token cannot be told. Generate without cache_implementation."
        )
    seen = weights[..., max(0, -first) :][..., :keys]
    placed = weights.new_full((*weights.shape[:-1], keys), absent)
    placed[..., max(0, first) : max(0, first) + seen.shape[-1]] = seen
    return placed


def _numbers(passes: Sequence[PassRows], batch: int) -> list[RowNumber | None]:
    """For each cell of a block [batch, passes], flattened, the number of its row; None where it is not kept."""
    return [(row, rows.first[row]) if rows.columns[row] else None for row in range(batch) for rows in passes]


def _one_number_each(counts: Sequence[int]) -> list[RowNumber | None]:
    return [(row, 0) if count else None for row, count in enumerate(counts)]


def _nothing(row: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, *row, dtype=dtype)


def _one_row_each(host: torch.Tensor, counts: Sequence[int], deliver: Deliver) -> None:
    for row, count in enumerate(counts):
        if count:
            deliver(row, 0, host[row : row + 1])
