"""How far estimated effects are from true ones: a seeded sample of them is patched, and both are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hookmap.errors import SelectionError
from hookmap.wording import counted


@dataclass(frozen=True)
class Comparison:
    """Estimated effects beside those of true patches, of the same cells."""

    names: tuple[str, ...]
    """of each cell"""
    estimated: torch.Tensor
    patched: torch.Tensor

    @property
    def correlation(self) -> float:
        """Pearson's; nan where there are fewer than two cells, or all effects of a side are equal."""
        if len(self.names) < 2:
            return float("nan")
        sides = [each.double() - each.double().mean() for each in (self.estimated, self.patched)]
        size = float(sides[0].norm() * sides[1].norm())
        return float(sides[0] @ sides[1]) / size if size else float("nan")

    def __repr__(self) -> str:
        return f"correlation with true patching {self.correlation:.3f} over {counted(len(self.names), 'cell')}"

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        correlation = self.correlation
        return {
            "correlation": None if correlation != correlation else correlation,
            "cells": list(self.names),
            "estimated": self.estimated.tolist(),
            "patched": self.patched.tolist(),
        }


def sampled(sizes: torch.Tensor, count: int, seed: int) -> list[int]:
    """Numbers of cells: half of them those of the largest size, the others drawn from the rest; in their order."""
    count = min(count, len(sizes))
    largest = sizes.topk(count // 2).indices
    rest = torch.ones(len(sizes), dtype=torch.bool)
    rest[largest] = False
    others = rest.nonzero()[:, 0]
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: count - len(largest)]]
    return sorted([*largest.tolist(), *drawn.tolist()])


def check_count(check: Any) -> int:
    """Raises SelectionError: an estimate is never given without a comparison."""
    if isinstance(check, bool) or not isinstance(check, int) or check < 4:
        raise SelectionError(f"check: expected how many effects are patched truly, from 4 on, got {check!r}.")
    return check
