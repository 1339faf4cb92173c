"""Locates a value: the module input or output that exposes it, or an exact sum of such tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch

from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.layer_list import Rows
from hookmap.discovery.linear_steps import Step, Summand, steps, summands
from hookmap.discovery.values import Exposure, Values
from hookmap.maps.templates import TermTemplate

NOWHERE = "no module boundary exposes it"
_MOST_TERMS = 3
"""of a sum that is exact up to rounding only"""


@dataclass(frozen=True)
class Location:
    """Where a value is found, when it is complete, and what shows it."""

    terms: tuple[TermTemplate, ...]
    """the module boundaries whose sum it is"""
    time: int
    evidence: str
    beside: tuple[TermTemplate, ...] = ()
    """other tensors that the branch which reads it reads"""
    write: TermTemplate | None = None
    """where it is written, if not where it is read"""

    def with_terms(self, **update: object) -> Location:
        """The same location, with these fields in each of its terms."""
        return replace(self, terms=tuple(term.model_copy(update=update) for term in self.terms))


class Locator:
    """Locates values inside one call: of a block, or of the model itself."""

    def __init__(
        self, values: Values, within: ModuleCall, seq: int, templates: dict[str, str] | None = None, rows: Rows = "all"
    ) -> None:
        """`templates`: path of each module of this block that is in a numbered list -> its template."""
        self.values, self.within, self.seq, self.templates, self.rows = values, within, seq, templates, rows
        self.calls_of = _calls_of(values)

    def locate(self, value: int, prefer: str = "output") -> Location | None:
        """A boundary that exposes the value; else its multiple, a flat boundary, or the sum that the model computes."""
        exposures = self.places(value)
        whole = [e for e in exposures if not _is_flat(e)]
        if whole:
            return self.at(min(whole, key=lambda e: self._rank(e, prefer)))
        composed = self._composed(value)
        if exposures and (composed is None or len(composed.terms) > 1):
            return self.at(min(exposures, key=lambda e: self._rank(e, prefer)))
        return composed

    def at_root(self, value: int) -> Location:
        """The location of a value in the output of the whole model."""
        return self.at(next(e for e in self.places(value)[::-1] if e.call is self.within))

    def places(self, value: int) -> list[Exposure]:
        """The boundaries in this call where a hook gets the value, in the order of the forward pass."""
        return [each for each in self.values.exposures.get(value, []) if self._is_usable(each)]

    def at(self, exposure: Exposure) -> Location:
        """The location of one boundary."""
        index = exposure.place
        calls = self.calls_of[id(exposure.call.module)]
        term = TermTemplate(
            module=self.templated(exposure.call.path),
            side=exposure.side,
            index=0 if exposure.side == "input" and index is None else index,
            flat=_is_flat(exposure),
            axes=unusual_axes(exposure.shape, self.seq),
            rows=self.rows,
            call=calls.index(exposure.call) if len(calls) > 1 else None,
        )
        name = type(exposure.call.module).__name__
        what = "enters" if exposure.side == "input" else "leaves"
        return Location((term,), exposure.time, f"the tensor that {what} {name}")

    def before_widening(self, value: int) -> Iterator[int]:
        """The value, and those with the same numbers in narrower dtypes that it was cast from."""
        yield value
        while (op := self.values.producers.get(value)) is not None and op.name == "_to_copy":
            (source,) = self.values.operands(op)[:1]
            if not self._widens(source, value):
                return
            value = source
            yield value

    def difference(self, after: int, before: int) -> Location | None:
        """after - before, where each has a boundary of its own; exact up to the rounding of the model's addition."""
        a, b = self.locate(after), self.locate(before)
        return None if a is None or b is None else minus(a, b)

    def combination(
        self, values: Collection[int], factor: float, gate: int | None, states: Collection[int]
    ) -> Location | None:
        """factor * gate * the sum of the values: a sum of boundaries times constants, exact up to rounding.

        `states`: the stream, which may be in the sum, too.
        """
        gates = () if gate is None else (gate,)
        parts = [each for value in values for each in summands(self.values, self.within, value, states)]
        parts = [replace(each, factor=factor * each.factor, gates=gates + each.gates) for each in parts]
        found = [(each, self.locate(each.value, "input" if each.value in states else "output")) for each in parts]
        if any(place is None for _, place in found):
            return None
        scaled = [_scaled(place, each.factor) for each, place in found if place is not None]
        gated = [self._gated(place, each) for (each, _), place in zip(found, scaled, strict=True)]
        terms = tuple(term for place in gated if place is not None for term in place.terms)
        if None in gated or not terms or len(terms) > _MOST_TERMS or (len(terms) > 1 and any(t.flat for t in terms)):
            return None
        what = "the sum of these tensors" if len(terms) > 1 else scaled[0].evidence
        return Location(terms, max(place.time for place in scaled), f"{what}, times what the block multiplies them by")

    def _gated(self, place: Location, summand: Summand) -> Location | None:
        """The location times the one parameter that multiplies it: a number, or one for each feature."""
        if not summand.gates:
            return place
        weight = self.parameter(summand.gates[0], summand.value)
        if len(summand.gates) > 1 or weight is None or any(t.weight for t in place.terms):
            return None
        return place.with_terms(weight=weight)

    def parameter(self, value: int, of: int) -> str | None:
        """The template of the path of the parameter that holds a value, also as a cast that only widens it.

        None where there is none, or where it is neither a number nor has one for each feature of `of`.
        """
        shape = self.values.shape(value)
        if not prod(shape) == (shape[-1] if shape else 1) in (1, self.values.shape(of)[-1]):
            return None
        path = self.values.parameters.get(list(self.before_widening(value))[-1])
        return None if path is None else self.templated(path)

    def templated(self, path: str) -> str:
        """The path with this block's number as `{i}`."""
        for own, template in (self.templates or {}).items():
            if path == own or path.startswith(own + "."):
                return template + path[len(own) :]
        return path

    # Boundaries -----------------------------------------------------------------------------------------------------

    def _is_usable(self, exposure: Exposure) -> bool:
        """Whether a hook there gets this block's value, with positions that can be told apart."""
        call = exposure.call
        if call.enter < self.within.enter or self.within.exit < call.exit:
            return False
        # A module that several layers share is no place of one layer's, except where all of the block is shared.
        one_layers = self.is_of_one_layer(call)
        input_of_model = exposure.side == "input" and call is self.within and self.templates is None
        has_positions = self.seq in (exposure.shape[:-1] or exposure.shape)
        lost = (self._is_turned and _is_flat(exposure)) or self._has_copies(exposure)
        return one_layers and not input_of_model and has_positions and not lost

    def is_of_one_layer(self, call: ModuleCall) -> bool:
        """Whether the module belongs to this layer alone, or all of the block is shared."""
        return self._is_shared or self._paths(call) == 1

    def _has_copies(self, exposure: Exposure) -> bool:
        """Whether several rows of the batch are of one sequence there: [copies * batch, pos, d]."""
        shape = exposure.shape
        return len(shape) == 3 and self.seq in shape[:-1] and not has_batch(shape, self.seq)

    def why_nowhere(self, *values: int) -> str:
        """The reason why no boundary in this call exposes any of these values."""
        places = [place for value in values for place in self.values.exposures.get(value, [])]
        places = [e for e in places if self.within.enter <= e.call.enter and e.call.exit <= self.within.exit]
        if any(map(self._has_copies, places)):
            return "several rows of the batch are of one sequence there: copies of it"
        if shared := [e.call.path for e in places if not self._is_shared and self._paths(e.call) > 1]:
            path = self.templated(min(shared, key=lambda path: path.count(".")))
            return f"only {path} has it, which serves several layers: no path says whose call it is"
        return next(filter(None, map(self._computed, values)), NOWHERE)

    def _computed(self, value: int) -> str | None:
        """Which operation makes a value that no module hands over; None where none does."""
        op = self.values.producers.get(value)
        if op is None or op.call < 0:
            return None
        call = self.values.flow.calls[op.call]
        where = f"the operation `{op.name}` in the forward of {self.templated(call.path) or 'the model'} computes it"
        if call.exit < self.within.enter:
            return f"{where}, before this layer begins"
        if call.enter < self.within.enter:
            return f"{where}, which runs every layer in turn: no place there is one layer's"
        shape = self.values.shape(op.outputs[0])
        return f"no module hands it over: {where}, as a tensor of {', '.join(map(self._axis, shape))}"

    def _axis(self, size: int) -> str:
        return "tokens" if size == self.seq else str(size)

    @cached_property
    def _is_shared(self) -> bool:
        """Whether this block stands in its list several times: only the number of the call tells its layers apart."""
        return self.templates is not None and self._paths(self.within) > 1

    def _paths(self, call: ModuleCall) -> int:
        return len({each.path for each in self.calls_of[id(call.module)]})

    @cached_property
    def _is_turned(self) -> bool:
        """Whether positions stand before the batch: where both are one axis, [pos * batch, ...], neither is found."""
        shapes = [self.values.shape(tensor) for tensor in self.within.entered.values()]
        return any(len(shape) == 3 and shape[:2] == (self.seq, 1) for shape in shapes)

    def _rank(self, exposure: Exposure, prefer: str) -> tuple[bool, bool, int, int]:
        if self.templates is None:  # around the blocks, the module that makes the tensor is the clearest place
            return (exposure.side != prefer, False, 0, exposure.time)
        return (exposure.call is not self.within, exposure.side != prefer, exposure.call.path.count("."), exposure.time)

    # Sums -----------------------------------------------------------------------------------------------------------

    def _composed(self, value: int) -> Location | None:
        """The value as a multiple or a sum of located values, exactly as the model computes it."""
        if not self.values.made_in(value, self.within):
            return None
        for step in steps(self.values, value):
            if step.kind == "cast" and self._is_exact(step):
                return self.locate(step.source)
            if step.kind == "scale" and (found := self._multiple(step)) is not None:
                return found
            if step.kind == "add" and (found := self._sum(step)) is not None:
                return found
        return None

    def _multiple(self, step: Step) -> Location | None:
        inner = self.locate(step.source)
        if step.factor is None or inner is None or len(inner.terms) != 1:
            return None
        return replace(_scaled(inner, step.factor), evidence=f"{inner.evidence}, times {step.factor:g}")

    def _sum(self, step: Step) -> Location | None:
        if step.branch is None or not step.factor == 1.0 == step.source_factor:
            return None
        left, right = self.locate(step.source), self.locate(step.branch)
        # A sum is computed term by term: it comes out to the bit only where its second operand is one term.
        if not left or not right or len(right.terms) != 1 or any(t.flat for t in left.terms + right.terms):
            return None
        return Location(left.terms + right.terms, max(left.time, right.time), "the sum that the block itself computes")

    def _is_exact(self, step: Step) -> bool:
        """Whether a cast only widens: the numbers are the same."""
        return self.values.producers[step.result].name == "_to_copy" and self._widens(step.source, step.result)

    def _widens(self, source: int, result: int) -> bool:
        before, after = (self.values.flow.tensors[v].dtype for v in (source, result))
        return torch.promote_types(before, after) == after


def minus(after: Location, before: Location) -> Location | None:
    """What an addition to the stream adds; None where that would be a sum of many tensors, or of flat ones."""
    if len(terms := after.terms + before.terms) > _MOST_TERMS or any(term.flat for term in terms):
        return None
    evidence = "difference of the stream after and before the addition"
    return Location(after.terms + _scaled(before, -1.0).terms, max(after.time, before.time), evidence)


def _scaled(location: Location, factor: float) -> Location:
    terms = tuple(term.model_copy(update={"scale": term.scale * factor}) for term in location.terms)
    return replace(location, terms=terms)


def _is_flat(exposure: Exposure) -> bool:
    """Whether batch and positions are one axis there: [batch * pos, ...]."""
    return len(exposure.shape) < 3


def axes_of(shape: tuple[int, ...], seq: int) -> tuple[str, ...]:
    """Names of the axes of a stream of one sequence: of `seq` positions, and a batch of 1 next to them."""
    pos = shape.index(seq)
    batch = pos - 1 if pos > 0 and shape[pos - 1] == 1 else pos + 1
    names = ["stream"] * (len(shape) - 1) + ["d_model"]
    names[batch], names[pos] = "batch", "pos"
    return tuple(names)


def has_batch(shape: tuple[int, ...], seq: int) -> bool:
    """Whether an axis of one sequence is next to that of the positions, of a stream [.., batch, pos, .., d_model]."""
    pos = shape.index(seq)
    return shape[max(pos - 1, 0)] == 1 or shape[pos + 1 : -1][:1] == (1,)


def captured_axes(shape: tuple[int, ...], seq: int) -> tuple[str, ...]:
    """The axes as a capture gives them: batch and positions first."""
    if len(shape) < 3:  # [batch * pos, d_model]
        return ("batch", "pos", "d_model")
    return ("batch", "pos", *(name for name in axes_of(shape, seq) if name not in ("batch", "pos")))


def unusual_axes(shape: tuple[int, ...], seq: int) -> tuple[str, ...] | None:
    """The axes, where batch and positions are not the first two."""
    if len(shape) < 3 or seq not in shape[:-1]:
        return None
    axes = axes_of(shape, seq)
    return None if axes[:2] == ("batch", "pos") else axes


def _calls_of(values: Values) -> dict[int, list[ModuleCall]]:
    """id of each module -> its calls."""
    found: dict[int, list[ModuleCall]] = {}
    for call in values.flow.calls:
        found.setdefault(id(call.module), []).append(call)
    return found
