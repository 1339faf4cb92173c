"""What interventions do to rows of a point: functions of [n, ...] tensors, computed in float32 or float64."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hookmap.capture.interventions.edits import RowOperation, TokenPositions
from hookmap.errors import InterventionError


def _wide(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


@dataclass(frozen=True)
class Steered:
    """rows + strength * vector, added in the model's dtype."""

    vector: torch.Tensor
    strength: float
    keep_norm: bool

    def __call__(self, rows: torch.Tensor, where: TokenPositions, means: torch.Tensor | None) -> torch.Tensor:
        moved = rows + (self.strength * self.vector).to(rows.device, rows.dtype)
        if not self.keep_norm:
            return moved
        before, after = (_wide(r).norm(dim=-1, keepdim=True) for r in (rows, moved))
        ratio = torch.where(after > 0, before / after.clamp_min(torch.finfo(after.dtype).tiny), 1.0)
        return torch.where(ratio == 1.0, moved, (_wide(moved) * ratio).to(rows.dtype))


@dataclass(frozen=True)
class Filled:
    """The same row for all tokens: zeros, or a vector."""

    value: torch.Tensor | None

    def __call__(self, rows: torch.Tensor, where: TokenPositions, means: torch.Tensor | None) -> torch.Tensor:
        if self.value is None:
            return torch.zeros_like(rows)
        return self.value.to(rows.device, rows.dtype).expand_as(rows)


class Averaged:
    """The mean over each prompt."""

    def __call__(self, rows: torch.Tensor, where: TokenPositions, means: torch.Tensor | None) -> torch.Tensor:
        assert means is not None  # such an edit asks for them
        return means.to(rows.dtype)


@dataclass(frozen=True)
class Resampled:
    """Rows drawn from those of a source. The draw depends on a token's sample, its position and the seed."""

    pool: torch.Tensor
    seed: int

    def __call__(self, rows: torch.Tensor, where: TokenPositions, means: torch.Tensor | None) -> torch.Tensor:
        drawn = [random.Random(f"{self.seed}:{sample}:{at}").randrange(len(self.pool)) for sample, at in where]
        return self.pool[drawn].to(rows.device, rows.dtype)


@dataclass(frozen=True)
class Patched:
    """Rows of another run, each for one token."""

    rows: torch.Tensor
    row_of: Callable[[int], Mapping[int, int]]
    """sample -> position -> index into `rows`"""

    def __call__(self, rows: torch.Tensor, where: TokenPositions, means: torch.Tensor | None) -> torch.Tensor:
        chosen = [self.row_of(sample)[position] for sample, position in where]
        return self.rows[chosen].to(rows.device, rows.dtype)

    def __contains__(self, cell: object) -> bool:
        """Whether a (sample, position) has a row here; for `Edit.only`."""
        return isinstance(cell, tuple) and cell[1] in self.row_of(cell[0])


@dataclass(frozen=True)
class ProjectedOut:
    """rows - (rows · direction) direction, for a direction of length 1."""

    direction: torch.Tensor

    def __call__(self, rows: torch.Tensor, where: TokenPositions, means: torch.Tensor | None) -> torch.Tensor:
        wide, unit = _wide(rows), self.direction.to(rows.device)
        return (wide - (wide * unit).sum(-1, keepdim=True) * unit).to(rows.dtype)


@dataclass(frozen=True)
class Scaled:
    """rows * factor."""

    factor: float

    def __call__(self, rows: torch.Tensor, where: TokenPositions, means: torch.Tensor | None) -> torch.Tensor:
        return rows * self.factor


@dataclass(frozen=True)
class Clamped:
    """One feature, or the component along a direction of length 1, limited to the range `least` to `most`."""

    feature: int | None
    direction: torch.Tensor | None
    least: float | None
    most: float | None

    def __call__(self, rows: torch.Tensor, where: TokenPositions, means: torch.Tensor | None) -> torch.Tensor:
        if self.direction is None:
            held = rows.clone()
            held[..., self.feature] = _wide(held[..., self.feature]).clamp(self.least, self.most).to(rows.dtype)
            return held
        wide, unit = _wide(rows), self.direction.to(rows.device)
        part = (wide * unit).sum(-1, keepdim=True)
        moved = part.clamp(self.least, self.most) - part
        return torch.where(moved == 0, rows, (wide + moved * unit).to(rows.dtype))


def check_range(operation: RowOperation, dtype: torch.dtype) -> None:
    """Raises InterventionError where the operation writes or adds numbers that `dtype`, the model's, cannot hold."""
    numbers = _constants(operation)
    if not bool(numbers.isfinite().all()):
        raise InterventionError(
            "it would write an infinity or nan: the rows of its source are not finite. See which: hookmap inspect, and "
            "capture or open the model in a dtype of a wider range (--dtype bfloat16)."
        )
    if not bool(numbers.to(dtype).isfinite().all()):
        raise InterventionError(
            f"it writes numbers up to {float(numbers.abs().max()):.3g}, and {dtype} of this point goes up to "
            f"{torch.finfo(dtype).max:.3g}. Give smaller ones, or open the model in a wider dtype."
        )


def _constants(operation: RowOperation) -> torch.Tensor:
    """The numbers that an operation writes or adds, whatever the rows are; float64."""
    if isinstance(operation, Steered):
        return operation.vector.double() * operation.strength
    if isinstance(operation, Clamped):
        return torch.tensor([end for end in (operation.least, operation.most) if end is not None], dtype=torch.float64)
    found = {Filled: "value", Resampled: "pool", Patched: "rows"}.get(type(operation))
    rows = None if found is None else getattr(operation, found)
    return torch.zeros(1, dtype=torch.float64) if rows is None else rows.double()
