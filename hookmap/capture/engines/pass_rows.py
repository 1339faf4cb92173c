"""Which rows of a batch a forward pass brings, and which of them are kept. Knows no engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hookmap.capture.overflow import Place
from hookmap.errors import CaptureError


@dataclass(frozen=True)
class BatchLayout:
    """Whose tokens stand in which columns of a padded batch."""

    samples: tuple[int, ...]
    """the number of each row's prompt in the run"""
    lengths: tuple[int, ...]
    """tokens of each row's prompt, without padding"""
    right: bool = False
    """pads stand behind the prompts, not before them"""

    @property
    def width(self) -> int:
        return max(self.lengths)

    def pads(self, row: int) -> int:
        """Columns before the row's first token."""
        return 0 if self.right else self.width - self.lengths[row]


@dataclass(frozen=True)
class PassRows:
    """Which rows of a forward pass are kept."""

    batch: int
    new: int
    """columns that were fed for the first time"""
    columns: tuple[Sequence[int], ...]
    """of each row of the batch, those that are kept; 0 is the first new one"""
    first: tuple[int, ...]
    """of each row of the batch, how many rows its sample had before"""
    whole: bool
    """everything is kept"""
    empty: bool
    _indices: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, compare=False)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The kept rows of [batch, new, ...], side by side in a tensor of their own: [rows, ...]."""
        flat = tensor.reshape(self.batch * self.new, *tensor.shape[2:])
        if self.whole:
            return flat.clone() if flat.data_ptr() == tensor.data_ptr() else flat
        return flat.index_select(0, self.indices(tensor.device)[0])

    def places(self) -> list[Place]:
        """Of each row that `gather` gives: its row of the batch, and its number among the sample's."""
        return [(row, self.first[row] + n) for row, kept in enumerate(self.columns) for n in range(len(kept))]

    def indices(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each kept row: its place in the flattened [batch * new], and its row of the batch."""
        if device not in self._indices:
            flat = [row * self.new + column for row, kept in enumerate(self.columns) for column in kept]
            rows = [row for row, kept in enumerate(self.columns) for _ in kept]
            self._indices[device] = (torch.tensor(flat, device=device), torch.tensor(rows, device=device))
        return self._indices[device]


def fed_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    for name in ("input_ids", "inputs_embeds"):
        value = kwargs.get(name)
        if value is not None:
            return int(value.shape[0]), int(value.shape[1])
    if args and hasattr(args[0], "shape"):
        return int(args[0].shape[0]), int(args[0].shape[1])
    raise CaptureError(f"the model was called without input_ids: it got {', '.join(kwargs) or 'nothing'}.")


def token_ids(args: Sequence[Any], kwargs: Mapping[str, Any], new: int) -> list[list[int]]:
    """The last `new` tokens that a forward pass is fed, row by row. Raises CaptureError where it has no ids."""
    ids = kwargs.get("input_ids")
    ids = args[0] if ids is None and args else ids
    if ids is None or ids.ndim != 2:
        raise CaptureError("rows are kept for what their token is, and the model was called without token ids.")
    found: list[list[int]] = ids[:, -new:].tolist()
    return found
