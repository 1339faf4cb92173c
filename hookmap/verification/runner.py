"""What the checks of a map are about: a model, its map, and the points of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from hookmap.maps.document import ArchitectureMap

Key = tuple[str, int | None]
Result = tuple[str, tuple[int, ...], bool, str, float | None]
"""name, layers, passed, detail, error: the fields of a `Check`"""
Error = Callable[[Tensor, Tensor], float]


@dataclass
class CheckedRun:
    """A group of checks has its methods on this."""

    map: ArchitectureMap
    model: nn.Module
    ids: Tensor
    values: dict[Key, Tensor]
    error: Error
    tolerance: float
