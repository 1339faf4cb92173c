"""Turns what an engine sees during one `generate`, or one forward pass, into rows of activations. Knows no engine.

Three things that no engine checks are checked here, on every forward pass: each selector was seen exactly once, its
tensor is as wide as the tokens that were fed, and nothing of a pad or of a finished row is kept.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from hookmap.activations import Activation
from hookmap.capture.engines.collectors import Collector, EveryRow, LastRow, MeanRow, PatternRows
from hookmap.capture.engines.pass_rows import BatchLayout, PassRows, fed_shape, token_ids
from hookmap.capture.engines.transfer import Transfer
from hookmap.capture.overflow import Overflow, in_words
from hookmap.capture.rows import DTYPES, NUMBERS, RowSelection
from hookmap.errors import CaptureError
from hookmap.maps.points import POINTS, PointName
from hookmap.maps.selectors import Selector, Term

Side = Literal["input", "output"]
Watch = Callable[[Sequence[Any], Mapping[str, Any], Any], None]
"""what an engine calls as a boundary is passed: args, kwargs (of an input), output (of an output)"""


class Observer:
    """Watches one batch. An engine calls `begin_pass` and `watcher`s, the stopping rule `sampled`, the end `finish`.

    `write` receives activations in order of position; of a forward pass only a block of rows, and the parts of
    unfinished sums, are held.
    """

    def __init__(
        self,
        selectors: Sequence[Selector],
        layout: BatchLayout,
        write: Callable[[Activation], None],
        keys: int | None = None,
        selection: RowSelection | None = None,
        matching: frozenset[int] = frozenset(),
    ) -> None:
        """`keys`: how long the rows of attention weights become, zeros behind what a query sees."""
        self.selectors = tuple(selectors)
        self.layout = layout
        self.selection = selection or RowSelection()
        self.generated: list[int | None] = [None] * len(layout.samples)
        """tokens that each row generated, end of sequence included; None while it still generates"""
        self.passes = 0
        self.lost: tuple[Overflow, ...] = ()
        """what became infinite in the dtype that is kept; known once the batch is finished"""
        self._write = write
        self._looks = True
        self._wanted = [self.selection.wanted(length, matching) for length in layout.lengths]
        self._positions: list[list[int]] = [[] for _ in layout.samples]
        self._transfer = Transfer()
        self._collectors = [self._collector(selector, keys) for selector in self.selectors]
        self._columns: dict[tuple[int, torch.device], torch.Tensor | None] = {}
        self._length = layout.width
        self._fed = 0
        self._width: int | None = None
        """columns of the forward pass that runs, None outside one"""
        self._rows = PassRows(0, 0, (), (), whole=True, empty=True)
        self._done: list[int] = [-1] * len(self.selectors)
        """of each selector, the last forward pass that showed it"""
        self._left = 0
        self._computed: Sequence[int] | None = None
        """the columns that the pass computes logits of; None: all"""
        self.every_logit = False
        """whether somebody else reads or writes them, too"""
        self._calls: dict[Any, int] = {}
        self._parts: dict[tuple[int, int], torch.Tensor] = {}
        self._none: dict[int, torch.Tensor] = {}
        """of each selector, no rows: [0, ...] in the dtype and width of its rows"""
        self._targets: dict[tuple[str, Side], list[tuple[int, int, Term]]] = {}
        for number, selector in enumerate(self.selectors):
            for position, term in enumerate(selector.terms):
                self._targets.setdefault((term.module, term.side), []).append((number, position, term))

    @property
    def boundaries(self) -> tuple[tuple[str, Side], ...]:
        """The (module path, side) pairs to watch, each once."""
        return tuple(self._targets)

    @property
    def columns(self) -> range:
        """The columns of the batch that the forward pass that runs is fed: all of them again, without a cache."""
        end = self._fed + self._rows.new
        return range(end - (self._width or 0), end)

    @property
    def looks(self) -> bool:
        """Whether the model runs for this observer now, and not for a callback of the user's."""
        return self._looks

    @property
    def saw_all(self) -> bool:
        """Whether the forward pass that runs has shown every selector."""
        return self._left == 0

    def begin_pass(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The model is called with these arguments. Raises CaptureError where they are not the next tokens."""
        if not self._looks:
            return
        self._end_pass()
        batch, width = fed_shape(args, kwargs)
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
        self._width, self._left = width, len(self.selectors)
        self._rows = self._rows_of(new, token_ids(args, kwargs, new) if self.selection.reads_tokens else None)
        for collector in self._collectors:
            if isinstance(collector, PatternRows):
                collector.fed(self._fed + new)

    def logits(self, generating: bool, scattered: bool) -> Sequence[int] | None:
        """Columns that the pass which has begun is to compute logits of; None for all. They are all that comes then.

        generating: the last ones are read for the next token. scattered: else all behind the first one come too.
        """
        if self.every_logit:
            return None
        width, rows = self._width or 0, self._rows
        needed = set[int]()
        if any(map(of_logits, self.selectors)):
            needed = {width - rows.new + column for kept in self._logits_of(rows) for column in kept}
        if generating or not needed:
            needed.add(width - 1)
        columns = sorted(needed) if scattered else range(min(needed), width)
        self._computed = None if len(columns) == width else columns
        return self._computed

    def _logits_of(self, rows: PassRows) -> Iterator[Sequence[int]]:
        """Of each row of the batch, the new columns whose logits are kept."""
        last = self.selection.one_row and not self.selection.mean
        return (kept[-1:] if last else kept for kept in rows.columns)

    def watcher(self, module: str, side: Side, of: Callable[[Selector], bool] | None = None) -> Watch:
        """What to call whenever this boundary is passed: it copies what is selected, before anything writes to it.

        `of`: only these selectors; the other ones get a watcher of their own.
        """
        targets = tuple(t for t in self._targets[module, side] if of is None or of(self.selectors[t[0]]))
        boundary = (module, side, of)
        counts = any(term.call is not None for _, _, term in targets)

        def watch(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            if not self._looks:
                return
            if self._width is None:
                raise CaptureError(f"{module or 'model'}.{side} was reached outside a forward pass of the model.")
            call = None
            if counts:
                call = self._calls[boundary] = self._calls.get(boundary, -1) + 1
            for number, position, term in targets:
                if term.call is None or term.call == call:
                    self._see(number, position, term, args, kwargs, output)

        return watch

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the model may run for somebody else on this thread: a callback of the user's."""
        self._looks = False
        try:
            yield
        finally:
            self._looks = True

    def sampled(self, length: int, finished: Sequence[bool]) -> None:
        """The batch is `length` columns long now; `finished` rows got their last token."""
        self._length = length
        for row, done in enumerate(finished):
            if done and self.generated[row] is None:
                self.generated[row] = length - self.layout.width

    def finish(self, columns: int) -> tuple[int, ...]:
        """The run is done and its rows are `columns` long. Returns the number of tokens that each row generated.

        Raises CaptureError where the forward passes were not fed all of them but the last, and where rows became
        infinite in the dtype that is kept and that is refused.
        """
        self._end_pass()
        longest = columns - self.layout.width
        counts = tuple(longest if count is None else count for count in self.generated)
        expected = self.layout.width + max(0, max(counts) - 1)
        if self.passes == 0 or self._fed != expected:
            raise CaptureError(
                f"{self.passes} forward passes were fed {self._fed} tokens a row, expected {expected}: "
                f"{max(counts)} tokens were generated after {self.layout.width}. "
                "The model did not run where the capture listens."
            )
        kept = [len(positions) for positions in self._positions]
        for collector in self._collectors:
            collector.finish(kept)
        self._transfer.finish()
        self.lost = tuple(self._lost())
        if self.lost and self.selection.overflow == "refuse":
            told = in_words(self.lost, DTYPES[str(self.selection.dtype)])
            raise CaptureError(f"{told} Nothing of this batch is kept. overflow='warn' (--overflow warn) keeps them.")
        for row, sample in enumerate(self.layout.samples):
            if not kept[row]:  # how wide its rows would be is known all the same
                for number, nothing in self._none.items():
                    selector = self.selectors[number]
                    self._write(Activation(sample, selector.point, selector.layer, 0, nothing))
        return counts

    def _lost(self) -> Iterator[Overflow]:
        for selector, collector in zip(self.selectors, self._collectors, strict=True):
            if self.selection.dtype is not None and (places := collector.lost()):
                row, number = places[0]
                positions = self._positions[row][-1:] if self.selection.one_row else self._positions[row]
                position = None if self.selection.mean else positions[number]
                yield Overflow(selector.point, selector.layer, len(places), self.layout.samples[row], position)

    def rows(self, row: int) -> tuple[int, tuple[int, ...] | Literal["mean"] | None]:
        """Rows of one of the samples, and which tokens they are of, as `Sample.positions` says it."""
        positions = self._positions[row]
        if self.selection.everything:
            return len(positions), None
        if self.selection.mean:
            return min(1, len(positions)), "mean" if positions else ()
        if self.selection.one_row:
            positions = positions[-1:]
        return len(positions), tuple(positions)

    def _see(
        self, number: int, position: int, term: Term, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        selector = self.selectors[number]
        if self._done[number] == self.passes or (number, position) in self._parts:
            raise CaptureError(
                f"{selector}: {term.module or 'model'} was called more than once in forward pass {self.passes}, "
                "expected once. A module that several layers share, or a layer that runs several times for this text, "
                "has no one tensor there: choose a point on a module that runs once."
            )
        tensor = self._new_columns(term.resolve(args, kwargs, output), term, selector)
        if len(selector.terms) > 1:
            # Copied: what comes later in the pass may write over it.
            self._parts[number, position] = tensor.clone() if self._keeps(number) else tensor
            if any((number, other) not in self._parts for other in range(len(selector.terms))):
                return
            parts = [self._parts.pop((number, other)) for other in range(len(selector.terms))]
            tensor = add_terms(selector.terms, parts)
        elif term.scale != 1.0:
            tensor = tensor * term.scale
        self._done[number] = self.passes
        self._left -= 1
        if self._keeps(number):
            self._take(number, tensor)
        elif number not in self._none:
            self._none[number] = self._collectors[number].nothing(self._features(tensor))

    def _rows_in(self, tensor: torch.Tensor) -> PassRows:
        """Which rows of this tensor are kept: of logits, not every column may be there."""
        rows, computed = self._rows, self._computed
        if computed is None or tensor.shape[1] == rows.new:
            return rows
        place = {column - ((self._width or 0) - rows.new): number for number, column in enumerate(computed)}
        columns = tuple([place[column] for column in kept] for kept in self._logits_of(rows))
        whole = all(len(kept) == len(computed) for kept in columns)
        return PassRows(rows.batch, len(computed), columns, rows.first, whole, rows.empty)

    def _keeps(self, number: int) -> bool:
        """Whether something of this selector is kept of the forward pass that runs."""
        return not self._rows.empty

    def _take(self, number: int, tensor: torch.Tensor) -> None:
        """A selector is complete; `tensor`: [batch, new, ...], the model's own."""
        collector, tensor = self._collectors[number], self._features(tensor)
        if number not in self._none:
            self._none[number] = collector.nothing(tensor)
        collector.take(self._rows_in(tensor), tensor)

    def _new_columns(self, tensor: torch.Tensor, term: Term, selector: Selector) -> torch.Tensor:
        """A view of the columns that were fed for the first time: `[batch, new, ...]`."""
        rows, width = self._rows, self._width or 0
        tensor = term.arrange(tensor, rows.batch, width)
        computed = self._computed
        if computed is not None and of_logits(selector) and tensor.shape[:2] == (rows.batch, len(computed)):
            return tensor
        if tensor.shape[0] != rows.batch or tensor.shape[1] != width:
            raise CaptureError(
                f"{selector}: expected a tensor of [{rows.batch}, {width}, ...] "
                f"(batch, tokens fed), got {list(tensor.shape)}. "
                "The map was made for another version of this model: run `hookmap discover` again."
            )
        return tensor if rows.new == width else tensor[:, -rows.new :]

    def _features(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.selection.features is None:
            return tensor
        where = (tensor.shape[-1], tensor.device)
        if where not in self._columns:
            columns = self.selection.columns(where[0])
            self._columns[where] = None if columns is None else torch.tensor(columns, device=tensor.device)
        columns_there = self._columns[where]
        return tensor if columns_there is None else tensor.index_select(-1, columns_there)

    def _end_pass(self) -> None:
        """Raises CaptureError where the current forward pass did not show every selector."""
        if self._width is None:
            return
        width, self._width = self._width, None
        if self._left:
            missing = [str(s) for number, s in enumerate(self.selectors) if self._done[number] != self.passes]
            raise CaptureError(
                f"forward pass {self.passes} of {width} tokens did not reach {len(missing)} of "
                f"{len(self.selectors)} selectors:\n" + "\n".join(f"  - {text}" for text in missing) + "\n"
                "The model skipped these modules, or the map is another model's: run `hookmap verify`."
            )
        self._calls.clear()
        self._computed = None
        self.passes += 1
        self._fed += self._rows.new

    def _rows_of(self, new: int, tokens: list[list[int]] | None) -> PassRows:
        """What the pass that begins keeps, and of which positions."""
        start, columns = self._fed, []
        first = tuple(map(len, self._positions))
        for row, count in enumerate(self.generated):
            pads = self.layout.pads(row)
            begin, end = max(0, pads - start), new
            if self.layout.right:
                end = min(end, self.layout.lengths[row] - start)
            # The last generated token is no row, even where the others of the batch go on and it is fed with them.
            elif count is not None:
                end = min(end, self.layout.width + count - 1 - start)
            kept: Sequence[int] = range(begin, max(begin, end))
            if not self.selection.everything:
                wanted, own = self._wanted[row], None if tokens is None else tokens[row]
                kept = [c for c in kept if wanted(start + c - pads, -1 if own is None else own[c])]
            self._positions[row].extend(start + column - pads for column in kept)
            columns.append(kept)
        whole = all(len(kept) == new for kept in columns)
        return PassRows(len(columns), new, tuple(columns), first, whole, empty=not any(columns))

    def _collector(self, selector: Selector, keys: int | None) -> Collector:
        name = PointName.of(selector.point).base
        dtype = None if self.selection.dtype is None or name in NUMBERS else DTYPES[self.selection.dtype]
        deliver = self._deliver_of(selector)
        if "key" in POINTS[name].axes:
            pads = [self.layout.pads(row) for row in range(len(self.layout.samples))]
            return PatternRows(self._transfer, deliver, dtype, pads, keys or self.layout.width)
        kind = MeanRow if self.selection.mean else LastRow if self.selection.one_row else EveryRow
        return kind(self._transfer, deliver, dtype)

    def _deliver_of(self, selector: Selector) -> Callable[[int, int, torch.Tensor], None]:
        samples, write, point, layer = self.layout.samples, self._write, selector.point, selector.layer

        def deliver(row: int, first: int, rows: torch.Tensor) -> None:
            write(Activation(samples[row], point, layer, first, rows))

        return deliver


def of_logits(selector: Selector) -> bool:
    """Whether it is of the logits, which a model may be told to compute for some tokens only."""
    return "d_vocab" in PointName.of(selector.point).definition.axes


def add_terms(terms: Sequence[Term], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of scale * tensor, in the order of the terms and in the tensors' own dtype: as the model adds them."""
    total: torch.Tensor | None = None
    for term, tensor in zip(terms, tensors, strict=True):
        scaled = tensor if term.scale == 1.0 else tensor * term.scale
        total = scaled if total is None else total + scaled.to(total.device)
    assert total is not None  # a selector has a term at least
    return total
