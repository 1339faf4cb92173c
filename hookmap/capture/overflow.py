"""Rows that became infinite because keep_dtype has a smaller range than the model's dtype. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hookmap.wording import counted

OVERFLOWS = ("warn", "refuse")
_SHOWN = 3

RowNumber = tuple[int, int]
"""(row of the batch, number of the row among the sample's)"""


@dataclass(frozen=True)
class Overflow:
    """The rows of one tensor that overflowed."""

    name: str
    """the tensor's, as in a manifest: `resid_post.8`"""
    rows: int
    sample: int
    """sample of the first of them"""
    position: int | None
    """position of the first of them; None for a mean"""

    def __str__(self) -> str:
        rows = counted(self.rows, "row")
        at = "the mean" if self.position is None else f"position {self.position}"
        return f"{self.name} ({rows}, the first {at} of sample {self.sample})"


def in_words(lost: Sequence[Overflow], dtype: torch.dtype) -> str:
    """What overflowed, where it did first, and what helps."""
    named = "; ".join(map(str, lost[:_SHOWN])) + (f"; and {more} more tensors" if (more := len(lost[_SHOWN:])) else "")
    name = str(dtype).removeprefix("torch.")
    wider = "bfloat16, which has float32's range" if dtype == torch.float16 else "float32"
    return (
        f"keep_dtype={name} goes up to {torch.finfo(dtype).max:.6g}, and finite numbers beyond it become infinite: "
        f"{named}. Keep {wider}."
    )


@dataclass
class Cast:
    """Brings rows into the dtype that they are kept in, and remembers which of them became infinite there."""

    dtype: torch.dtype | None
    _lost: list[tuple[torch.Tensor, Callable[[], Sequence[RowNumber | None]]]] = field(default_factory=list)

    def __call__(
        self,
        rows: torch.Tensor,
        numbers: Callable[[], Sequence[RowNumber | None]],
        lead: int = 1,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`rows`: [..lead axes, ...]. `numbers`: of each, the lead axes flattened; None of those that are not kept."""
        if self.dtype is None or self.dtype == rows.dtype:
            return rows
        cast = rows.to(self.dtype) if out is None else out.copy_(rows)
        if torch.finfo(self.dtype).max < torch.finfo(rows.dtype).max:
            # Not looked at here: that would wait for the device.
            self._lost.append(((rows.isfinite() & ~cast.isfinite()).flatten(lead).any(-1).flatten(), numbers))
        return cast

    def lost(self) -> list[RowNumber]:
        """Of all rows so far; forgets them."""
        masks, self._lost = self._lost, []
        found = [
            number
            for mask, numbers in masks
            if mask.any()
            for is_lost, number in zip(mask.tolist(), numbers(), strict=True)
            if is_lost and number is not None
        ]
        return sorted(found)
