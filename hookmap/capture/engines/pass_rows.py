"""Which tokens a forward pass of a batch is fed, and which of their rows are kept. Knows no engine and no selector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from hookmap.capture.overflow import RowNumber
from hookmap.capture.rows import Phrase, RowSelection
from hookmap.errors import CaptureError


@dataclass(frozen=True)
class BatchLayout:
    """Which columns of a padded batch hold which sample's tokens."""

    samples: tuple[int, ...]
    """the number, in the run, of the sample in each row"""
    lengths: tuple[int, ...]
    """tokens of each row's prompt, without padding"""
    right: bool = False
    """padding follows the prompts instead of preceding them"""
    images: tuple[frozenset[int], ...] = ()
    """for each row, the positions whose tokens stand for parts of an image; empty where no row has such"""
    tokens: tuple[tuple[int, ...], ...] = ()
    """of each row's prompt"""

    @property
    def width(self) -> int:
        """Columns of the padded prompts."""
        return max(self.lengths)

    def marked(self, row: int, matching: frozenset[int]) -> frozenset[int]:
        """The positions of a row that a selection goes by: of the phrase that it selects, else those of images."""
        if isinstance(matching, Phrase):
            return matching.places(self.tokens[row])
        return self.images[row] if self.images else frozenset()

    def pads(self, row: int) -> int:
        """Columns before the row's first token."""
        return 0 if self.right else self.width - self.lengths[row]


@dataclass(frozen=True)
class PassRows:
    """The rows of one forward pass that are kept."""

    batch: int
    new: int
    """columns that were fed for the first time"""
    columns: tuple[Sequence[int], ...]
    """for each row of the batch, the new columns that are kept, counted from the first new one"""
    first: tuple[int, ...]
    """for each row of the batch, how many rows of its sample earlier passes kept"""
    end: int = 0
    """columns that the batch was fed up to the end of this pass"""
    whole: bool = field(init=False)
    """every new column of every row is kept"""
    empty: bool = field(init=False)
    """nothing is kept"""
    _indices: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, compare=False
    )

    def __post_init__(self) -> None:
        # Computed once: each selector asks.
        object.__setattr__(self, "whole", all(len(kept) == self.new for kept in self.columns))
        object.__setattr__(self, "empty", not any(self.columns))

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy the kept rows of [batch, new, ...] into a tensor [rows, ...]."""
        flat = tensor.reshape(self.batch * self.new, *tensor.shape[2:])
        if self.whole:
            return flat.clone() if flat.data_ptr() == tensor.data_ptr() else flat
        return flat.index_select(0, self.indices(tensor.device)[0])

    def numbers(self) -> list[RowNumber]:
        """The number of each row that `gather` returns."""
        return [(row, self.first[row] + n) for row, kept in enumerate(self.columns) for n in range(len(kept))]

    def indices(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """For each kept row, its index in the flattened [batch * new] and its row of the batch."""
        if device not in self._indices:
            flat = [row * self.new + column for row, kept in enumerate(self.columns) for column in kept]
            rows = [row for row, kept in enumerate(self.columns) for _ in kept]
            self._indices[device] = (torch.tensor(flat, device=device), torch.tensor(rows, device=device))
        return self._indices[device]


class KeptFeatures:
    """Gives the features of a tensor that a selection keeps: entries of its last axis."""

    def __init__(self, selection: RowSelection) -> None:
        self._selection = selection
        self._indices: dict[tuple[int, torch.device], torch.Tensor | None] = {}
        """(width of a row, device) -> the features; None for all"""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._selection.features is None:
            return tensor
        key = (tensor.shape[-1], tensor.device)
        if key not in self._indices:
            columns = self._selection.columns(tensor.shape[-1])
            self._indices[key] = None if columns is None else torch.tensor(columns, device=tensor.device)
        indices = self._indices[key]
        return tensor if indices is None else tensor.index_select(-1, indices)


class BatchRows:
    """Follows the tokens of one batch from one forward pass to the next."""

    def __init__(self, layout: BatchLayout, selection: RowSelection, matching: frozenset[int]) -> None:
        """`matching`: the token ids that `positions="text=…"` selects."""
        self.layout = layout
        self.selection = selection
        self.generated: list[int | None] = [None] * len(layout.samples)
        """tokens that each row generated, end of sequence included; None while it still generates"""
        self.passes = 0
        """forward passes that have ended"""
        self.fed = 0
        """columns that they were fed"""
        self.width: int | None = None
        """columns of the running forward pass; None outside a pass"""
        self.kept = PassRows(0, 0, (), ())
        """of the running forward pass"""
        self._columns = layout.width
        self._positions: list[list[int]] = [[] for _ in layout.samples]
        self._wanted = [
            selection.wanted(length, matching, layout.marked(row, matching))
            for row, length in enumerate(layout.lengths)
        ]

    @property
    def columns(self) -> range:
        """The columns of the batch that the running pass is fed: without a cache, all of them again."""
        return range(self.kept.end - (self.width or 0), self.kept.end)

    @property
    def first_new(self) -> int:
        """The first column of the running pass that was not fed before."""
        return (self.width or 0) - self.kept.new

    @property
    def decodes(self) -> bool:
        """Whether the running pass reads one token of each row, is not the first, and every row is kept."""
        return self.width == self.kept.new == 1 and self.kept.whole and self.passes > 0

    @property
    def counts(self) -> list[int]:
        """How many positions of each row of the batch are kept so far."""
        return [len(positions) for positions in self._positions]

    def begin_pass(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The model is called with these arguments. Raises CaptureError where they are not the next tokens."""
        batch, width = _fed_shape(args, kwargs)
        new = self._new_columns(batch, width)
        tokens = token_ids(args, kwargs, new) if self.selection.reads_tokens else None
        first = tuple(self.counts)
        kept = tuple(self._kept(row, new, None if tokens is None else tokens[row]) for row in range(batch))
        for row, columns in enumerate(kept):
            start = self.fed - self.layout.pads(row)
            self._positions[row].extend(start + column for column in columns)
        self.width, self.kept = width, PassRows(batch, new, kept, first, self.fed + new)

    def end_pass(self) -> None:
        """The running pass is over."""
        self.width = None
        self.passes += 1
        self.fed = self.kept.end

    def sampled(self, columns: int, finished: Sequence[bool]) -> None:
        """The batch is `columns` long now; the `finished` rows have got their last token."""
        self._columns = columns
        for row, done in enumerate(finished):
            if done and self.generated[row] is None:
                self.generated[row] = columns - self.layout.width

    def finish(self, columns: int) -> tuple[int, ...]:
        """The run is over and its rows are `columns` long. Returns how many tokens each row generated.

        Raises CaptureError where the forward passes were not fed all tokens but the last.
        """
        longest = columns - self.layout.width
        counts = tuple(longest if count is None else count for count in self.generated)
        expected = self.layout.width + max(0, max(counts) - 1)
        if self.passes == 0 or self.fed != expected:
            raise CaptureError(
                f"{self.passes} forward passes were fed {self.fed} tokens a row, expected {expected}: "
                f"{max(counts)} tokens were generated after {self.layout.width}. "
                "The model did not run where the capture listens."
            )
        return counts

    def of_sample(self, row: int) -> tuple[int, tuple[int, ...] | Literal["mean"] | None]:
        """How many rows are kept of a row's sample, and of which positions, as `Sample.positions` states them."""
        positions = self._positions[row]
        if self.selection.everything:
            return len(positions), None
        if self.selection.mean:
            return min(1, len(positions)), "mean" if positions else ()
        if self.selection.one_row:
            positions = positions[-1:]
        return len(positions), tuple(positions)

    def last_columns(self) -> tuple[Sequence[int], ...]:
        """For each row of the batch, the new columns whose values reach the store: of `last`, only the last one."""
        last = self.selection.one_row and not self.selection.mean
        return tuple(columns[-1:] for columns in self.kept.columns) if last else self.kept.columns

    def _new_columns(self, batch: int, width: int) -> int:
        """How many of the columns that are fed now are fed for the first time."""
        left = self._columns - self.fed
        if batch != len(self.layout.samples):
            raise CaptureError(
                f"forward pass {self.passes} was fed {batch} rows, expected {len(self.layout.samples)}: this way of "
                "generating (beams, several sequences per prompt) has no row for each prompt. Generate without it."
            )
        if width <= left:  # the prompt, a part of it (chunked prefill), or the newest token
            return width
        if width == self._columns and left:  # without a cache every pass is fed everything again
            return left
        raise CaptureError(
            f"forward pass {self.passes} was fed {width} tokens, expected at most {left} (the new ones) or "
            f"{self._columns} (all of them): this way of generating (assisted, prompt lookup) takes tokens back, "
            "so its rows are not the tokens'. Generate without it."
        )

    def _kept(self, row: int, new: int, tokens: Sequence[int] | None) -> Sequence[int]:
        """The new columns of one row of the batch that are kept."""
        start = self.fed - self.layout.pads(row)  # the position of the first new column
        begin, end, generated = max(0, -start), new, self.generated[row]
        if self.layout.right:
            end = min(end, self.layout.lengths[row] - start)
        # The last generated token has no row, even if it is fed because the other rows of the batch go on.
        elif generated is not None:
            end = min(end, self.layout.lengths[row] + generated - 1 - start)
        columns = range(begin, max(begin, end))
        if self.selection.everything:
            return columns
        wanted = self._wanted[row]
        return [c for c in columns if wanted(start + c, -1 if tokens is None else tokens[c])]


def token_ids(args: Sequence[Any], kwargs: Mapping[str, Any], new: int) -> list[list[int]]:
    """The last `new` tokens that a forward pass is fed, row by row. Raises CaptureError where it has no ids."""
    ids = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
    ids = args[0] if ids is None and args else ids
    if ids is None or ids.ndim != 2:
        raise CaptureError("rows are kept for what their token is, and the model was called without token ids.")
    found: list[list[int]] = ids[:, -new:].tolist()
    return found


def _fed_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) that a forward pass is fed."""
    for name in ("decoder_input_ids", "input_ids", "inputs_embeds"):
        value = kwargs.get(name)
        if value is not None:
            return int(value.shape[0]), int(value.shape[1])
    if args and hasattr(args[0], "shape"):
        return int(args[0].shape[0]), int(args[0].shape[1])
    raise CaptureError(f"the model was called without input_ids: it got {', '.join(kwargs) or 'nothing'}.")
