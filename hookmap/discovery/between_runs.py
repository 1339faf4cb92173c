"""What stands between one run of a block and the next, where the stream that leaves the one does not enter the other.

The model may add its input again (`x = norm(x) + x0`), read several tensors through an adapter, or start a new stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise

from hookmap.discovery.dataflow import ModuleCall, Operation
from hookmap.discovery.layer_list import LayerList, Run
from hookmap.discovery.linear_steps import linear_path, steps
from hookmap.discovery.values import Values
from hookmap.maps.layer_order import text_of

_LONGEST = 160
"""characters of an expression that a person still reads"""
_DEEPEST = 12


def between(values: Values, layers: LayerList) -> dict[str, str]:
    """`3 -> 2` -> what enters layer 2 when it runs after layer 3, of all that do not get what the one before gave."""
    words = _Words(values, layers)
    found: dict[tuple[int, int], dict[str, None]] = {}
    for before, here in apart(values, layers):
        said = words.of(layers.streams[here][0], before)
        found.setdefault((before[0], here[0]), {}).setdefault(said)
    return dict(_together({pair: "; or ".join(texts) for pair, texts in found.items()}))


def before_norm(values: Values, layers: LayerList, normed: int | None) -> dict[str, str]:
    """`3 -> final_norm`: what the last norm reads, where it is a sum or a mean of more than the last block gives."""
    last = layers.order[-1]
    if normed is None or normed == layers.end or values.size(normed) != values.size(layers.end):
        return {}
    return {f"{last[0]} -> final_norm": _Words(values, layers).of(normed, last)}


def apart(values: Values, layers: LayerList) -> Iterator[tuple[Run, Run]]:
    """Runs, one behind the other, where what enters the second is not what leaves the first, or a multiple of it."""
    for before, here in pairwise(layers.order):
        leave, entry = layers.streams[before][1], layers.streams[here][0]
        path = linear_path(values, values.flow.calls[0], leave, entry)
        if leave != entry and not (path and all(step.kind in ("cast", "scale") for step in path)):
            yield before, here


def _together(texts: dict[tuple[int, int], str]) -> Iterator[tuple[str, str]]:
    """Pairs one behind the other that differ in their numbers alone are one row: `0-2 -> 1-3`, of layer `{i}`."""
    rows: dict[tuple[str, int], list[int]] = {}
    for (before, here), text in texts.items():
        own = re.sub(rf"(?<=[\[.]){before}(?=[\].(]|$)", "{i}", text)
        rows.setdefault((own, here - before), []).append(before)
    for (own, step), numbers in rows.items():
        if len(numbers) == 1:
            yield f"{numbers[0]} -> {numbers[0] + step}", own.replace("{i}", str(numbers[0]))
            continue
        for part in text_of(numbers).split(", "):
            yield f"{part} -> {'-'.join(str(int(number) + step) for number in part.split('-'))}", own


class _Words:
    """Values outside the blocks, as people write them."""

    def __init__(self, values: Values, layers: LayerList) -> None:
        self.values, self.layers = values, layers
        self.blocks = list(layers.calls.values())

    def of(self, value: int, before: Run) -> str:
        """A value in terms of named states; `before` is the run in front of it, whose number is not said."""
        self.before = before
        text = self._word(value, _DEEPEST)
        if text is not None and len(text) <= _LONGEST:
            return text
        states = dict.fromkeys(self._sources(value))
        return f"computed from {', '.join(states)}" if states else "computed from no block's output"

    @cached_property
    def names(self) -> dict[int, Run]:
        """What leaves a block -> its run."""
        return {leave: run for run, (_, leave) in self.layers.streams.items()}

    def _name(self, value: int) -> str | None:
        if value in self.names:
            number, run = self.names[value]
            said = "" if self.layers.times(number) == 1 or (number, run) == self.before else f", run {run}"
            return f"resid_post[{number}{said}]"
        op, ids = self.values.producers.get(value), self.values.value(self.values.flow.inputs[self.values.flow.tokens])
        if op is not None and op.name == "embedding" and ids in self.values.operands(op):
            return "embed"
        first = self.layers.order[0]
        return f"resid_pre[{first[0]}]" if value == self.layers.streams[first][0] else None

    def _word(self, value: int, depth: int) -> str | None:
        """None where the expression is too deep, or reads what is inside a block."""
        if (name := self._name(value)) is not None:
            return name
        if self.values.is_constant(value, of_tokens=True):
            return "weights" if self.values.is_constant(value) else "mask"
        if depth == 0 or any(self.values.made_in(value, block) for block in self.blocks):
            return None
        if (call := self._module(value)) is not None:
            given = [self.values.value(tensor) for tensor in call.entered.values()]
            read = [v for v in dict.fromkeys(given) if not self.values.is_constant(v, of_tokens=True)]
            return self._applied(call.path, read, depth)
        for step in steps(self.values, value):
            if step.kind == "cast":
                return self._word(step.source, depth)
            if step.kind == "norm":
                return self._applied("norm", [step.source], depth)
        op = self.values.producers.get(value)
        return None if op is None else self._operation(op, depth)

    def _operation(self, op: Operation, depth: int) -> str | None:
        sides = [self._word(each, depth - 1) for each in self.values.operands(op)]
        if None in sides or not sides:
            return None
        words = [side for side in sides if side is not None]
        if op.name in ("add", "sub", "mul", "div") and len(op.args) > 1:
            numbers = [str(arg) for arg in op.args[:2] if isinstance(arg, (int, float))]
            if op.name in ("mul", "div"):
                words = [f"({word})" if " + " in word or " - " in word else word for word in words]
            sign = {"add": " + ", "sub": " - ", "mul": " * ", "div": " / "}[op.name]
            return sign.join([*words, *numbers])
        return f"{op.name.strip('_')}({', '.join(words)})"

    def _applied(self, name: str, read: list[int], depth: int) -> str | None:
        words = [self._word(each, depth - 1) for each in read]
        return None if None in words else f"{name}({', '.join(word for word in words if word is not None)})"

    def _module(self, value: int) -> ModuleCall | None:
        """The outermost module, beside the blocks, that gives the value."""
        places = self.values.exposures.get(value, [])
        given = [e.call for e in places if e.side == "output" and self.values.made_in(value, e.call)]
        beside = [call for call in given if not any(_overlap(call, block) for block in self.blocks)]
        return min(beside, key=lambda call: call.enter, default=None)

    def _sources(self, value: int) -> Iterator[str]:
        """The named states that a value is computed from."""
        stack, seen = [value], set[int]()
        while stack:
            if (top := stack.pop()) in seen:
                continue
            seen.add(top)
            if (name := self._name(top)) is not None:
                yield name
            elif (op := self.values.producers.get(top)) is not None:
                stack += self.values.operands(op)


def _overlap(a: ModuleCall, b: ModuleCall) -> bool:
    return a.enter <= b.exit and b.enter <= a.exit
