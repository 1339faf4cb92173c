"""How far a streamed probing has come, and the file that a killed one goes on from.

Between two buffers a run is the weights, the scores so far, and a list of the texts that were read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch

from hookmap.activations import Key
from hookmap.analysis.kept import Kind
from hookmap.analysis.probes.streamed.trial import Trial
from hookmap.documents import Frozen
from hookmap.errors import StoreError
from hookmap.stores.number_set import NumberSet

FORMAT: Final = "hookmap-probe-training"


@dataclass
class Progress:
    """Where a run is."""

    source: Mapping[str, Any]
    """what a run has to have in common with it to go on with it, as plain data"""
    trial: Trial | None = None
    """None of one that was read from a file, until `go_on`"""
    passes: int = 0
    """finished ones over the texts to learn from; then one over those that are scored"""
    samples: NumberSet = field(default_factory=NumberSet)
    """those read in the running pass"""
    complete: bool = False
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """of the trial, as it was read"""

    def identity(self) -> dict[str, Any]:
        return {**self.source}

    def go_on(self, trial: Trial, keys: tuple[Key, ...]) -> None:
        """Bring a trial of the same run to where it was. Raises StoreError."""
        try:
            trial.restore(self.state, keys)
        except (KeyError, ValueError, RuntimeError) as error:
            raise StoreError(f"{PROGRESS.file} is broken: {error}. Begin again in another folder: -o DIR") from error
        self.trial, self.state = trial, {}


class _Document(Frozen):
    """The metadata of the file."""

    format: Literal["hookmap-probe-training"] = FORMAT
    format_version: Literal[1] = 1
    source: dict[str, Any]
    passes: int
    samples: tuple[tuple[int, int], ...]
    complete: bool


def _written(progress: Progress) -> tuple[_Document, dict[str, torch.Tensor]]:
    document = _Document(
        source=dict(progress.source),
        passes=progress.passes,
        samples=tuple(progress.samples.ranges()),
        complete=progress.complete,
    )
    state = progress.state if progress.trial is None else progress.trial.state()
    return document, {name: each.clone() for name, each in state.items()}


def _read(document: _Document, state: dict[str, torch.Tensor]) -> Progress:
    samples = NumberSet.of_ranges(document.samples)
    return Progress(document.source, None, document.passes, samples, document.complete, state)


PROGRESS = Kind("training.safetensors", "trainings of probes", "hookmap train-probe", _Document, _written, _read)
