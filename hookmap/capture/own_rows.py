"""Watching and writing some rows of a batch that others share: each request sees its own, as if it ran alone.

A pass reads prompts, which pads precede, or the newest token of each row. So what a request sees of it are some rows of
the batch, and their last columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hookmap.capture.engines.observation import Observer, Side, Watch
from hookmap.capture.interventions.edits import Editor
from hookmap.capture.interventions.writable import Cells, ModuleIO
from hookmap.maps.selectors import Selector
from hookmap.maps.terms import Term


@dataclass
class Place:
    """Where a request's rows are in the batch that runs, and what went wrong with them."""

    batch: int = 0
    """rows of the batch"""
    rows: Sequence[int] = ()
    """for each row of the request, its number there"""
    pads: int = 0
    """columns of the running pass before those of the request"""
    error: BaseException | None = None
    """the first error of the hooks of this request, which the others do not hear of"""
    _index: tuple[slice | list[int], ...] = ()

    def stand(self, batch: int, rows: Sequence[int], pads: int) -> None:
        """Where they are in the pass that comes."""
        self.batch, self.rows, self.pads = batch, rows, pads
        follow = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        own = slice(rows[0], rows[0] + len(rows)) if follow else list(rows)
        self._index = (own, slice(pads, None)) if pads else (own,)

    def own(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Arguments of the model with the tokens of these rows alone."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        return (), {"input_ids": self.of(ids)}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What these rows have of a tensor [batch, columns, ...]: a view, where they follow each other."""
        return tensor[self._index]


class OwnRows(Observer):
    """An observer that is shown its rows."""

    place: Place

    @property
    def _own_rows(self) -> Callable[[torch.Tensor], torch.Tensor]:  # type: ignore[override]
        return self.place.of

    def look(self, so: bool) -> None:
        """Whether passes from now on are of these rows."""
        self._looks = so

    def begin_pass(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """See `Observer.begin_pass`."""
        if self.looks and self.place.error is None:
            try:
                super().begin_pass(*self.place.own(args, kwargs))
                self._one_each = self._one_each and (self.place.batch, 1)
            except Exception as error:
                self.place.error = error

    def watcher(self, module: str, side: Side, of: Callable[[Selector], bool] | None = None) -> Watch:
        """See `Observer.watcher`."""
        watch = super().watcher(module, side, of)

        def own(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            if self.looks and self.place.error is None:
                try:
                    watch(args, kwargs, output)
                except Exception as error:
                    self.place.error = error

        return own

    def _arranged(self, tensor: torch.Tensor, term: Term, selector: Selector) -> torch.Tensor:
        width = self.place.pads + (self._batch.width or 0)
        found = tensor if term.bare else term.arrange(tensor, self.place.batch, width)
        return self.place.of(found) if found.shape[0] == self.place.batch else found


class OwnEditor(Editor):
    """An editor that writes its rows."""

    place: Place

    def begin_pass(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """See `Editor.begin_pass`."""
        if self.place.error is None:
            try:
                super().begin_pass(*self.place.own(args, kwargs))
            except Exception as error:
                self.place.error = error

    def write(self, module: str, side: str, mode: str, given: ModuleIO) -> ModuleIO:
        """See `Editor.write`; where it fails, what the module passes on stays as it is."""
        if self.place.error is not None:
            return given
        try:
            return super().write(module, side, mode, given)
        except Exception as error:
            self.place.error = error
            return given

    def _shape(self) -> tuple[int, int]:
        return self.place.batch, self.place.pads + super()._shape()[1]

    def _placed(self, cells: Cells) -> Cells:
        return [self.place.rows[row] for row in cells[0]], [self.place.pads + column for column in cells[1]]
