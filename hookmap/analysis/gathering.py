"""A sink that makes something of the rows of a batch, and keeps none of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from hookmap.activations import Activation, Key, Sample
from hookmap.errors import SelectionError
from hookmap.stores.ledger import Ledger
from hookmap.stores.number_set import NumberSet


def refuse_other_rows(options: Mapping[str, Any], why: str, *more: str) -> None:
    """Raises SelectionError for options of a capture that take rows away or change them, and those named in `more`."""
    names = ("positions", "every", "mean", "features", "before", *more)
    if wrong := [name for name in names if options.get(name)]:
        raise SelectionError(f"{', '.join(wrong)}: {why}: leave them out.")


class Gathering(ABC):
    """Takes activations (`write`, `finish`). What it holds is a batch's, until the samples of the batch are finished.

    Rows of a tensor come one sample after another, and are taken together when rows of another tensor come; where the
    samples are not known beforehand, when they are finished. A batch that is abandoned leaves nothing behind.
    """

    def __init__(
        self, keys: Iterable[Key], finished: NumberSet, known: Callable[[int], Sample] | None, after: Callable[[], None]
    ) -> None:
        """`finished`: samples that do not come again. `known`: samples as they will be. `after`: behind each batch."""
        self._ledger = Ledger(tuple(keys), finished=finished.copy())
        self._known, self._after = known, after
        self._held: dict[Key, list[Activation]] = {}
        self._last: Key | None = None
        self._samples: dict[int, Sample] = {}

    @abstractmethod
    def take(self, key: Key, rows: torch.Tensor, pieces: list[Activation]) -> None:
        """All rows of a tensor in a batch, [n, *row], on any device; `pieces`: the same by sample, in order."""

    @abstractmethod
    def commit(self, samples: Mapping[int, Sample]) -> None:
        """The samples of the batch are finished: what was taken of them counts from now on."""

    @abstractmethod
    def forget(self) -> None:
        """What was taken since the last commit comes again."""

    def write(self, activation: Activation) -> None:
        """Take rows, on any device. Raises CaptureError where they are not the next ones of a tensor expected."""
        self._ledger.take(activation)
        key = activation.key
        if self._known is not None and self._last is not None and self._last != key:
            self._flush(self._last)
        self._last = key
        self._held.setdefault(key, []).append(activation)

    def finish(self, sample: Sample) -> None:
        """Note the end of a sample. Raises CaptureError where it lacks rows."""
        self._ledger.finish(sample)
        self._samples[sample.sample] = sample
        if self._ledger.open:
            return
        for key in list(self._held):
            self._flush(key)
        self.commit(self._samples)
        self._samples, self._last = {}, None
        self._after()

    def abandon(self) -> None:
        """Forget the samples of the running batch: they come again."""
        for number in [*self._ledger.abandon(), *self._samples]:
            self._ledger.finished.discard(number)
        self._held, self._samples, self._last = {}, {}, None
        self.forget()

    def sample(self, number: int) -> Sample:
        """A sample of the batch."""
        return self._samples[number] if self._known is None else self._known(number)

    def _flush(self, key: Key) -> None:
        pieces = self._held.pop(key, [])
        pieces = [piece for piece in pieces if len(piece.tensor)] or pieces[:1]
        pieces.sort(key=lambda piece: (piece.sample, piece.start))  # a generation gives them step by step
        if pieces:
            self.take(key, torch.cat([piece.tensor for piece in pieces]), pieces)
