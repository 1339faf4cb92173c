"""Shows rows to functions of the user's, in the pass that computes them, whatever the engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hookmap.activations import Activation
from hookmap.capture.engines.collectors import Collector, by_position
from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import BatchLayout, PassRows, token_ids
from hookmap.capture.interventions.edits import EditedTokens, Editor, TokenAt, step_of, why_not_heads
from hookmap.capture.interventions.functions import Called
from hookmap.capture.overflow import RowNumber
from hookmap.capture.rows import RowSelection
from hookmap.errors import InterventionError
from hookmap.maps.selectors import Selector


@dataclass(frozen=True)
class Watch:
    """A function that is shown rows of one point of one layer."""

    called: Called
    tokens: EditedTokens = field(default_factory=EditedTokens)
    heads: tuple[int, ...] | None = None

    @property
    def selector(self) -> Selector:
        return self.called.selector


class Watching(Observer):
    """The observer of one batch for all functions that watch it."""

    def __init__(self, watches: Sequence[Watch], layout: BatchLayout, batch: Editor) -> None:
        self._watches = [(watch, watch.called.in_batch(batch)) for watch in watches]
        self._ids: list[list[int]] = []
        """of the tokens that the running pass is fed for the first time, row by row"""
        selectors = {watch.selector.key: watch.selector for watch in watches}
        # Rows that no function wants are left out where all want the same: their logits need not be computed.
        chosen = {(watch.tokens.positions, watch.tokens.matching) for watch in watches}
        positions, matching = chosen.pop() if len(chosen) == 1 else (RowSelection(), frozenset[int]())
        super().__init__(tuple(selectors.values()), layout, _nothing, selection=positions, matching=matching)

    def begin_pass(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        super().begin_pass(args, kwargs)
        if self.looks:
            self._ids = token_ids(args, kwargs, self.kept.new)

    def collector(self, selector: Selector, keys: int | None) -> Collector:
        return _Shown(self, selector)

    def tell(self, selector: Selector, rows: PassRows, tensor: torch.Tensor) -> None:
        """Call the functions that watch this selector. `tensor`: [batch, columns, ...]; `rows`: which are kept."""
        for watch, called in self._watches:
            if watch.selector.key != selector.key:
                continue
            for row in range(rows.batch):
                if cells := self._cells(watch, row, rows):
                    found = tensor[row, [column for column, _ in cells]]
                    if selector.has_keys:
                        pads, right = self.layout.pads(row), self.layout.right
                        seen = self.layout.lengths[row] if right else rows.end - pads
                        found = by_position(found, rows.end, pads, seen)
                    called.show(_of_heads(watch, found), [at for _, at in cells])

    def _cells(self, watch: Watch, row: int, rows: PassRows) -> list[tuple[int, TokenAt]]:
        """The (column of the tensor, token) of each row that the function wants of a sample."""
        length, sample = self.layout.lengths[row], self.layout.samples[row]
        first = rows.end - self.kept.new - self.layout.pads(row)
        marked = self.layout.marked(row, watch.tokens.matching)
        found = []
        for column, new in zip(rows.columns[row], self.kept.columns[row], strict=True):
            position, token = first + new, self._ids[row][new]
            if watch.tokens.select(position, token, length, marked):
                found.append((column, TokenAt(sample, position, token, step_of(position, length))))
        return found


def _of_heads(watch: Watch, rows: torch.Tensor) -> torch.Tensor:
    if watch.heads is None:
        return rows
    if wrong := why_not_heads(watch.heads, watch.selector.point, tuple(rows.shape[1:])):
        raise InterventionError(f"{watch.selector}: {wrong}")
    return rows[:, list(watch.heads)]


@dataclass(frozen=True)
class _Shown:
    """See `Collector`: keeps nothing."""

    observer: Watching
    selector: Selector

    def take(self, rows: PassRows, tensor: torch.Tensor) -> None:
        self.observer.tell(self.selector, rows, tensor)

    def nothing(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(0)

    def finish(self, counts: Sequence[int]) -> None: ...

    def lost(self) -> list[RowNumber]:
        return []


def _nothing(activation: Activation) -> None:
    """A sample without rows: no function is called for it."""
