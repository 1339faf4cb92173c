"""Quantiles of each feature by a sketch that merges: KLL (Karnin, Lang, Liberty 2016), of Apache DataSketches.

On the processor, not on the device: the rows are copied there.
"""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch

from hookmap.analysis.reductions.accumulators import Accumulator, Batch, Tensor
from hookmap.extras import needed

SIZE = 200
"""KLL's k: a quantile is off by about 1.33 % of the rows at most, with a probability of 99 %"""


def library() -> Any:
    """Apache DataSketches. Raises CaptureError where it is not installed."""
    return needed("datasketches", 'quantiles need Apache DataSketches: pip install "hookmap[stats]"')


class Quantiles(Accumulator):
    """A sketch of each feature, for each group."""

    kind = "quantiles"

    def __init__(self, sketches: dict[int, Any], width: int) -> None:
        """`sketches`: by group."""
        self._sketches, self._width = sketches, width

    @classmethod
    def of(cls, batch: Batch, parameter: Any) -> Self:
        rows, member = batch.rows.cpu(), batch.member.cpu()
        found = {}
        for group in range(batch.groups):
            own = rows if batch.groups == 1 else rows[member == group]
            found[group] = sketch = library().vector_of_kll_floats_sketches(SIZE, rows.shape[1])
            sketch.update(np.ascontiguousarray(own.float().numpy()))
        return cls(found, rows.shape[1])

    @property
    def groups(self) -> int:
        return max(self._sketches, default=-1) + 1

    def absorb(self, other: Self, slots: Tensor) -> None:
        for group, slot in enumerate(slots.tolist()):
            theirs = other._sketches.get(group)
            if theirs is not None and slot in self._sketches:
                self._sketches[slot].merge(theirs)
            elif theirs is not None:
                self._sketches[slot] = theirs

    def take(self, groups: range) -> Self:
        copies = {}
        for group in sorted(self._sketches):
            if group in groups:
                copies[group - groups.start] = copy = library().vector_of_kll_floats_sketches(SIZE, self._width)
                copy.merge(self._sketches[group])
        return type(self)(copies, self._width)

    def values(self, group: int, probabilities: tuple[float, ...]) -> Tensor:
        """The quantiles of a group's features, float64 [probabilities, d]; nan of a group without rows."""
        sketch = self._sketches.get(group)
        if sketch is None:
            return torch.full((len(probabilities), self._width), float("nan"), dtype=torch.float64)
        found = np.asarray(sketch.get_quantiles(list(probabilities)), dtype=np.float64)
        return torch.from_numpy(found).view(self._width, len(probabilities)).T.contiguous()

    def state(self) -> dict[str, Tensor]:
        pieces: list[bytes] = []
        for group in sorted(self._sketches):
            pieces += self._sketches[group].serialize()
        lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
        return {
            "groups": torch.tensor(sorted(self._sketches), dtype=torch.int64),
            "width": torch.tensor([self._width]),
            "lengths": lengths,
            "bytes": torch.frombuffer(bytearray(b"".join(pieces) or b"\0"), dtype=torch.uint8),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        data, place, width = state["bytes"].numpy().tobytes(), 0, int(state["width"][0])
        lengths, found = iter(state["lengths"].tolist()), {}
        for group in state["groups"].tolist():
            found[group] = sketch = library().vector_of_kll_floats_sketches(SIZE, width)
            for feature in range(width):
                size = next(lengths)
                try:
                    sketch.deserialize(data[place : place + size], feature)
                except Exception as error:  # the library's own, which are of several kinds
                    raise ValueError(f"a sketch is broken: {error}") from error
                place += size
        return cls(found, width)
