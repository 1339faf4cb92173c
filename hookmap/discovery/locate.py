"""Values -> terms: at which module boundary a value stands, or of which such values it is the exact sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from hookmap.discovery.layer_list import Rows
from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.values import Exposure, Step, Values
from hookmap.maps.templates import TermTemplate


@dataclass(frozen=True)
class Tap:
    """Where a value is found, when it is complete, and what shows it."""

    terms: tuple[TermTemplate, ...]
    time: int
    evidence: str
    beside: tuple[TermTemplate, ...] = ()
    """what else the branch that reads it reads"""


class Tapper:
    """Finds taps inside one call: a block, or the model itself."""

    def __init__(
        self, values: Values, within: ModuleCall, seq: int, templates: dict[str, str] | None = None, rows: Rows = "all"
    ) -> None:
        """`templates`: path of each module of this block that is in a numbered list -> its template."""
        self.values, self.within, self.seq, self.templates, self.rows = values, within, seq, templates, rows
        self.calls_of = _calls_of(values)

    def tap(self, value: int, prefer: str = "output") -> Tap | None:
        """One boundary if there is one, else the scaled one, else a flat one, else the sum that the model computes."""
        exposures = self._exposures(value)
        whole = [e for e in exposures if not self._is_flat(e)]
        if whole:
            return self._single(min(whole, key=lambda e: self._rank(e, prefer)))
        composed = self._composed(value)
        if exposures and (composed is None or len(composed.terms) > 1):
            return self._single(min(exposures, key=lambda e: self._rank(e, prefer)))
        return composed

    def at_root(self, value: int) -> Tap:
        """The place of a value in the output of the whole model."""
        return self._single(next(e for e in self._exposures(value)[::-1] if e.call is self.within))

    def places(self, value: int) -> list[Exposure]:
        """The boundaries in this call where a value can be hooked, in the order of the forward pass."""
        return self._exposures(value)

    def at(self, exposure: Exposure) -> Tap:
        """The tap of one boundary."""
        return self._single(exposure)

    def difference(self, after: int, before: int) -> Tap | None:
        """after - before, where each has a boundary of its own; exact up to the rounding of the model's addition."""
        a, b = self.tap(after), self.tap(before)
        if a is None or b is None or any(t.flat for t in (*a.terms, *b.terms)) or len(a.terms) + len(b.terms) > 3:
            return None
        minus = tuple(replace_scale(t, -t.scale) for t in b.terms)
        return Tap(a.terms + minus, max(a.time, b.time), "difference of the stream after and before the addition")

    def _exposures(self, value: int) -> list[Exposure]:
        found = []
        for each in self.values.exposures.get(value, []):
            inside = self.within.enter <= each.call.enter and each.call.exit <= self.within.exit
            # A module that several layers share is no place of one layer's, save where all of the block is shared.
            once = self.shared or self._paths(each.call) == 1
            own = not (each.side == "input" and each.call is self.within and self.templates is None)
            if (
                inside
                and once
                and own
                and self.seq in (each.shape[:-1] or each.shape)
                and not (self.turned and self._is_flat(each))
            ):
                found.append(each)
        return found

    @cached_property
    def shared(self) -> bool:
        """Whether this block stands in its list several times: which call is whose is what tells its layers apart."""
        return self.templates is not None and self._paths(self.within) > 1

    def _paths(self, call: ModuleCall) -> int:
        return len({each.path for each in self.calls_of[id(call.module)]})

    @cached_property
    def turned(self) -> bool:
        """Whether positions stand before the batch: one axis of both, [pos * batch, ...], is not told apart again."""
        shapes = [self.values.flow.tensors[t].shape for t in self.within.entered.values()]
        return any(len(shape) == 3 and shape[:2] == (self.seq, 1) for shape in shapes)

    def _is_flat(self, exposure: Exposure) -> bool:
        """Batch and positions are one axis there: [batch * pos, ...]."""
        return len(exposure.shape) < 3

    def _rank(self, exposure: Exposure, prefer: str) -> tuple[bool, bool, int, int]:
        if self.templates is None:  # around the blocks the module that makes the tensor says most
            return (exposure.side != prefer, False, 0, exposure.time)
        return (exposure.call is not self.within, exposure.side != prefer, exposure.call.path.count("."), exposure.time)

    def _single(self, exposure: Exposure) -> Tap:
        index = exposure.place
        calls = self.calls_of[id(exposure.call.module)]
        term = TermTemplate(
            module=self.templated(exposure.call.path),
            side=exposure.side,
            index=0 if exposure.side == "input" and index is None else index,
            flat=self._is_flat(exposure),
            axes=unusual_axes(exposure.shape, self.seq),
            rows=self.rows,
            call=calls.index(exposure.call) if len(calls) > 1 else None,
        )
        name = type(exposure.call.module).__name__
        what = "enters" if exposure.side == "input" else "leaves"
        return Tap((term,), exposure.time, f"the tensor that {what} {name}")

    def _composed(self, value: int) -> Tap | None:
        if not self.values.made_in(value, self.within):
            return None
        for step in self.values.steps(value):
            if step.kind == "scale" and step.factor is not None:
                inner = self.tap(step.source)
                if inner is not None and len(inner.terms) == 1:
                    scaled = replace_scale(inner.terms[0], inner.terms[0].scale * step.factor)
                    return replace(inner, terms=(scaled,), evidence=f"{inner.evidence}, times {step.factor:g}")
            if step.kind == "add" and step.branch is not None and step.factor == 1.0 == step.source_factor:
                left, right = self.tap(step.source), self.tap(step.branch)
                # A sum is computed term by term: only a sum whose second operand is one term comes out to the bit.
                if left and right and len(right.terms) == 1 and not any(t.flat for t in left.terms + right.terms):
                    time = max(left.time, right.time)
                    return Tap(left.terms + right.terms, time, "the sum that the block itself computes")
            if step.kind == "cast" and self._is_exact(step):
                return self.tap(step.source)
        return None

    def _is_exact(self, step: Step) -> bool:
        """Whether a cast only widens: the numbers are the same."""
        before, after = (self.values.flow.tensors[v].dtype for v in (step.source, step.result))
        return self.values.producers[step.result].name == "_to_copy" and torch.promote_types(before, after) == after

    def templated(self, path: str) -> str:
        """The path with this block's number as `{i}`."""
        for own, template in (self.templates or {}).items():
            if path == own or path.startswith(own + "."):
                return template + path[len(own) :]
        return path


def replace_scale(term: TermTemplate, scale: float) -> TermTemplate:
    return term.model_copy(update={"scale": scale})


def axes_of(shape: tuple[int, ...], seq: int) -> tuple[str, ...]:
    """Names of the axes of a stream of one sequence: `seq` is the length of its positions, 1 beside it the batch's."""
    pos = shape.index(seq)
    batch = pos - 1 if pos > 0 and shape[pos - 1] == 1 else pos + 1
    names = ["stream"] * (len(shape) - 1) + ["d_model"]
    names[batch], names[pos] = "batch", "pos"
    return tuple(names)


def captured_axes(shape: tuple[int, ...], seq: int) -> tuple[str, ...]:
    """The axes as a capture gives them: batch and positions first."""
    return ("batch", "pos", *(name for name in axes_of(shape, seq) if name not in ("batch", "pos")))


def unusual_axes(shape: tuple[int, ...], seq: int) -> tuple[str, ...] | None:
    """The axes where batch and positions are not the first two."""
    if len(shape) < 3 or seq not in shape[:-1]:
        return None
    axes = axes_of(shape, seq)
    return None if axes[:2] == ("batch", "pos") else axes


def _calls_of(values: Values) -> dict[int, list[ModuleCall]]:
    found: dict[int, list[ModuleCall]] = {}
    for call in values.flow.calls:
        found.setdefault(id(call.module), []).append(call)
    return found
