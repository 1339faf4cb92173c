"""A dictionary in a run: its reconstruction in place of the rows, or single features changed.

What is written is made of interventions like every other: `hm.capture(…, interventions=dictionary.splice())`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch

from hookmap.activations import Key
from hookmap.capture.interventions.documents import Function
from hookmap.capture.interventions.functions import At, apply, watch
from hookmap.errors import SelectionError

Tensor = torch.Tensor
Change = Callable[[Tensor], Tensor]
"""features [n, features] -> the features in their place"""


class Writing:
    """What a dictionary can write. `Dictionary` says what its features are."""

    @property
    @abstractmethod
    def features(self) -> int: ...

    @property
    @abstractmethod
    def reads(self) -> Key: ...

    @property
    @abstractmethod
    def writes(self) -> Key: ...

    @abstractmethod
    def encode(self, rows: Tensor) -> Tensor: ...

    @abstractmethod
    def decode(self, features: Tensor, rows: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Self: ...

    def splice(self, **where: Any) -> list[Function]:
        """Interventions that write the reconstruction in place of the rows: the error is left out.

        where: positions, steps, calls, as of every intervention.
        """
        return self.edit(lambda features: features, error=False, **where)

    def clamp(self, features: Mapping[int, float], *, error: bool = True, **where: Any) -> list[Function]:
        """Interventions that set features to values, at every token. error: keep what is not reconstructed."""
        return self._each(features, lambda held, values: values.expand_as(held), error, where)

    def steer(self, features: Mapping[int, float], *, error: bool = True, **where: Any) -> list[Function]:
        """Interventions that add to features, at every token."""
        return self._each(features, lambda held, values: held + values, error, where)

    def ablate(self, features: Iterable[int], *, error: bool = True, **where: Any) -> list[Function]:
        """Interventions that set features to 0."""
        return self.clamp(dict.fromkeys(features, 0.0), error=error, **where)

    def edit(self, change: Change, *, error: bool = True, **where: Any) -> list[Function]:
        """Interventions that write the features that `change` gives, [n, features] -> [n, features].

        error: keep what the dictionary does not reconstruct: then unchanged features write nothing. Of a transcoder,
        whose features are read elsewhere, two interventions. Raises SelectionError, InterventionError.
        """
        run = Rewriting(self, change, error)
        (point, layer), out = self.reads[:2], self.writes
        if out == self.reads:
            return [apply(run.write, point, _layers(layer), **where)]
        return [watch(run.read, point, _layers(layer), **where), apply(run.write, out[0], _layers(out[1]), **where)]

    def _each(
        self,
        features: Mapping[int, float],
        change: Callable[[Tensor, Tensor], Tensor],
        error: bool,
        where: dict[str, Any],
    ) -> list[Function]:
        if not features or (wrong := [n for n in features if not isinstance(n, int) or not 0 <= n < self.features]):
            named = ", ".join(map(repr, wrong[:5])) if features else "none"
            raise SelectionError(f"features {named}: expected some of 0 to {self.features - 1}.")
        numbers, values = list(features), torch.tensor([float(value) for value in features.values()])

        def changed(found: Tensor) -> Tensor:
            new = found.clone()
            new[:, numbers] = change(found[:, numbers], values.to(found))
            return new

        return self.edit(changed, error=error, **where)


class Rewriting:
    """Writes rows of one sample after another; of a transcoder, after it has read them."""

    def __init__(self, dictionary: Writing, change: Change, error: bool) -> None:
        self._dictionary, self._change, self._error = dictionary, change, error
        self._there: dict[torch.device, Any] = {}
        self._read: dict[int, tuple[tuple[int, ...], Tensor]] = {}
        """by sample: positions and rows"""

    def read(self, rows: Tensor, at: At) -> None:
        self._read[at.sample] = (at.positions, rows)

    def write(self, rows: Tensor, at: At) -> Tensor:
        source = rows if self._dictionary.reads == self._dictionary.writes else self._was_read(at)
        dictionary, flat = self._on(rows.device), source.flatten(1)
        features = dictionary.encode(flat)
        new: Tensor = dictionary.decode(self._change(features), flat)
        if self._error:
            new = rows.flatten(1).to(new.dtype) + (new - dictionary.decode(features, flat))
        return new.view(rows.shape).to(rows.dtype)

    def _was_read(self, at: At, again: bool = False) -> Tensor:
        """What `read` kept of these tokens. `again`: somebody else asks for it, too. Raises SelectionError."""
        positions, found = self._read.get(at.sample, ((), None)) if again else self._read.pop(at.sample, ((), None))
        if found is None or positions != at.positions:
            raise SelectionError(
                "the transcoder's point was not read in this pass: its layer is behind what it writes."
            )
        return found

    def _on(self, device: torch.device) -> Any:
        """The dictionary where the rows are."""
        if device not in self._there:
            self._there[device] = self._dictionary.to(device)
        return self._there[device]


def _layers(layer: int | None) -> Any:
    return "all" if layer is None else layer
