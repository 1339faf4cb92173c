"""The gradient of a metric at each point, for each sample and position, beside the values of the same pass."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hookmap.activations import Key, Sample
from hookmap.analysis.metrics import Bound, bind, encoded
from hookmap.capture.differentiating import Differentiating, Saved
from hookmap.capture.estimate import in_words
from hookmap.capture.interventions.writable import mode_of
from hookmap.capture.options import GradientOptions, MeasureOptions, TemplateOptions, of_kind, options_of, with_defaults
from hookmap.capture.prepare import Prepared, say_apart
from hookmap.capture.result import Capture
from hookmap.capture.rows import RowSelection
from hookmap.capture.run import reads_attention
from hookmap.errors import CaptureError, SelectionError
from hookmap.loading.encoder_decoder import is_encoder_decoder
from hookmap.loading.encoder_prompts import as_decoder_reads
from hookmap.loading.memory import available
from hookmap.loading.prompts import Prompt
from hookmap.maps.selectors import Selector, select
from hookmap.stores.memory import MemoryStore

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

log = logging.getLogger("hookmap")
_LENGTHS = (8, 16, 32)
"""tokens of the texts that a graph is measured on"""
_ROUNDING = {torch.bfloat16: "1 %", torch.float16: "0.1 %"}
_sizes: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[float, float, float]]] = weakref.WeakKeyDictionary()
"""root -> what each graph takes"""


@dataclass(frozen=True)
class GradientEstimate:
    """The memory that gradients take, before they are computed."""

    graph: int
    """bytes that autograd keeps for the largest batch, from the first point on"""
    rows: int
    """bytes of all gradients and values"""
    begins: str
    """where the graph begins"""

    def __str__(self) -> str:
        return f"graph of about {in_words(self.graph)} from {self.begins} on; rows of up to {in_words(self.rows)}"


@dataclass(frozen=True)
class Gradients:
    """d metric / d point of each row, like a capture's tensors; `values` has those of the same pass."""

    gradients: Capture
    values: Capture
    metric: torch.Tensor
    """of each prompt, float32"""
    name: str
    """what the metric is, in words"""
    expected: GradientEstimate
    note: str = ""
    """what the model's dtype does to them; empty in float32 and float64"""

    @property
    def keys(self) -> tuple[Key, ...]:
        """As of a capture."""
        return self.gradients.keys

    @property
    def samples(self) -> Sequence[Sample]:
        """As of a capture; `token_ids` are those that the model read: the answer too, where the metric has one."""
        return self.gradients.samples

    def __getitem__(self, where: str | Key) -> torch.Tensor | list[torch.Tensor]:
        """`g["resid_post", 8]`: [batch, pos, d], or a list of [pos, d], as of a capture."""
        return self.gradients[where]

    def read(self, sample: int, point: str, layer: int | None = None, call: int | None = None) -> torch.Tensor:
        """The gradients of one sample, [pos, d]."""
        return self.gradients.read(sample, point, layer, call)

    def __repr__(self) -> str:
        what = repr(self.gradients).removeprefix("<Capture of ")[:-1]
        return f"<Gradients of {self.name}: {what}{self.note and '; '}{self.note}>"


def gradients(
    hm: Hooked, prompts: Any, metric: Any, points: Any = "resid_post", layers: Any = "all", **options: Any
) -> Gradients:
    """See `HookedModel.gradients`."""
    plan = planned(hm, prompts, metric, points, layers, options)
    expected = plan.checked()
    note = ""
    dtype = next(hm.root.parameters()).dtype
    if dtype in _ROUNDING:
        name = str(dtype).removeprefix("torch.")
        note = f"computed in {name}, which rounds them by about {_ROUNDING[dtype]} of their size"
        log.warning('%s: open the model in float32 for exact ones, dtype="float32"', note)
    found, values = plan.all()
    return Gradients(found, values, plan.measured, plan.bound.name, expected, note)


def estimate_gradients(
    hm: Hooked, prompts: Any, metric: Any, points: Any = "resid_post", layers: Any = "all", **options: Any
) -> GradientEstimate:
    """See `HookedModel.estimate_gradients`."""
    return planned(hm, prompts, metric, points, layers, options).estimate()


@dataclass(frozen=True)
class Plan:
    """Forward and backward passes that are planned and checked, but have not run."""

    hm: Hooked
    run: Differentiating
    prepared: Prepared
    bound: Bound

    def checked(self) -> GradientEstimate:
        """The estimate, which the log gets too. Raises CaptureError where it is more than the memory."""
        expected = self.estimate()
        log.info("gradients: %s", expected)
        check_room(expected, self.run.device)
        say_apart(self.prepared.apart)
        return expected

    def all(self) -> tuple[Capture, Capture]:
        """Run every batch: the gradients, and the values of the same passes."""
        run, keys = self.run, [selector.key for selector in self.run.selectors]
        values, found = MemoryStore(keys), MemoryStore(keys)
        run.gradients = found
        run.all(self.prepared.groups, values)
        first, second = (Capture(each, run.selectors, self.hm.map, self.prepared.manifest) for each in (found, values))
        return first, second

    @property
    def measured(self) -> torch.Tensor:
        """The metric of each prompt, once all have run."""
        return torch.tensor([self.run.measured[number] for number in range(len(self.bound.prompts))])

    def estimate(self) -> GradientEstimate:
        """Measures the graph on short texts, and extends it to the largest batch."""
        start, tokens, pairs = _size_of(self.hm, self.run)
        lengths = [len(prompt.token_ids) for prompt in self.run.prompts]
        batches = [(len(group), max(lengths[number] for number in group)) for group in self.prepared.groups]
        graph = max(start + rows * (tokens * width + pairs * width**2) for rows, width in batches)
        begins = self.run.begin or self.run.selectors[0]
        where = begins.point + ("" if begins.layer is None else f" of layer {begins.layer}")
        return GradientEstimate(int(graph), 2 * self.prepared.expected.bytes, where)


def planned(hm: Hooked, prompts: Any, metric: Any, points: Any, layers: Any, options: Mapping[str, Any]) -> Plan:
    """Plans `gradients`; `metric` may be bound already, `prompts` are not read then. Raises what it raises."""
    chosen = with_defaults(GradientOptions, options)
    bound = (
        metric
        if isinstance(metric, Bound)
        else bind(hm, metric, encoded(hm, prompts, of_kind(MeasureOptions, options)))
    )
    given = {name: value for name, value in chosen.items() if name not in options_of(TemplateOptions)}
    prepared = hm.prepare(list(bound.prompts), points, layers, 0, **{**given, "prompt_column": None, "engine": "hooks"})
    for selector in prepared.run.selectors:
        if any(term.through or term.experts for term in selector.terms):
            raise CaptureError(
                f"{selector}: the model holds no such tensor, and it has no gradient: take that of z or of mlp_out."
            )
    held = {each.name: getattr(prepared.run, each.name) for each in fields(prepared.run)}
    run = Differentiating(
        **held,
        metric=bound,
        logits=_logits(hm),
        positions=bound.positions,
        gradients=MemoryStore(()),
        begin=_begin(hm, prepared.run.selectors),
    )
    return Plan(hm, run, prepared, bound)


def _logits(hm: Hooked) -> Selector:
    """Raises SelectionError where the model has none."""
    [found] = hm.map.selectors(["logits"])
    return found


def _begin(hm: Hooked, selectors: Sequence[Selector]) -> Selector | None:
    """Where the graph begins: before the first point, unless that is what a module reads, and so a beginning itself."""
    first = selectors[0]
    term = first.terms[0]
    reads = term.side == "input" and term.operation is None
    if first.layer is None or (len(first.terms) == 1 and reads and mode_of(first) == "replace"):
        return None
    for point, layer, call in (("resid_pre", first.layer, first.call or 0), ("embed", None, 0)):
        if hm.map.unavailable(point, layer) is None:
            [found] = select(hm.map, [point], "all" if layer is None else [layer], [call])
            if len(found.terms) == 1 and mode_of(found) == "replace":
                return found
    raise SelectionError(f"{first}: neither the stream that enters its layer nor the embedding is at one module.")


def _size_of(hm: Hooked, run: Differentiating) -> tuple[float, float, float]:
    """Bytes of the graph of n tokens: start + tokens * n + pairs * n * n. Measured once for each beginning."""
    begins, eager = run.begin or run.selectors[0], reads_attention(run.selectors)
    key = (begins.key, len(run.selectors), eager, run.positions)
    sizes = _sizes.setdefault(hm.root, {})
    if key not in sizes:
        measured = []
        for length in _LENGTHS:
            ids = tuple(token % hm.vocabulary for token in range(1, length + 1))
            prompt = as_decoder_reads(Prompt("", ids), hm.root) if is_encoder_decoder(hm.root) else Prompt("", ids)
            saved, stores = Saved(hm.model), [MemoryStore(s.key for s in run.selectors) for _ in range(2)]
            trial = replace(
                run, prompts=[prompt], metric=lambda logits, sample: logits.sum(), gradients=stores[0], progress=None,
                edits=(), watches=(), measured={}, selection=RowSelection(), matching=frozenset(),
            )  # fmt: skip
            with saved.counting():
                trial.batch([0], stores[1])
            measured.append(float(saved.bytes))
        powers = torch.tensor([[1.0, n, n * n] for n in _LENGTHS], dtype=torch.float64)
        solved = torch.linalg.solve(powers, torch.tensor(measured, dtype=torch.float64)).clamp_min(0).tolist()
        sizes[key] = (solved[0], solved[1], solved[2])
    return sizes[key]


def check_room(expected: GradientEstimate, device: torch.device) -> None:
    """Raises CaptureError where the graph and the rows are more than the memory that is free."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available()
    needed = expected.graph + (0 if device.type == "cuda" else expected.rows)
    if needed > free:
        raise CaptureError(
            f"these gradients need about {in_words(needed)} of memory ({expected}), and {in_words(free)} is free: ask "
            "for later layers, where the graph begins later, or give a smaller batch_tokens."
        )
