"""Turns what an engine shows during one `generate`, or one forward pass, into rows of activations. Knows no engine.

Every forward pass is checked, because no engine checks it: each selector is seen exactly once, and its tensor is as
wide as the tokens that were fed. Rows of padding and of finished samples are never kept.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch

from hookmap.activations import Activation, call_of
from hookmap.capture.engines.collectors import Collector, collector_of
from hookmap.capture.engines.parameters import no_parameters
from hookmap.capture.engines.pass_rows import BatchLayout, BatchRows, KeptFeatures, PassRows
from hookmap.capture.engines.step_rows import StepRows
from hookmap.capture.engines.transfer import Transfer
from hookmap.capture.overflow import Overflow, in_words
from hookmap.capture.rows import DTYPES, RowSelection
from hookmap.errors import CaptureError
from hookmap.maps.points import is_place
from hookmap.maps.selectors import Selector
from hookmap.maps.terms import Term
from hookmap.stores.ledger import tensor_name

Side = Literal["input", "output"]
Watch = Callable[[Sequence[Any], Mapping[str, Any], Any], None]
"""what an engine calls when the model passes a boundary: args, kwargs (of an input), output (of an output)"""


class Observer:
    """Watches one batch. An engine calls `begin_pass` and `watcher`s, the stopping rule `sampled`, the run `finish`.

    `write` receives activations in order of position. The observer holds only a block of rows, and the terms of sums
    that are not complete.
    """

    with_graph = False
    """whether autograd's graph is kept of what is taken, where the model runs with one"""
    _own_rows: Callable[[torch.Tensor], torch.Tensor] | None = None
    """takes the rows of this observer from a tensor of one column, where the pass has others, too"""

    def __init__(
        self,
        selectors: Sequence[Selector],
        layout: BatchLayout,
        write: Callable[[Activation], None],
        keys: int | None = None,
        selection: RowSelection | None = None,
        matching: frozenset[int] = frozenset(),
        rows_stay: bool = False,
    ) -> None:
        """`keys`: of a row of attention weights, those not seen are 0. `rows_stay`: on their device, not the host."""
        self.selectors = tuple(selectors)
        self.layout = layout
        self.selection = selection or RowSelection()
        self.lost: tuple[Overflow, ...] = ()
        """rows that became infinite in the dtype of the selection; known when the batch is finished"""
        self.parameter_at: Callable[[str], torch.Tensor] = no_parameters
        """the value of a parameter of the model, by its path; the engine that has the model sets it"""
        self.every_logit = any(is_place(selector.point) for selector in self.selectors)
        """whether somebody else reads or writes logits too, so that all of them are computed"""
        self._batch = BatchRows(layout, self.selection, matching)
        self._write, self._looks = write, True
        self._transfer, self.steps = Transfer(rows_stay), StepRows()
        self._collectors = [self.collector(selector, keys) for selector in self.selectors]
        self._features = KeptFeatures(self.selection)
        self._seen_in: list[int] = [-1] * len(self.selectors)
        """of each selector, the last forward pass that showed it"""
        self._static = False
        """whether the running pass has a cache with places for tokens to come"""
        self._one_each: tuple[int, int] | None = None
        """[batch, 1] of what a pass shows that `decodes`; else None"""
        self._left = 0
        """selectors that the running pass has not shown yet"""
        self._logit_columns: Sequence[int] | None = None
        """columns that the running pass computes logits of; None for all"""
        self._calls: dict[Any, int] = {}
        """watched boundary -> which call of it the running pass is in"""
        self._expected: dict[tuple[str, Side], int] = {}
        """boundary -> how often a pass crosses it, where layers run several times"""
        self._terms: dict[tuple[int, int], torch.Tensor] = {}
        """(selector, term) -> its tensor, of sums that are not complete"""
        self._no_rows: dict[int, torch.Tensor] = {}
        """of each selector, [0, ...] in the dtype and width of its rows"""
        self._targets: dict[tuple[str, Side], list[tuple[int, int, Term]]] = {}
        self.operations: dict[str, Term] = {}
        """the boundaries' paths that are not modules but operations in them -> a term there"""
        for number, selector in enumerate(self.selectors):
            for position, term in enumerate(selector.terms):
                self._targets.setdefault((term.at, term.side), []).append((number, position, term))
                if term.calls is not None:
                    self._expected[term.at, term.side] = term.calls
                if term.is_inside:
                    self.operations[term.at] = term

    @property
    def boundaries(self) -> tuple[tuple[str, Side], ...]:
        """The (path, side) pairs to watch, each once: of modules, and of the `operations` in them."""
        return tuple(self._targets)

    @cached_property
    def reads_logits(self) -> bool:
        """Whether logits are selected, which the model then computes for each row that is kept."""
        return any(selector.is_logits for selector in self.selectors)

    @property
    def generated(self) -> Sequence[int | None]:
        """Tokens that each row generated, end of sequence included; None while it still generates."""
        return self._batch.generated

    @property
    def columns(self) -> range:
        """The columns of the batch that the running pass is fed: without a cache, all of them again."""
        return self._batch.columns

    @property
    def kept(self) -> PassRows:
        """The rows that are kept of the running pass."""
        return self._batch.kept

    @property
    def looks(self) -> bool:
        """Whether the model runs for this observer now, and not for a callback of the user's."""
        return self._looks

    @property
    def saw_all(self) -> bool:
        """Whether the running pass has shown every selector, and need not be watched to its end."""
        return self._left == 0 and not self._expected  # that a layer runs once more is seen at the end only

    def begin_pass(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The model is called with these arguments. Raises CaptureError where they are not the next tokens."""
        if not self._looks:
            return
        self._end_pass()
        self._batch.begin_pass(args, kwargs)
        self._static = any(getattr(each, "is_compileable", False) is True for each in (*args, *kwargs.values()))
        self._left = len(self.selectors)
        if self._batch.decodes and not self.selection.features:
            self._one_each = (self._batch.kept.batch, 1)

    def logits(self, generating: bool, scattered: bool) -> Sequence[int] | None:
        """The columns that the pass which has begun must compute logits of; None for all. Only these will be shown.

        generating: the logits of the last column are read for the next token. scattered: the model can compute
        columns that are not contiguous; otherwise it computes all from the first needed one.
        """
        if self.every_logit:
            return None
        width, needed = self._batch.width or 0, set[int]()
        if self.reads_logits:
            needed = {self._batch.first_new + column for kept in self._batch.last_columns() for column in kept}
        if generating or not needed:
            needed.add(width - 1)
        columns = sorted(needed) if scattered else range(min(needed), width)
        self._logit_columns = None if len(columns) == width else columns
        return self._logit_columns

    def watcher(self, module: str, side: Side, of: Callable[[Selector], bool] | None = None) -> Watch:
        """What to call when the model passes this boundary. It copies what is selected before anything writes there.

        `of`: only these selectors; the other ones get a watcher of their own.
        """
        targets = tuple(t for t in self._targets[module, side] if of is None or of(self.selectors[t[0]]))
        boundary = (module, side, of)
        counts = any(term.call is not None for _, _, term in targets)

        def watch(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            if not self._looks:
                return
            if self._batch.width is None:
                raise CaptureError(f"{module or 'model'}.{side} was reached outside a forward pass of the model.")
            call = None
            if counts:
                call = self._calls[boundary] = self._calls.get(boundary, -1) + 1
            for number, position, term in targets:
                if term.call is None or term.call == call:
                    self._see(number, position, term, term.resolve(args, kwargs, output))

        if len(targets) == 1 and self._as_it_lies(targets[0][0], targets[0][2]):
            return self._in_few_steps(targets[0][0], targets[0][2], watch)
        return watch

    def _as_it_lies(self, number: int, term: Term) -> bool:
        """Whether a selector's tensor is a module's own, of which rows are taken and nothing else is done."""
        return term.bare and term.call is None and len(self.selectors[number].terms) == 1

    def _in_few_steps(self, number: int, term: Term, watch: Watch) -> Watch:
        """`watch`, with a short way for the passes that a generation has most of: it is called for each token."""
        batch, seen, own, steps = self._batch, self._seen_in, self._own_rows, self.steps
        first = term.side == "input" and term.index is None and term.heads is None
        collector: Any = self._collectors[number]

        def watch_a_step(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
            if self._one_each is not None and self._looks and seen[number] != batch.passes:
                tensor = args[0] if first and args else term.resolve(args, kwargs, output)
                waits = collector in steps.waiting  # what waits is held against its shape at the end of the pass
                if (waits or tensor.shape[:2] == self._one_each) and not tensor.requires_grad:
                    seen[number] = batch.passes
                    self._left -= 1
                    if own is not None:
                        tensor = own(tensor)
                    if waits:
                        steps.shown.append((collector, batch.kept, tensor, tensor._version))
                    else:
                        collector.take(batch.kept, tensor)
                    if not self._left:
                        steps.end()
                    return
            watch(args, kwargs, output)

        return watch_a_step

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the model may run for somebody else on this thread: a callback of the user's."""
        self._looks = False
        try:
            yield
        finally:
            self._looks = True

    def sampled(self, length: int, finished: Sequence[bool]) -> None:
        """The batch is `length` columns long now; the `finished` rows have got their last token."""
        self._batch.sampled(length, finished)

    def finish(self, columns: int) -> tuple[int, ...]:
        """The run is over and its rows are `columns` long. Returns how many tokens each row generated.

        Raises CaptureError where the forward passes were not fed all tokens but the last, and where rows became
        infinite in the dtype of the selection and the selection refuses that.
        """
        self._end_pass()
        counts = self._batch.finish(columns)
        for collector in self._collectors:
            collector.finish(self._batch.counts)
        self._transfer.finish()
        self.lost = tuple(self._overflows())
        if self.lost and self.selection.overflow == "refuse":
            told = in_words(self.lost, DTYPES[str(self.selection.dtype)])
            raise CaptureError(f"{told} Nothing of this batch is kept. overflow='warn' (--overflow warn) keeps them.")
        self._write_empty_samples()
        return counts

    def rows(self, row: int) -> tuple[int, tuple[int, ...] | Literal["mean"] | None]:
        """How many rows are kept of a row's sample, and of which positions, as `Sample.positions` states them."""
        return self._batch.of_sample(row)

    def _write_empty_samples(self) -> None:
        """A sample without rows is written too, with the width that its rows would have."""
        for row, count in enumerate(self._batch.counts):
            for number, no_rows in self._no_rows.items() if not count else ():
                key, sample = self.selectors[number].key, self.layout.samples[row]
                self._write(Activation(sample, key[0], key[1], 0, no_rows, call_of(key)))

    def _overflows(self) -> Iterator[Overflow]:
        for selector, collector in zip(self.selectors, self._collectors, strict=True):
            if self.selection.dtype is not None and (lost := collector.lost()):
                row, number = lost[0]
                _, positions = self._batch.of_sample(row)
                position = number if positions is None else None if positions == "mean" else positions[number]
                yield Overflow(tensor_name(selector.key), len(lost), self.layout.samples[row], position)

    def _see(self, number: int, position: int, term: Term, tensor: torch.Tensor) -> None:
        """One term has passed; the sum may be complete now. Raises CaptureError where it passed before."""
        selector = self.selectors[number]
        if self._seen_in[number] == self._batch.passes or (number, position) in self._terms:
            raise CaptureError(
                f"{selector}: {term.module or 'model'} was called more than once in forward pass {self._batch.passes}, "
                "expected once. A module that several layers share, or a layer that runs several times for this text, "
                "has no one tensor there: choose a point on a module that runs once."
            )
        tensor = self._new_columns(tensor, term, selector)
        if len(selector.terms) > 1:
            # Copied: what comes later in the pass may write over it.
            self._terms[number, position] = tensor.clone() if self._keeps(number) else tensor
            if any((number, other) not in self._terms for other in range(len(selector.terms))):
                return
            parts = [self._terms.pop((number, other)) for other in range(len(selector.terms))]
            tensor = self._sum(selector.terms, parts)
        elif not term.bare:
            tensor = term.times(tensor, self._parameter(term))
        self.show(number, tensor)

    def show(self, number: int, tensor: torch.Tensor) -> None:
        """A selector's tensor in the running pass, whole: [batch, new columns, ...], or those computed of logits."""
        if tensor.requires_grad and not self.with_graph:
            tensor = tensor.detach()
        self._seen_in[number] = self._batch.passes
        self._left -= 1
        if self._keeps(number):
            self._take(number, tensor)
        elif number not in self._no_rows:
            self._no_rows[number] = self._collectors[number].nothing(self._features(tensor))
        if not self._left:
            self.steps.end()

    def _sum(self, terms: Sequence[Term], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum in the order of the terms and in the tensors' own dtype: as the model adds them."""
        scaled = [term.times(tensor, self._parameter(term)) for term, tensor in zip(terms, tensors, strict=True)]
        total: torch.Tensor = scaled[0]
        for each in scaled[1:]:
            total = total + each.to(total.device)
        return total

    def _parameter(self, term: Term) -> torch.Tensor | None:
        return None if term.parameter is None else self.parameter_at(term.parameter)

    def _keeps(self, number: int) -> bool:
        """Whether rows of this selector are kept of the running pass."""
        return not self._batch.kept.empty

    def _take(self, number: int, tensor: torch.Tensor) -> None:
        """A selector is complete; `tensor`: [batch, new, ...], the model's own."""
        tensor = self._features(tensor)
        if number not in self._no_rows:
            self._no_rows[number] = self._collectors[number].nothing(tensor)
        self._collectors[number].take(self._rows_in(tensor), tensor)

    def _rows_in(self, tensor: torch.Tensor) -> PassRows:
        """The rows of this tensor that are kept: a tensor of logits may lack columns that nobody needs."""
        kept, computed = self._batch.kept, self._logit_columns
        if computed is None or tensor.shape[1] == kept.new:
            return kept
        index = {column - self._batch.first_new: number for number, column in enumerate(computed)}
        columns = tuple([index[column] for column in columns] for columns in self._batch.last_columns())
        return replace(kept, new=len(computed), columns=columns)

    def _new_columns(self, tensor: torch.Tensor, term: Term, selector: Selector) -> torch.Tensor:
        """A view of the columns that were fed for the first time: `[batch, new, ...]`."""
        kept, width, computed = self._batch.kept, self._batch.width or 0, self._logit_columns
        tensor = self._arranged(tensor, term, selector)
        if tensor.shape[0] != kept.batch or tensor.shape[1] != width:
            if computed is not None and selector.is_logits and tensor.shape[:2] == (kept.batch, len(computed)):
                return tensor
            raise CaptureError(
                f"{selector}: expected a tensor of [{kept.batch}, {width}, ...] "
                f"(batch, tokens fed), got {list(tensor.shape)}. "
                "Either the model computes other tokens than it is fed (its own padding, or a cache of its own: try "
                "use_cache=False), or the map was made for another version of it: run `hookmap discover` again."
            )
        return tensor if kept.new == width else tensor[:, -kept.new :]

    def _arranged(self, tensor: torch.Tensor, term: Term, selector: Selector) -> torch.Tensor:
        """A view of the rows of this layout: `[batch, width, ...]`."""
        if term.bare:
            return tensor
        self._refuse_empty_places(tensor, term, selector)
        found: torch.Tensor = term.arrange(tensor, self._batch.kept.batch, self._batch.width or 0)
        return found

    def _refuse_empty_places(self, tensor: torch.Tensor, term: Term, selector: Selector) -> None:
        """Raises CaptureError where a cache has places for tokens to come: which place is which token is not told."""
        if term.rows != "last" or term.flat:
            return
        batch, width, fed = self._batch.kept.batch, self._batch.width or 0, self._batch.kept.end
        held = replace(term, rows="all").arrange(tensor, batch, width).shape[1]
        by_place = term.operation is not None or is_place(selector.point)
        if held > width and (self._static or (by_place and held > fed)):
            raise CaptureError(
                f"{selector}: {held} positions after {fed} tokens: this cache has places for tokens to come, and which "
                "position is which token cannot be told. Generate without cache_implementation."
            )

    def _end_pass(self) -> None:
        """Raises CaptureError where the running pass did not show every selector."""
        if self._batch.width is None:
            return
        running, width = self._batch.passes, self._batch.width
        self._batch.end_pass()
        self._one_each = None
        if self._left:
            missing = [str(s) for number, s in enumerate(self.selectors) if self._seen_in[number] != running]
            raise CaptureError(
                f"forward pass {running} of {width} tokens did not reach {len(missing)} of "
                f"{len(self.selectors)} selectors:\n" + "\n".join(f"  - {text}" for text in missing) + "\n"
                "The model skipped these modules, or the map is another model's: run `hookmap verify`."
            )
        for (module, side, _), last in self._calls.items():
            if (expected := self._expected.get((module, side))) not in (None, last + 1):
                raise CaptureError(
                    f"{module or 'model'} was called {last + 1} times in forward pass {running}, expected {expected}: "
                    "this layer runs more often for this text than the map says, so its last run is another one. "
                    "Name points of layers that run as often for every text."
                )
        self._calls.clear()
        self._logit_columns = None

    def collector(self, selector: Selector, keys: int | None) -> Collector:
        """What takes the rows of a selector, pass by pass. `keys`: see `__init__`."""
        return collector_of(selector, keys, self.layout, self.selection, self._transfer, self.steps, self._write)
