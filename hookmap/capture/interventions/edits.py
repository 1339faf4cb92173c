"""Which cells of a forward pass an edit changes, pass by pass, and what an engine calls to change them.

A token is edited whenever the model is fed it: without a cache, where every pass is fed everything again, each time.
Pads, and what is fed after a row has finished, are left alone.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from hookmap.capture.engines.observation import Observer, of_logits
from hookmap.capture.engines.pass_rows import token_ids
from hookmap.capture.interventions.writable import Cells, Given, Place, mode_of
from hookmap.capture.rows import RowSelection
from hookmap.errors import InterventionError
from hookmap.maps.selectors import Selector

Where = Sequence[tuple[int, int]]
"""(number of the sample in the run, position) of each row"""


class Changing(Protocol):
    """What is done to rows of a point."""

    def __call__(self, rows: torch.Tensor, where: Where, means: torch.Tensor | None) -> torch.Tensor:
        """`rows`: [n, ...] in the model's dtype -> new ones. `means`: of each row's prompt, [n, ...], where asked."""


@dataclass(frozen=True)
class Edit:
    """One change of one point of one layer."""

    selector: Selector
    change: Changing
    positions: RowSelection = field(default_factory=RowSelection)
    steps: RowSelection | None = None
    """generation steps as positions; None for all"""
    matching: frozenset[int] = frozenset()
    """token ids that `positions` "text=…" means"""
    heads: tuple[int, ...] | None = None
    only: Container[tuple[int, int]] | None = None
    """(sample, position) pairs, where these and not `positions` say what is written"""
    means: bool = False
    """whether `change` reads the mean over each prompt"""

    @property
    def place(self) -> Place:
        return Place(self.selector.terms[0], mode_of(self.selector))


class Editor:
    """Applies edits during one batch. An engine calls `begin_pass`, and `write` at each of the `boundaries`."""

    def __init__(self, edits: Sequence[Edit], observer: Observer, before: Observer | None = None) -> None:
        """`observer`: of the same batch; it knows whose tokens are in which columns. `before`: sees the old values."""
        self.before = before
        self._observer = observer
        # In one place a write of the stream comes first: what a branch reads of it is read after.
        self._edits = sorted(enumerate(edits), key=lambda e: e[1].selector.forward_index)
        self._places: dict[tuple[str, str, str], list[tuple[int, Edit]]] = {}
        for number, edit in self._edits:
            place = edit.place
            self._places.setdefault((place.term.module, place.term.side, place.mode), []).append((number, edit))
        for each in (observer, before):
            if each is not None:
                each.every_logit |= any(of_logits(edit.selector) for edit in edits)
        self._means: dict[tuple[int, int], torch.Tensor] = {}
        self._tokens: list[list[int]] | None = None
        self._cells: dict[Any, tuple[Cells, list[tuple[int, int]]]] = {}
        self._calls: dict[tuple[str, str, str], int] = {}
        self._begun = False

    @property
    def boundaries(self) -> tuple[tuple[str, Literal["input", "output"]], ...]:
        """The (module path, side) pairs that are written."""
        terms = (edit.selector.terms[0] for _, edit in self._edits)
        return tuple(dict.fromkeys((term.module, term.side) for term in terms))

    def writes(self, module: str, side: str, mode: str) -> bool:
        """Whether something at this boundary is written so."""
        return (module, side, mode) in self._places

    def begin_pass(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The model is called with these arguments; the observer knows it already."""
        self.finish()
        self._cells.clear()
        self._calls.clear()
        self._begun = True
        reads = any(edit.positions.reads_tokens for _, edit in self._edits)
        self._tokens = token_ids(args, kwargs, len(self._observer.columns)) if reads else None

    def finish(self) -> None:
        """The forward pass is over. Raises InterventionError where it did not come by what it was to write."""
        if self._begun and (missed := [where for where in self._places if where not in self._calls]):
            places = ", ".join(f"{module or 'model'}.{side}" for module, side, _ in missed)
            raise InterventionError(
                f"a forward pass did not reach {places}, which was to be written: the model skipped these modules."
            )

    def write(self, module: str, side: str, mode: str, given: Given) -> Given:
        """What is passed on at this boundary. Raises InterventionError."""
        where = (module, side, mode)
        call = self._calls[where] = self._calls.get(where, -1) + 1
        for number, edit in self._places[where]:
            if call and edit.selector.terms[0].call is None:
                raise InterventionError(f"{edit.selector}: {module} was called more than once in one forward pass.")
            if edit.selector.terms[0].call in (None, call):
                given = self._write(number, edit, given)
        return given

    def _write(self, number: int, edit: Edit, given: Given) -> Given:
        cells, where = self._chosen(edit)
        shape = (len(self._observer.layout.samples), len(self._observer.columns))
        means = self._means_of(number, edit.place, given, cells[0], shape) if edit.means else None
        if not where:
            return given

        def change(rows: torch.Tensor) -> torch.Tensor:
            changed = _on_heads(edit, rows, where, means)
            if rows.dtype == torch.float16 and bool(rows.isfinite().all() & ~changed.isfinite().all()):
                raise InterventionError(
                    f"{edit.selector}: what is written is too large for torch.float16, which goes up to 65504. "
                    "Give smaller numbers, or open the model in bfloat16 or float32."
                )
            return changed

        return edit.place.write(given, shape, cells, change, str(edit.selector))

    def _chosen(self, edit: Edit) -> tuple[Cells, list[tuple[int, int]]]:
        key = (edit.positions, edit.steps, edit.matching, None if edit.only is None else id(edit.only))
        if key not in self._cells:
            rows, columns, where = [], [], []
            for row in range(len(self._observer.layout.samples)):
                for column, position, step in self._tokens_of(row):
                    token = -1 if self._tokens is None else self._tokens[row][column]
                    if self._wanted(edit, row, position, step, token):
                        rows.append(row)
                        columns.append(column)
                        where.append((self._observer.layout.samples[row], position))
            self._cells[key] = (rows, columns), where
        return self._cells[key]

    def _wanted(self, edit: Edit, row: int, position: int, step: int, token: int) -> bool:
        if edit.steps is not None and not edit.steps.wanted(0)(step, -1):
            return False
        if edit.only is not None:
            return (self._observer.layout.samples[row], position) in edit.only
        return edit.positions.wanted(self._observer.layout.lengths[row], edit.matching)(position, token)

    def _tokens_of(self, row: int) -> list[tuple[int, int, int]]:
        """(column of the pass, position, step) of each token of a row that counts."""
        layout, count = self._observer.layout, self._observer.generated[row]
        length, pads = layout.lengths[row], layout.pads(row)
        # The last generated token is fed only where the others of the batch go on.
        end = length if layout.right else float("inf") if count is None else length + max(0, count - 1)
        found = []
        for column, absolute in enumerate(self._observer.columns):
            position = absolute - pads
            if 0 <= position < end:
                found.append((column, position, max(0, position - length + 1)))
        return found

    def _means_of(
        self, number: int, place: Place, given: Given, rows: list[int], shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """The mean of each row's prompt, computed in the pass that is fed it."""
        begins = self._observer.columns.start == 0
        for row in range(shape[0]) if begins else sorted(set(rows)):
            if not begins and (number, row) in self._means:
                continue
            prompt = [column for column, _, step in self._tokens_of(row) if step == 0]
            if len(prompt) != self._observer.layout.lengths[row]:
                raise InterventionError(
                    "the mean over a prompt is asked for, and the model is fed the prompt in pieces: "
                    "generate without prefill_chunk_size, or give the mean as a vector."
                )
            self._means[number, row] = place.read(given, shape, ([row] * len(prompt), prompt)).float().mean(0)
        return torch.stack([self._means[number, row] for row in rows]) if rows else None


def _on_heads(edit: Edit, rows: torch.Tensor, where: Where, means: torch.Tensor | None) -> torch.Tensor:
    if edit.heads is None:
        return edit.change(rows, where, means)
    chosen = list(edit.heads)
    changed = rows.clone()
    changed[:, chosen] = edit.change(rows[:, chosen], where, None if means is None else means[:, chosen]).to(rows.dtype)
    return changed
