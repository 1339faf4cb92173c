"""Linear steps: how one value follows from another by an addition, a constant factor, a cast, a norm or a gate."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from hookmap.discovery import aten
from hookmap.discovery.dataflow import ModuleCall, Operation, TensorRef
from hookmap.discovery.values import Values

_CASTS = {"_to_copy", *aten.TURNS, "expand", "slice"}
_COSTS = {"add": 0, "scale": 0, "cast": 0, "norm": 1, "gate": 2, "mix": 3}
"""what a step costs on a path of the residual stream; steps of other kinds are on none"""
STREAM_STEPS = frozenset(_COSTS)
"""kinds of step that a residual stream may take"""
_FAR = 10**6
_MOST_OF_A_STATISTIC = 12
"""values between a tensor and the statistic that a norm divides it by"""


@dataclass(frozen=True)
class Step:
    """One linear step: `result` = step(`source`), with `branch` added where it is an addition."""

    kind: Literal["add", "scale", "cast", "norm", "gate", "mix", "spread", "convolve", "gather"]
    """mix: several streams are mixed with one another; spread: one tensor becomes several streams, each times a number
    of its own; convolve: each feature is convolved over positions, alone; gather: one of several tensors that were
    stacked, and summed with weights"""
    source: int
    result: int
    branch: int | None = None
    factor: float | None = 1.0
    """of the source in a scale, of the branch in an addition; None: not a constant"""
    source_factor: float | None = 1.0
    """of the source in an addition; None: not a constant"""
    gate: int | None = None
    """the weights that the source of a gate, or the branch of an addition, is multiplied by, beside its factor"""


def steps(values: Values, value: int) -> Iterator[Step]:
    """The linear steps whose result is `value`; there may be several, such as one for each side of an addition."""
    op = values.producers.get(value)
    if op is None:
        return
    same_size = _same_size(values, value, op)
    if op.name in aten.ADDITIONS:
        yield from _additions(values, value, op, same_size)
    elif op.name == "lerp":
        yield from _interpolations(values, value, op, same_size)
    elif op.name == "addcmul":
        yield from _gated_additions(values, value, op, same_size)
    elif op.name in aten.MULTIPLICATIONS:
        yield from _products(values, value, op, same_size)
        yield from _spreads(values, value, op)
    elif op.name == "bmm" and len(same_size) == 1:
        yield from _mixtures(values, value, op, same_size[0])
    elif op.name in _CASTS and same_size:
        yield Step("cast", same_size[0], value)
    if (source := norm_source(values, value)) is not None:
        yield Step("norm", source, value)
    for part in _stacked(values, value, op):
        yield Step("gather", part, value, factor=None)


def _same_size(values: Values, value: int, op: Operation) -> list[int]:
    return [v for v in dict.fromkeys(values.operands(op)) if v != value and values.size(v) == values.size(value)]


def _additions(values: Values, value: int, op: Operation, same_size: list[int]) -> Iterator[Step]:
    alpha = float(op.kwargs.get("alpha", 1.0))
    signs = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[op.name]
    operands = [values.value(a.id) if isinstance(a, TensorRef) else None for a in op.args[:2]]
    for own, other in ((0, 1), (1, 0)):
        source, branch = operands[own], operands[other]
        if source in same_size and branch is not None:
            yield Step("add", source, value, branch, signs[other], signs[own])
        elif source in same_size:
            yield Step("gate", source, value, factor=None)


def _interpolations(values: Values, value: int, op: Operation, same_size: list[int]) -> Iterator[Step]:
    """(1 - weight) * start + weight * end."""
    start, end = (values.value(each.id) for each in op.args[:2])
    if not {start, end} <= set(same_size):
        return
    weight = op.args[2]
    if isinstance(weight, TensorRef):
        if values.is_constant(values.value(weight.id), of_tokens=True):
            yield Step("add", start, value, end, source_factor=None, gate=values.value(weight.id))
            yield Step("add", end, value, start, factor=None, source_factor=None)
    else:
        yield Step("add", start, value, end, float(weight), 1.0 - float(weight))
        yield Step("add", end, value, start, 1.0 - float(weight), float(weight))


def _gated_additions(values: Values, value: int, op: Operation, same_size: list[int]) -> Iterator[Step]:
    """source + factor * branch * gate, in one operation."""
    source, *product = (values.value(each.id) for each in op.args[:3])
    for branch, gate in (product, product[::-1]):
        if source in same_size and branch in same_size and values.is_constant(gate, of_tokens=True):
            yield Step("add", source, value, branch, float(op.kwargs.get("value", 1.0)), gate=gate)


def _products(values: Values, value: int, op: Operation, same_size: list[int]) -> Iterator[Step]:
    left, right = op.args[0], op.args[1]
    for own, other in ((left, right), (right, left)):
        if not isinstance(own, TensorRef) or values.value(own.id) not in same_size:
            continue
        source = values.value(own.id)
        if isinstance(other, (int, float)):
            yield Step("scale", source, value, factor=float(other) if op.name == "mul" else 1.0 / float(other))
        elif isinstance(other, TensorRef) and values.is_constant(gate := values.value(other.id), of_tokens=True):
            divides = op.name == "div"
            if not (divides and own is right):
                yield Step("gate", source, value, factor=None, gate=None if divides else gate)


def _mixtures(values: Values, value: int, op: Operation, source: int) -> Iterator[Step]:
    """A product of each position's streams with a small matrix of that position. Attention's is over positions."""
    coefficients = [t for t in op.inputs if values.value(t) != source]
    shapes = [values.flow.tensors[t].shape for t in values.flow.inputs.values()]
    tokens = {shape[-1] for shape in shapes if len(shape) == 2} | {values.flow.positions}
    own = coefficients and not tokens & set(values.flow.tensors[coefficients[0]].shape[1:])
    if own and (not values.is_constant(values.value(coefficients[0])) or _mixes_streams(values, op, source)):
        yield Step("mix", source, value, factor=None)


def _mixes_streams(values: Values, op: Operation, source: int) -> bool:
    """Whether weights that are the same for all positions mix streams, [.., streams, d], and not features."""
    while (made := values.producers.get(source)) is not None and made.name in aten.TURNS:
        source = values.operands(made)[0]
    shape, summed = values.shape(source), values.flow.tensors[op.inputs[-2]].shape[-1]
    return len(shape) > 3 and summed in shape[:-1] and summed != shape[-1]


def _stacked(values: Values, value: int, op: Operation) -> list[int]:
    """The tensors of which `value` is a sum with weights, where they were stacked before it: by a product or a sum."""
    if op.name not in (*aten.MATRIX_PRODUCTS, "sum", "mean"):
        return []
    sources = [_unturned(values, each) for each in values.operands(op)]
    products = [values.producers[each] for each in sources if each in values.producers]
    sources += [_unturned(values, v) for each in products if each.name == "mul" for v in values.operands(each)]
    for source in sources:
        made = values.producers.get(source)
        parts = [values.value(t) for t in made.inputs] if made is not None and made.name in aten.JOINS else []
        if len(parts) > 1 and all(values.size(part) == values.size(value) for part in parts):
            return list(dict.fromkeys(parts))
    return []


def _unturned(values: Values, value: int) -> int:
    """The value before its axes were turned, or its numbers cast or repeated."""
    while (op := values.producers.get(value)) is not None and op.name in {*_CASTS, *aten.REPEATS}:
        value = values.operands(op)[0]
    return value


def _spreads(values: Values, value: int, op: Operation) -> Iterator[Step]:
    """[.., 1, d] times [.., streams, 1]."""
    shape = values.flow.tensors[op.outputs[0]].shape
    for tensor in op.inputs:
        mine = values.flow.tensors[tensor].shape
        if len(mine) == len(shape) > 3 and mine[-1] == shape[-1] > 1 == mine[-2] < shape[-2]:
            yield Step("spread", values.value(tensor), value, factor=None)


def linear_path(values: Values, call: ModuleCall, start: int, end: int, gathers: bool = False) -> list[Step]:
    """The linear steps inside `call` from one value to another; empty where no path leads there, or both are one.

    Of several paths it is the one through the fewest norms and gates, then the fewest additions. `gathers`: whether one
    of several tensors that are summed with weights is on the way.
    """
    costs = {**_COSTS, "gather": _COSTS["mix"]} if gathers else _COSTS
    best: dict[int, tuple[tuple[int, int], Step | None]] = {start: ((0, 0), None)}

    def cost(value: int) -> tuple[int, int]:
        if value not in best:
            best[value] = ((_FAR, 0), None)
            if values.made_in(value, call):
                for step in (step for step in steps(values, value) if step.kind in costs):
                    obstacles, additions = cost(step.source)
                    total = (obstacles + costs[step.kind], additions + (step.kind == "add"))
                    if total < best[value][0]:
                        best[value] = (total, step)
        return best[value][0]

    if cost(end)[0] >= _FAR:
        return []
    path, value = [], end
    while (step := best[value][1]) is not None:
        path.append(step)
        value = step.source
    return path[::-1]


@dataclass(frozen=True)
class Summand:
    """factor * gates * value, one of the values whose sum another value is."""

    value: int
    factor: float = 1.0
    gates: tuple[int, ...] = ()
    """weights that it is multiplied by, feature by feature"""


def summands(values: Values, call: ModuleCall, value: int, stops: Collection[int]) -> list[Summand]:
    """What `value` is the sum of: the additions, factors and casts inside `call` undone, back to any of `stops`."""
    if value in stops or not values.made_in(value, call):
        return [Summand(value)]
    for step in steps(values, value):
        if step.kind not in ("add", "scale", "cast", "gate"):
            continue
        scale = step.factor if step.kind == "scale" else step.source_factor
        factors = (scale, step.factor if step.kind == "add" else 1.0)
        if None in factors or (step.kind == "gate" and step.gate is None):
            continue
        own = (step.gate,) if step.kind == "gate" and step.gate is not None else ()
        found = [_times(each, factors[0], own) for each in summands(values, call, step.source, stops)]
        if step.branch is not None:
            gates = () if step.gate is None else (step.gate,)
            found += [_times(each, factors[1], gates) for each in summands(values, call, step.branch, stops)]
        return found
    return [Summand(value)]


def _times(summand: Summand, factor: float | None, gates: tuple[int, ...]) -> Summand:
    return Summand(summand.value, summand.factor * (factor or 0.0), summand.gates + gates)


# Norms --------------------------------------------------------------------------------------------------------------


def norm_source(values: Values, value: int) -> int | None:
    """The value that `value` is the norm of; None where it is the result of no norm."""
    for exposure in values.exposures.get(value, []):
        if exposure.side != "output" or (source := norm_input(values, exposure.call)) is None:
            continue
        result = _result(values, exposure.call)
        if result is not None and values.value(result) == value:
            return source
    op = values.producers.get(value)
    if op is not None and op.name in aten.NORMS and values.value(op.outputs[0]) == value:
        return values.operands(op)[0]
    return None if op is None else _inline_norm(values, value, op)


def _result(values: Values, call: ModuleCall) -> int | None:
    """The one tensor that a module gives beside what it hands on as it was."""
    entered = {values.value(tensor) for tensor in call.entered.values()}
    made = [tensor for tensor in call.outputs.values() if values.value(tensor) not in entered]
    return made[0] if len(made) == 1 else None


def norm_input(values: Values, call: ModuleCall) -> int | None:
    """The value that a norm module reads; None where the module is no norm.

    A norm is a module without submodules that takes one tensor and gives one of its shape, computes a statistic over
    features, and has no matrix product. Its class and its name are not asked.
    """
    output = _result(values, call)
    if call.index in values.children or output is None:
        return None
    shape, ops = values.flow.tensors[output].shape, values.inside(call)
    read = {value for op in ops for value in values.operands(op)}
    sources = [t for t in call.entered.values() if values.flow.tensors[t].shape == shape and values.value(t) in read]
    if len(sources) != 1:
        return None
    names = {op.name for op in ops}
    statistic = names & aten.NORMS or (any(map(_is_root, ops)) and len(shape) > 1)
    return None if not statistic or names & aten.PRODUCTS or "_softmax" in names else values.value(sources[0])


def has_weights(values: Values, call: ModuleCall) -> bool:
    """Whether a module computes with matrices: it is more than a norm or a function of each number."""
    return any(op.name in aten.PRODUCTS for op in values.inside(call)) and norm_input(values, call) is None


def _inline_norm(values: Values, value: int, op: Operation) -> int | None:
    """The source of a norm that a forward method writes out: x * rsqrt(mean(x^2) + eps), cast or times a weight."""
    if op.name in aten.MULTIPLICATIONS and len(op.inputs) == 2:
        a, b = values.operands(op)
        for own, other in ((a, b), (b, a)):
            if values.size(own) != values.size(value):
                continue
            if values.is_constant(other) and values.size(other) < values.size(value):
                return norm_source(values, own)
            statistic = _unspread(values, other)
            if not _is_for_each_row(values, statistic, own):
                continue
            multiples = (s.source for s in _multiples(values, own))  # the weights may come first
            for source in (own, *multiples):
                if _is_statistic(values, statistic, source):
                    return _uncast(values, source)
    return norm_source(values, values.operands(op)[0]) if op.name == "_to_copy" else None


def _multiples(values: Values, value: int) -> Iterator[Step]:
    """The steps whose result is `value`, where it is a multiple of another."""
    op = values.producers.get(value)
    if op is not None and op.name in aten.MULTIPLICATIONS:
        yield from _products(values, value, op, _same_size(values, value, op))


def _unspread(values: Values, value: int) -> int:
    """The statistics before they are repeated for each feature, as `F.normalize` does it."""
    op = values.producers.get(value)
    return values.operands(op)[0] if op is not None and op.name in aten.REPEATS else value


def _is_for_each_row(values: Values, value: int, of: int) -> bool:
    """Whether there is one number for each position, or one for each group of its features."""
    shape = values.shape(of)
    rows = prod(shape[:2]) if len(shape) > 2 else shape[0]
    return values.size(value) < values.size(of) and values.size(value) % rows == 0


def _is_statistic(values: Values, value: int, of: int) -> bool:
    """Whether `value` is a root of a mean of squares of `of`, or a size of its numbers, and of nothing else."""
    ops: list[Operation] = []
    stack, seen = [value], set()
    while stack:
        top = stack.pop()
        if top == of or top in seen or values.is_constant(top):
            continue
        seen.add(top)
        op = values.producers.get(top)
        if op is None or op.name in aten.PRODUCTS or len(seen) > _MOST_OF_A_STATISTIC:
            return False
        ops.append(op)
        stack += values.operands(op)
    names = {op.name for op in ops}
    sizes = "abs" in names and names & {*aten.STATISTICS, *aten.EXTREMES}
    return bool(sizes) or (bool(names & aten.STATISTICS) and any(map(_is_root, ops)))


def _is_root(op: Operation) -> bool:
    """Whether it takes a square root, also as a power (Gemma 4: `pow(-0.5)`)."""
    return op.name in aten.ROOTS or (op.name == "pow" and op.args[1:] in ((0.5,), (-0.5,)))


def _uncast(values: Values, value: int) -> int:
    op = values.producers.get(value)
    return values.operands(op)[0] if op is not None and op.name == "_to_copy" else value
