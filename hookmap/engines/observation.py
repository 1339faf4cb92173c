"""Turns what an engine sees during one `generate` into rows of activations. Knows no engine.

Three things that no engine checks are checked here, on every forward pass: each selector was seen exactly once, its
tensor is as wide as the tokens that were fed, and nothing of a pad or of a finished row is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hookmap.activations import Activation
from hookmap.errors import CaptureError
from hookmap.points import POINTS
from hookmap.selectors import Selector, Term

Side = Literal["input", "output"]


@dataclass(frozen=True)
class BatchLayout:
    """Whose tokens stand in which columns of a left-padded batch."""

    samples: tuple[int, ...]
    """the number of each row's prompt in the run"""
    lengths: tuple[int, ...]
    """tokens of each row's prompt, without padding"""

    @property
    def width(self) -> int:
        return max(self.lengths)

    def pads(self, row: int) -> int:
        return self.width - self.lengths[row]


@dataclass(frozen=True)
class ForwardPass:
    """One call of the model: `width` tokens fed, the last `new` of them for the first time, from column `start`."""

    width: int
    new: int
    start: int


class Observer:
    """Watches one batch. An engine calls `begin_pass` and `see`, the stopping rule calls `sampled`, the end `finish`.

    `write` receives activations in order of position, each as soon as it is there: of a forward pass only the parts
    of unfinished sums are held.
    """

    def __init__(
        self,
        selectors: Sequence[Selector],
        layout: BatchLayout,
        write: Callable[[Activation], None],
        keys: int | None = None,
    ) -> None:
        """`keys`: how long the rows of attention weights become, zeros behind what a query sees."""
        self.selectors = tuple(selectors)
        self.layout = layout
        self._keys = keys
        self.generated: list[int | None] = [None] * len(layout.samples)
        """tokens that each row generated, end of sequence included; None while it still generates"""
        self.passes = 0
        self._write = write
        self._length = layout.width
        self._fed = 0
        self._pass: ForwardPass | None = None
        self._windows: list[tuple[int, int, int, int]] = []
        self._complete: set[int] = set()
        self._calls: dict[tuple[str, Side], int] = {}
        self._parts: dict[tuple[int, int], torch.Tensor] = {}
        self._targets: dict[tuple[str, Side], list[tuple[int, int]]] = {}
        for number, selector in enumerate(self.selectors):
            for position, term in enumerate(selector.terms):
                self._targets.setdefault((term.module, term.side), []).append((number, position))

    @property
    def boundaries(self) -> tuple[tuple[str, Side], ...]:
        """The (module path, side) pairs that `see` wants, each once."""
        return tuple(self._targets)

    def begin_pass(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The model is called with these arguments. Raises CaptureError where they are not the next tokens."""
        self._end_pass()
        batch, width = _fed_shape(args, kwargs)
        left = self._length - self._fed
        if batch != len(self.layout.samples):
            raise CaptureError(
                f"forward pass {self.passes} was fed {batch} rows, expected {len(self.layout.samples)}: this way of "
                "generating (beams, several sequences per prompt) has no row for each prompt. Generate without it."
            )
        if width <= left:  # the prompt, a part of it (chunked prefill), or the newest token
            new = width
        elif width == self._length and left:  # without a cache every pass is fed everything again
            new = left
        else:
            raise CaptureError(
                f"forward pass {self.passes} was fed {width} tokens, expected at most {left} (the new ones) or "
                f"{self._length} (all of them): this way of generating (assisted, prompt lookup) takes tokens back, "
                "so its rows are not the tokens'. Generate without it."
            )
        self._pass = ForwardPass(width, new, self._fed)
        self._windows = self._windows_of(self._pass)

    def see(self, module: str, side: Side, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """A boundary of `boundaries` is passed; what is selected there is copied now, before anything writes to it."""
        if self._pass is None:
            raise CaptureError(f"{module or 'model'}.{side} was reached outside a forward pass of the model.")
        call = self._calls[module, side] = self._calls.get((module, side), -1) + 1
        for number, position in self._targets[module, side]:
            selector = self.selectors[number]
            if selector.terms[position].call not in (None, call):
                continue
            if number in self._complete or (number, position) in self._parts:
                raise CaptureError(
                    f"{selector}: {module or 'model'} was called more than once in forward pass {self.passes}, "
                    "expected once. A module that several layers share has no tensor of one layer: "
                    "choose a point on a module of the layer's own."
                )
            term = selector.terms[position]
            rows = _new_rows(term.resolve(args, kwargs, output), term, selector, self.layout, self._pass)
            if len(selector.terms) > 1:
                self._parts[number, position] = rows
                if any((number, other) not in self._parts for other in range(len(selector.terms))):
                    continue
                parts = [self._parts.pop((number, other)) for other in range(len(selector.terms))]
            else:
                parts = [rows]
            self._complete.add(number)
            self._hand_on(selector, add_terms(selector.terms, parts))

    def sampled(self, length: int, finished: Sequence[bool]) -> None:
        """The batch is `length` columns long now; `finished` rows got their last token."""
        self._length = length
        for row, done in enumerate(finished):
            if done and self.generated[row] is None:
                self.generated[row] = length - self.layout.width

    def finish(self, columns: int) -> tuple[int, ...]:
        """`generate` returned `columns` columns. Returns the number of tokens that each row generated.

        Raises CaptureError where the forward passes were not fed all of them but the last.
        """
        self._end_pass()
        longest = columns - self.layout.width
        counts = tuple(longest if count is None else count for count in self.generated)
        if self.passes == 0 or self._fed < self.layout.width + max(counts) - 1:
            raise CaptureError(
                f"{self.passes} forward passes were fed {self._fed} tokens a row, expected "
                f"{self.layout.width + max(counts) - 1}: {max(counts)} tokens were generated after "
                f"{self.layout.width}. The model did not run where the capture listens."
            )
        return counts

    def _end_pass(self) -> None:
        """Raises CaptureError where the current forward pass did not show every selector."""
        if self._pass is None:
            return
        done, self._pass = self._pass, None
        missing = [str(selector) for number, selector in enumerate(self.selectors) if number not in self._complete]
        if missing:
            raise CaptureError(
                f"forward pass {self.passes} of {done.width} tokens did not reach {len(missing)} of "
                f"{len(self.selectors)} selectors:\n" + "\n".join(f"  - {text}" for text in missing) + "\n"
                "The model skipped these modules, or the map is another model's: run `hookmap verify`."
            )
        self._complete.clear()
        self._calls.clear()
        self.passes += 1
        self._fed = done.start + done.new

    def _windows_of(self, current: ForwardPass) -> list[tuple[int, int, int, int]]:
        """Of each row with something to keep: its number, the first column to keep, the one behind, its pads."""
        windows = []
        for row, count in enumerate(self.generated):
            pads = self.layout.pads(row)
            first, last = max(current.start, pads), current.start + current.new
            # The last generated token is no row, even where the others of the batch go on and it is fed with them.
            if count is not None:
                last = min(last, self.layout.width + count - 1)
            if first < last:
                windows.append((row, first, last, pads))
        return windows

    def _hand_on(self, selector: Selector, rows: torch.Tensor) -> None:
        assert self._pass is not None
        start, rows = self._pass.start, rows.to("cpu")
        end = start + self._pass.new
        for row, first, last, pads in self._windows:
            kept = rows[row, first - start : last - start]
            if "key" in POINTS[selector.point.partition(".")[0]].axes:
                kept = _by_position(kept, selector, end, pads, self._keys or end - pads)
            self._write(Activation(self.layout.samples[row], selector.point, selector.layer, first - pads, kept))


def add_terms(terms: Sequence[Term], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of scale * tensor, in the order of the terms and in the tensors' own dtype: as the model adds them."""
    total: torch.Tensor | None = None
    for term, tensor in zip(terms, tensors, strict=True):
        scaled = tensor if term.scale == 1.0 else tensor * term.scale
        total = scaled if total is None else total + scaled.to(total.device)
    assert total is not None  # a selector has a term at least
    return total


def _new_rows(
    tensor: torch.Tensor, term: Term, selector: Selector, layout: BatchLayout, current: ForwardPass
) -> torch.Tensor:
    """A copy of the columns that were fed for the first time: `[batch, new, ...]`."""
    batch = len(layout.samples)
    tensor = term.arrange(tensor, batch, current.width)
    if tensor.shape[:2] != (batch, current.width):
        raise CaptureError(
            f"{selector}: expected a tensor of [{batch}, {current.width}, ...] "
            f"(batch, tokens fed), got {list(tensor.shape)}. "
            "The map was made for another version of this model: run `hookmap discover` again."
        )
    if current.new < current.width:
        tensor = tensor[:, current.width - current.new :]
    return tensor.detach().clone()


def _by_position(weights: torch.Tensor, selector: Selector, end: int, pads: int, keys: int) -> torch.Tensor:
    """Attention weights [query, heads, keys seen] -> [query, heads, keys]: key n is the sample's position n.

    A cache holds the last keys (a sliding window drops the first ones), so the last key is always column `end - 1`.
    """
    first = end - weights.shape[-1] - pads
    if first + pads < 0:
        raise CaptureError(
            f"{selector}: {weights.shape[-1]} keys after {end} tokens: this cache has places for tokens to come, and "
            "which key is which token cannot be told. Generate without cache_implementation."
        )
    seen = weights[..., max(0, -first) :]
    placed = weights.new_zeros(*weights.shape[:-1], keys)
    placed[..., max(0, first) : max(0, first) + seen.shape[-1]] = seen
    return placed


def _fed_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    for name in ("input_ids", "inputs_embeds"):
        value = kwargs.get(name)
        if value is not None:
            return int(value.shape[0]), int(value.shape[1])
    if args and hasattr(args[0], "shape"):
        return int(args[0].shape[0]), int(args[0].shape[1])
    raise CaptureError(f"the model was called without input_ids: it got {', '.join(kwargs) or 'nothing'}.")
