"""One forward pass over texts, and one backward pass: the gradient of a metric at each point, beside its values."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hookmap.activations import Activation, Sink
from hookmap.capture.batches import Harvesting, fed, layout_of, without_loss
from hookmap.capture.engines.collectors import Collector
from hookmap.capture.engines.hooks import HooksEngine
from hookmap.capture.engines.local_graph import LocalGraph
from hookmap.capture.engines.model_lock import lock_of
from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import BatchLayout, PassRows
from hookmap.capture.engines.taps import Taps
from hookmap.capture.overflow import RowNumber
from hookmap.capture.rows import row_selection
from hookmap.loading.modules import evaluating
from hookmap.maps.selectors import Selector

MetricOfRows = Callable[[torch.Tensor, int], torch.Tensor]
"""(logits [n, d_vocab] of one sample, its number) -> a number, without axes"""


@dataclass
class Differentiating(Harvesting):
    """A batch is one forward and one backward pass over texts, padded on the right."""

    metric: MetricOfRows = field(kw_only=True)
    logits: Selector = field(kw_only=True)
    positions: str = field(kw_only=True)
    """of the logits that the metric reads, in the words of a capture"""
    gradients: Sink = field(kw_only=True)
    begin: Selector | None = None
    """where the graph begins, unless at the first point"""
    measured: dict[int, float] = field(default_factory=dict)
    """the metric of each sample"""
    local: Callable[[LocalGraph], None] | None = None
    """asks for derivatives between the points of a batch, before its graph is freed"""

    def batch(self, numbers: Sequence[int], sink: Sink) -> None:
        try:
            self._batch(numbers, sink)
        except torch.OutOfMemoryError:
            self.gradients.abandon()
            raise

    def _batch(self, numbers: Sequence[int], sink: Sink) -> None:
        prompts = [self.prompts[number] for number in numbers]
        layout = layout_of(numbers, prompts, right=True)
        observer, gradients = self._observer(layout, sink), self._observer(layout, self.gradients)
        logits = _Logits(self.logits, layout, self.positions, self.matching)
        editor = self._editor(observer)
        taps = Taps(self.selectors, self.begin, gradients, logits)
        every = [observer, gradients, logits, *(() if editor is None else editor.observers)]
        all_logits = sum(each.reads_logits for each in every) > 1
        for each in every:
            each.every_logit |= all_logits or any(edit.selector.is_logits for edit in self.edits)
        inputs = fed(self, prompts, layout, 0) | {"use_cache": False, **without_loss(self.engine.root)}
        assert isinstance(self.engine, HooksEngine)
        with differentiated(self.engine.module), self._turn(), torch.enable_grad():
            self.engine.differentiate(observer, inputs, editor, taps)
            found = [self.metric(logits.found[row], number) for row, number in enumerate(numbers)]
            taps.differentiate(torch.stack(found).sum(), self.engine.module, keep=self.local is not None)
            if self.local is not None:
                self.local(LocalGraph(taps, layout))
        self.measured.update(zip(numbers, (float(value.detach()) for value in found), strict=True))
        for each in (observer, gradients):
            each.finish(layout.width)
            self._count(each)
        if editor is not None:
            editor.finish()
        for row, prompt in enumerate(prompts):
            self._finish(sink, observer, row, prompt, [])
            self._finish(self.gradients, gradients, row, prompt, [])


class _Logits(Observer):
    """Gives the logits that a metric reads, with autograd's graph."""

    with_graph = True

    def __init__(self, selector: Selector, layout: BatchLayout, positions: str, matching: frozenset[int]) -> None:
        self.found: dict[int, torch.Tensor] = {}
        """row of the batch -> [n, d_vocab]"""
        chosen = row_selection(positions=positions)
        super().__init__((selector,), layout, _nothing, selection=chosen, matching=matching)

    def collector(self, selector: Selector, keys: int | None) -> Collector:
        return _Held(self.found)


@dataclass(frozen=True)
class _Held:
    """See `Collector`."""

    rows: dict[int, torch.Tensor]

    def take(self, rows: PassRows, tensor: torch.Tensor) -> None:
        self.rows.update((row, tensor[row, list(columns)]) for row, columns in enumerate(rows.columns))

    def nothing(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(0)

    def finish(self, counts: Sequence[int]) -> None: ...

    def lost(self) -> list[RowNumber]:
        return []


@contextlib.contextmanager
def differentiated(module: nn.Module) -> Iterator[None]:
    """Inside, this thread alone runs the model, evaluating, with gradients of everything but its parameters."""
    with lock_of(module).exclusive(), evaluating(module):
        wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)


class Saved:
    """Counts the bytes that autograd keeps for the backward pass, each piece of memory once."""

    def __init__(self, module: nn.Module) -> None:
        """`module`: whose parameters and buffers are not counted."""
        held = (*module.parameters(), *module.buffers())
        self._own = {each.untyped_storage().data_ptr() for each in held}
        self._kept: dict[int, Any] = {}

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, what is saved is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._kept[storage.data_ptr()] = storage
        return tensor


def _nothing(activation: Activation) -> None: ...
