"""What interventions do to rows of a point: functions of [n, ...] tensors, computed in float32 or float64."""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hookmap.capture.interventions.edits import RowOperation, TokenAt, TokensAt
from hookmap.errors import InterventionError


def _wide(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


@dataclass(frozen=True)
class Steered:
    """rows + strength * vector, added in the model's dtype."""

    vector: torch.Tensor
    strength: float
    keep_norm: bool

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
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

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        if self.value is None:
            return torch.zeros_like(rows)
        return self.value.to(rows.device, rows.dtype).expand_as(rows)


class Averaged:
    """The mean over each prompt."""

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        assert means is not None  # such an edit asks for them
        return means.to(rows.dtype)


@dataclass(frozen=True)
class Resampled:
    """Rows drawn from those of a source. The draw depends on a token's sample, its position and the seed."""

    pool: torch.Tensor
    seed: int

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        seeds = (f"{self.seed}:{token.sample}:{token.position}" for token in where)
        drawn = [random.Random(seed).randrange(len(self.pool)) for seed in seeds]
        return self.pool[drawn].to(rows.device, rows.dtype)


@dataclass(frozen=True)
class Patched:
    """Rows of another run, each for one token."""

    rows: torch.Tensor
    row_of: Callable[[int], Mapping[int, int]]
    """sample -> position -> index into `rows`"""
    head_of: Callable[[int], int] | None = None
    """sample -> the one head of it that is written; None for all that are there"""

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        chosen = [self.row_of(token.sample)[token.position] for token in where]
        if self.head_of is None:
            return self.rows[chosen].to(rows.device, rows.dtype)
        written, heads = rows.clone(), [self.head_of(token.sample) for token in where]
        written[range(len(heads)), heads] = self.rows[chosen, heads].to(rows.device, rows.dtype)
        return written

    def __contains__(self, cell: object) -> bool:
        """Whether a (sample, position) has a row here; for `Edit.only`."""
        return isinstance(cell, tuple) and cell[1] in self.row_of(cell[0])


@dataclass(frozen=True)
class ProjectedOut:
    """rows - (rows · direction) direction, for a direction of length 1."""

    direction: torch.Tensor

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        wide, unit = _wide(rows), self.direction.to(rows.device)
        return (wide - (wide * unit).sum(-1, keepdim=True) * unit).to(rows.dtype)


@dataclass(frozen=True)
class Scaled:
    """rows * factor."""

    factor: float

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        return rows * self.factor


@dataclass(frozen=True)
class Clamped:
    """One feature, or the component along a direction of length 1, limited to the range `least` to `most`."""

    feature: int | None
    direction: torch.Tensor | None
    least: float | None
    most: float | None

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        if self.direction is None:
            held = rows.clone()
            held[..., self.feature] = _wide(held[..., self.feature]).clamp(self.least, self.most).to(rows.dtype)
            return held
        wide, unit = _wide(rows), self.direction.to(rows.device)
        part = (wide * unit).sum(-1, keepdim=True)
        moved = part.clamp(self.least, self.most) - part
        return torch.where(moved == 0, rows, (wide + moved * unit).to(rows.dtype))


@dataclass(frozen=True)
class Noised:
    """rows + std * noise. The draw depends on a token's sample and position, and on `seed`."""

    std: float
    seed: str

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        drawn = torch.stack([self._draw(token, rows.shape[1:]) for token in where])
        return (_wide(rows) + (self.std * drawn).to(rows.device)).to(rows.dtype)

    def _draw(self, token: TokenAt, row: torch.Size) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{token.sample}:{token.position}".encode()).digest()
        own = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        return torch.randn(row, generator=own)


@dataclass(frozen=True)
class Mapped:
    """rows + strength * up (down row), for down [k, d] and up [d, k], d the last axis of a row or all of it."""

    down: torch.Tensor
    up: torch.Tensor
    strength: float

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        wide = _wide(rows)
        read = wide.flatten(1) if self.down.shape[1] != rows.shape[-1] else wide
        down, up = (matrix.to(rows.device, wide.dtype) for matrix in (self.down, self.up))
        added = self.strength * (read @ down.T @ up.T)
        return (wide + added.reshape(rows.shape)).to(rows.dtype)


@dataclass(frozen=True)
class Swapped:
    """The rows of two tokens of a sample, exchanged."""

    pair_of: Callable[[int], tuple[int, ...]]
    """sample -> the two positions; empty where it has none"""

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        row_of = {(token.sample, token.position): row for row, token in enumerate(where)}
        try:
            taken = [row_of[token.sample, self._other(token)] for token in where]
        except KeyError as error:
            raise InterventionError(
                "the two tokens of a swap are not in one forward pass: generate without prefill_chunk_size."
            ) from error
        return rows[taken]

    def _other(self, token: TokenAt) -> int:
        first, second = self.pair_of(token.sample)
        return second if token.position == first else first

    def __contains__(self, cell: object) -> bool:
        """Whether a (sample, position) is swapped; for `Edit.only`."""
        return isinstance(cell, tuple) and cell[1] in self.pair_of(cell[0])


class Entering:
    """Keeps the rows that enter a block in the running pass, and writes nothing."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], torch.Tensor] = {}
        """(sample, position) -> row"""

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        self.rows = {(token.sample, token.position): row for token, row in zip(where, rows, strict=True)}
        return rows


@dataclass(frozen=True)
class AsEntered:
    """The rows that entered the block."""

    entering: Entering

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        kept = torch.stack([self.entering.rows[token.sample, token.position] for token in where])
        return kept.to(rows.device, rows.dtype)


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
