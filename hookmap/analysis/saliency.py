"""Which tokens a metric depends on: integrated gradients, gradient times activation, and the gradient's norm."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from hookmap.analysis.gradients import planned
from hookmap.analysis.grid import Grid
from hookmap.analysis.metrics import Bound, bind, encoded, measure_and_capture
from hookmap.analysis.sides import check_steps, middles, read, refuse_infinite, written
from hookmap.analysis.tokens import token_texts
from hookmap.capture.batches import harvest_batches
from hookmap.capture.options import MeasureOptions, with_defaults
from hookmap.errors import InterventionError, SelectionError
from hookmap.maps.selectors import Selector
from hookmap.wording import counted

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

log = logging.getLogger("hookmap")

Method = Literal["integrated_gradients", "gradient_x_activation", "gradient_norm"]
_COMPLETE = 0.05
"""the largest gap, relative to the difference that is split, that is not warned of"""


@dataclass(frozen=True)
class Saliency:
    """One number for each token of each prompt."""

    scores: tuple[torch.Tensor, ...]
    """of each prompt, float32 [pos]"""
    tokens: tuple[tuple[str, ...], ...]
    """of each prompt, the texts of the tokens that the model read: those of an answer too, where the metric has one"""
    metric: torch.Tensor
    """of each prompt"""
    baseline: torch.Tensor | None
    """the metric at the baseline, of each prompt; None where the method has no baseline"""
    method: Method
    name: str
    """what the metric is, in words"""
    point: str
    layer: int | None
    steps: int = 1

    @property
    def gap(self) -> torch.Tensor | None:
        """How far integrated gradients miss what they must sum to, metric minus baseline: a share of it, [prompts]."""
        if self.baseline is None:
            return None
        whole = self.metric - self.baseline
        return (torch.stack([each.sum() for each in self.scores]) - whole).abs() / whole.abs()

    def grid(self, sample: int = 0) -> Grid:
        """The scores of one prompt, [1, positions], for tables and pictures."""
        words = self.method.replace("_x_", " × ").replace("_", " ")
        layer = -1 if self.layer is None else self.layer
        places = tuple(range(len(self.scores[sample])))
        return Grid(
            self.scores[sample][None], (layer,), places, self.tokens[sample], f"{words}, {self.name}", self.point
        )

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        about = {name: getattr(self, name) for name in ("method", "name", "point", "layer", "steps")}
        numbers = {name: None if each is None else each.tolist() for name, each in self._numbers().items()}
        prompts = [
            {"tokens": list(tokens), "scores": scores.tolist()}
            for tokens, scores in zip(self.tokens, self.scores, strict=True)
        ]
        return {**about, **numbers, "prompts": prompts}

    def _numbers(self) -> dict[str, torch.Tensor | None]:
        return {"metric": self.metric, "baseline": self.baseline, "gap": self.gap}

    def __repr__(self) -> str:
        gap = "" if self.gap is None else f"; they miss the metric's difference by {float(self.gap.max()):.2g} of it"
        return f"<Saliency, {self.method} of {self.name}: {counted(len(self.scores), 'prompt')}{gap}>"


def saliency(
    hm: Hooked,
    prompts: Any,
    metric: Any,
    method: Method = "integrated_gradients",
    *,
    point: str = "embed",
    layer: int | None = None,
    baseline: Any = None,
    steps: int = 64,
    **options: Any,
) -> Saliency:
    """See `HookedModel.saliency`."""
    if method not in get_args(Method):
        raise SelectionError(f"method {method!r}: expected one of {', '.join(get_args(Method))}.")
    integrates = method == "integrated_gradients"
    check_steps(steps)
    if baseline is not None and not integrates:
        raise SelectionError(f"baseline is of integrated gradients, and {method} has none: leave it out.")
    chosen = with_defaults(MeasureOptions, options)
    bound = bind(hm, metric, encoded(hm, prompts, options))
    selector = _selector(hm, point, layer, integrates)
    zeros = isinstance(baseline, int) and baseline == 0
    other = None if baseline is None or zeros else bind(hm, metric, _baselines(hm, baseline, bound, options))
    lengths = [len(prompt.token_ids) for prompt in bound.prompts]
    if other is not None and lengths != [len(prompt.token_ids) for prompt in other.prompts]:
        raise SelectionError("baseline: expected prompts of as many tokens as those that are explained, each its own.")
    scores: dict[int, torch.Tensor] = {}
    ends: dict[int, tuple[float, float]] = {}
    for numbers in harvest_batches(lengths, chosen["batch_tokens"], chosen["batch_size"]):
        own, start = bound.of(numbers), None if other is None else other.of(numbers)
        found = _integrated(hm, own, start, zeros, selector, steps) if integrates else _local(hm, own, selector, method)
        for number, score, *both in zip(numbers, *found, strict=True):
            scores[number], ends[number] = score, (float(both[0]), float(both[1]))
    ordered = [scores[number] for number in range(len(lengths))]
    refuse_infinite(ordered, "a token's score")
    whole, zero = torch.tensor([ends[number] for number in range(len(lengths))]).T
    texts = tuple(token_texts(hm, p.token_ids, range(len(p.token_ids)), p.image_positions) for p in bound.prompts)
    made = Saliency(
        tuple(ordered), texts, whole, zero if integrates else None, method, bound.name, selector.point,
        selector.layer, steps if integrates else 1,
    )  # fmt: skip
    if made.gap is not None and not bool((made.gap <= _COMPLETE).all()):
        log.warning(
            "integrated gradients miss the metric's difference by %.2g of it, for %d of %d prompts by more than %g: "
            "give more steps (%d now)",
            float(made.gap.max()), int((made.gap > _COMPLETE).sum()), len(ordered), _COMPLETE, steps,
        )  # fmt: skip
    return made


def _selector(hm: Hooked, point: str, layer: int | None, writes: bool) -> Selector:
    """Raises SelectionError, and InterventionError where the point is to be written and must not be."""
    found = hm.selectors([point], "all" if layer is None else [layer])
    if len(found) != 1:
        raise SelectionError(f"{point} is a tensor of each layer, and of each of its runs: say which, as in layer=8.")
    if writes and (reason := hm.proofs.of(found[0]).reason) is not None:
        raise InterventionError(f"{point} is not written, which integrated gradients do: {reason}.")
    return found[0]


def _baselines(hm: Hooked, given: Any, bound: Bound, options: Any) -> Sequence[Any]:
    """One prompt for each that is explained."""
    found = encoded(hm, given, options)
    if len(found) not in (1, len(bound.prompts)):
        raise SelectionError(f"baseline: expected one prompt, or {len(bound.prompts)}, one for each, got {len(found)}.")
    return list(found) * len(bound.prompts) if len(found) == 1 else found


Found = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]
"""of each prompt of a batch its scores, its metric, and the metric at its baseline"""


def _integrated(hm: Hooked, bound: Bound, other: Bound | None, zeros: bool, selector: Selector, steps: int) -> Found:
    where, options = _where(selector), _whole(bound)
    metric, run = measure_and_capture(hm, bound, **where, **options)
    count, key = range(len(bound.prompts)), selector.key
    ends = [read(run, number, key) for number in count]
    # A norm reads only a direction: on the way from zeros everything would change at once, at their very end.
    starts = [torch.zeros_like(each) if zeros else each.mean(0, keepdim=True).expand_as(each) for each in ends]
    if other is not None:
        _, begun = measure_and_capture(hm, other, **where, **options)
        starts = [read(begun, number, key) for number in count]

    def at(share: float) -> Any:
        return written(selector, [one + share * (end - one) for one, end in zip(starts, ends, strict=True)])

    zero, _ = measure_and_capture(hm, bound, (), interventions=at(0.0), **options)
    scores = [torch.zeros(len(each)) for each in ends]
    for share in middles(steps):
        plan = planned(hm, None, bound, **where, options={**options, **_calls(selector), "interventions": at(share)})
        plan.checked()
        gradients, _ = plan.all()
        for number in count:
            moved = (ends[number] - starts[number]) * read(gradients, number, key)
            scores[number] = scores[number] + moved.flatten(1).sum(1) / steps
    return scores, metric, zero


def _local(hm: Hooked, bound: Bound, selector: Selector, method: Method) -> Found:
    plan = planned(hm, None, bound, **_where(selector), options={**_whole(bound), **_calls(selector)})
    plan.checked()
    gradients, values = plan.all()
    scores = []
    for number in range(len(bound.prompts)):
        gradient = read(gradients, number, selector.key).flatten(1)
        if method == "gradient_norm":
            scores.append(gradient.norm(dim=1))
        else:
            scores.append((gradient * read(values, number, selector.key).flatten(1)).sum(1))
    return scores, plan.measured, plan.measured


def _where(selector: Selector) -> dict[str, Any]:
    return {"points": [selector.point], "layers": "all" if selector.layer is None else [selector.layer]}


def _calls(selector: Selector) -> dict[str, Any]:
    return {"calls": selector.call or 0}


def _whole(bound: Bound) -> dict[str, Any]:
    """The options that make one batch of these prompts."""
    count = len(bound.prompts)
    return {"batch_size": count, "batch_tokens": count * max(len(prompt.token_ids) for prompt in bound.prompts)}
