"""One check's result, and how far two tensors differ."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Key = tuple[str, int | None]
"""(point, layer): of a layer that runs several times, the first of its runs is checked"""


@dataclass(frozen=True)
class Check:
    """One statement about the map, and whether the numbers bear it out."""

    name: str
    layers: tuple[int, ...]
    passed: bool
    detail: str
    error: float | None = None
    """largest difference, relative to the root mean square of what was expected"""


def relative_error(found: Tensor | None, expected: Tensor) -> float:
    """The largest difference over the root mean square of `expected`; infinite where the shapes differ, or at a nan."""
    if found is None or found.shape != expected.shape:
        return float("inf")
    found, expected = found.float(), expected.float()
    scale = expected.square().mean().sqrt().clamp_min(1e-12)
    error = float(((found - expected).abs().max() / scale).item())
    return error if error == error else float("inf")
