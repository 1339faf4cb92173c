"""Where points are in a model as vLLM runs it: what discovery in the worker finds, and what taps read and write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hookmap.activations import Key
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.terms import Term


@dataclass(frozen=True)
class Place:
    """Where one point of one layer is read and written.

    What a term's module sees is [tokens, ...], without batch; of a term that is not `flat`, of transformers' modules
    inside vLLM, it is [1, tokens, ...].

    vLLM hands the residual stream on as a pair whose sum it is, so that a point may have several terms.
    """

    terms: tuple[Term, ...]
    """the point is the sum of `term.times(tensor, parameter)` over them, in this order. Where it may be written, they
    are at one boundary of one module: the first is given the new value, divided by its scale, and the others zeros"""
    in_place: bool = False
    """its tensors are overwritten, since others than this module read them; else the module is given other tensors"""
    width: int = 0
    """features of the point in this rank: those of its heads, where it has heads"""
    parts: int = 1
    """how many parts of its heads, or of its features, the ranks of tensor parallelism hold, in their order"""
    copies: int = 1
    """how many ranks, one after another, hold the same part; all of them, where there is one part"""
    why_not_written: str | None = None
    """why the point must not be written; None where it may"""

    def whole(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """The point, [tokens, ...], of what each rank has of it, in their order."""
        return rows[0] if self.parts == 1 else torch.cat(list(rows[:: self.copies]), dim=1)


@dataclass(frozen=True)
class ModelPlaces:
    """The map of a model of vLLM's, and where each of its points is."""

    map: ArchitectureMap
    places: Mapping[Key, Place]
    """(point, layer) -> place, of every point that the map has; the layer is None for points of the whole model"""
    early: frozenset[str] = frozenset()
    """modules outside the layers that run before the first of them"""
