"""Watching and writing some rows of a batch that others share: each request sees its own, as if it ran alone.

A prompt is read by itself; then the newest token of each row is fed. So a pass of the batch has the columns that a pass
of the request alone would have, and only the rows are others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    rows: list[int] = field(default_factory=list)
    """for each row of the request, its number there"""
    error: BaseException | None = None
    """the first error of the hooks of this request, which the others do not hear of"""

    def own(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Arguments of the model with the tokens of these rows alone."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        return (), {"input_ids": self.of(ids)}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor [batch, ...]: a view, where they follow each other."""
        first, count = self.rows[0], len(self.rows)
        if self.rows == list(range(first, first + count)):
            return tensor[first : first + count]
        return tensor[self.rows]


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
        found = tensor if term.bare else term.arrange(tensor, self.place.batch, self._batch.width or 0)
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
        return self.place.batch, super()._shape()[1]

    def _placed(self, cells: Cells) -> Cells:
        return [self.place.rows[row] for row in cells[0]], cells[1]
