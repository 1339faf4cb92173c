"""The dataflow as values: which tensors are one value in other shapes, who makes it, who reads it, who exposes it.

Reads the graph of `dataflow` and answers questions; knows operations, not architectures.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from hookmap.discovery import aten
from hookmap.discovery.dataflow import Dataflow, ModuleCall, Operation, Place, TensorRef


def _is_root(op: Operation) -> bool:
    """Whether it takes a square root, also as a power (Gemma 4: `pow(-0.5)`)."""
    return op.name in aten.ROOTS or (op.name == "pow" and op.args[1:] in ((0.5,), (-0.5,)))


@dataclass(frozen=True)
class Exposure:
    """A place at a module's boundary where a value stands."""

    call: ModuleCall
    side: Literal["input", "output"]
    place: Place
    shape: tuple[int, ...]

    @property
    def time(self) -> int:
        return self.call.enter if self.side == "input" else self.call.exit


@dataclass(frozen=True)
class Step:
    """One linear step of a value's history: value = step(source), with `branch` added where it is an addition."""

    kind: Literal["add", "scale", "cast", "norm", "gate", "mix", "spread", "convolve"]
    """mix: several streams among one another; spread: one tensor over several streams, each times its own number;
    convolve: each feature with itself over positions"""
    source: int
    result: int
    branch: int | None = None
    factor: float | None = 1.0
    """of the source in a scale, of the branch in an addition; None: not a constant"""
    source_factor: float = 1.0


class Values:
    """Values (numbers of equivalence classes of tensors) of one dataflow."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self._parent = list(range(len(flow.tensors)))
        for op in flow.operations:
            if self._is_same(op):
                self._parent[self._find(op.outputs[0])] = self._find(op.inputs[-1 if op.name == "alias_update" else 0])

    def _find(self, tensor: int) -> int:
        while self._parent[tensor] != tensor:
            self._parent[tensor] = self._parent[self._parent[tensor]]
            tensor = self._parent[tensor]
        return tensor

    def _is_same(self, op: Operation) -> bool:
        if not op.outputs or not op.inputs or op.outputs[0] in op.inputs:
            return False
        source = op.inputs[-1 if op.name == "alias_update" else 0]
        a, b = self.flow.tensors[source], self.flow.tensors[op.outputs[0]]
        named = op.name in aten.SAME or op.name == "alias_update"
        if op.name == "constant_pad_nd" and any(op.args[1]):
            return False  # as long as before, and shifted
        return named and a.dtype == b.dtype and prod(a.shape) == prod(b.shape)

    def value(self, tensor: int) -> int:
        """The value that a tensor holds."""
        return self._find(tensor)

    def shape(self, value: int) -> tuple[int, ...]:
        return self.flow.tensors[value].shape

    def size(self, value: int) -> int:
        return prod(self.shape(value))

    @cached_property
    def producers(self) -> dict[int, Operation]:
        """value -> the operation that computed it; weights and inputs have none."""
        return {self.value(output): op for op in self.flow.operations if not self._is_same(op) for output in op.outputs}

    @cached_property
    def consumers(self) -> dict[int, list[Operation]]:
        """value -> the operations that compute with it."""
        found: dict[int, list[Operation]] = {}
        for op in self.flow.operations:
            if not self._is_same(op):
                for value in dict.fromkeys(map(self.value, op.inputs)):
                    found.setdefault(value, []).append(op)
        return found

    @cached_property
    def exposures(self) -> dict[int, list[Exposure]]:
        """value -> the module boundaries where it stands, in the order of the forward pass."""
        found: dict[int, list[Exposure]] = {}
        for call in self.flow.calls:
            for side, places in (("input", call.inputs), ("output", call.outputs)):
                for place, tensor in places.items():
                    shape = self.flow.tensors[tensor].shape
                    found.setdefault(self.value(tensor), []).append(Exposure(call, side, place, shape))  # type: ignore[arg-type]
        return {value: sorted(places, key=lambda e: e.time) for value, places in found.items()}

    @cached_property
    def children(self) -> dict[int, list[ModuleCall]]:
        found: dict[int, list[ModuleCall]] = {}
        for call in self.flow.calls:
            if call.parent is not None:
                found.setdefault(call.parent, []).append(call)
        return found

    def inside(self, call: ModuleCall) -> list[Operation]:
        """The operations that ran between a call's entry and exit."""
        times = self._times
        return self.flow.operations[bisect_left(times, call.enter) : bisect_right(times, call.exit)]

    @cached_property
    def _times(self) -> list[int]:
        return [op.time for op in self.flow.operations]

    def made_in(self, value: int, call: ModuleCall) -> bool:
        op = self.producers.get(value)
        return op is not None and call.enter < op.time < call.exit

    def operands(self, op: Operation) -> tuple[int, ...]:
        """The values that an operation computes with."""
        return () if op.name in aten.ONLY_SHAPE else tuple(map(self.value, op.inputs))

    def is_constant(self, value: int, of_tokens: bool = False) -> bool:
        """Whether the value depends on no input of the model: a weight, or made of weights.

        `of_tokens`: on no token; it may depend on the attention mask.
        """
        return self._depends(value, self._token_values if of_tokens else self._input_values) is False

    def _depends(self, value: int, inputs: frozenset[int]) -> bool:
        cache = self._dependence.setdefault(inputs, {})
        stack = [value]
        while stack:
            top = stack[-1]
            if top in cache:
                stack.pop()
                continue
            op = self.producers.get(top)
            if op is None:
                cache[top] = top in inputs
                continue
            waiting = [v for v in self.operands(op) if v not in cache and v != top]
            if waiting:
                stack += waiting
            else:
                cache[top] = any(cache.get(v, False) for v in self.operands(op))
        return cache[value]

    @cached_property
    def _dependence(self) -> dict[frozenset[int], dict[int, bool]]:
        return {}

    @cached_property
    def _input_values(self) -> frozenset[int]:
        return frozenset(self.value(tensor) for tensor in self.flow.inputs.values())

    @cached_property
    def _token_values(self) -> frozenset[int]:
        return frozenset(self.value(t) for name, t in self.flow.inputs.items() if name == "input_ids")

    # Linear history ---------------------------------------------------------------------------------------------

    def steps(self, value: int) -> Iterator[Step]:
        """Ways in which `value` is another value of its size, linearly: plus something, times a constant, normed."""
        op = self.producers.get(value)
        if op is None:
            return
        same_size = [v for v in dict.fromkeys(self.operands(op)) if v != value and self.size(v) == self.size(value)]
        if op.name in aten.ADDITIONS:
            yield from self._additions(value, op, same_size)
        elif op.name in aten.MULTIPLICATIONS:
            yield from self._products(value, op, same_size)
            yield from self._spread(value, op)
        elif op.name == "bmm" and len(same_size) == 1:
            yield from self._mixtures(value, op, same_size[0])
        elif op.name in {"_to_copy", *aten.TURNS, "expand", "slice"} and same_size:
            yield Step("cast", same_size[0], value)
        if (source := self.norm_source(value)) is not None:
            yield Step("norm", source, value)

    def _additions(self, value: int, op: Operation, same_size: list[int]) -> Iterator[Step]:
        alpha = float(op.kwargs.get("alpha", 1.0))
        signs = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[op.name]
        refs = [self.value(a.id) if isinstance(a, TensorRef) else None for a in op.args[:2]]
        for own, other in ((0, 1), (1, 0)):
            source, branch = refs[own], refs[other]
            if source in same_size and branch is not None:
                yield Step("add", source, value, branch, signs[other], signs[own])
            elif source in same_size:
                yield Step("gate", source, value, factor=None)

    def _products(self, value: int, op: Operation, same_size: list[int]) -> Iterator[Step]:
        left, right = op.args[0], op.args[1]
        for own, other in ((left, right), (right, left)):
            if not isinstance(own, TensorRef) or self.value(own.id) not in same_size:
                continue
            source = self.value(own.id)
            if isinstance(other, (int, float)):
                yield Step("scale", source, value, factor=float(other) if op.name == "mul" else 1.0 / float(other))
            elif isinstance(other, TensorRef) and self.is_constant(self.value(other.id), of_tokens=True):
                yield Step("gate", source, value, factor=None)

    def _mixtures(self, value: int, op: Operation, source: int) -> Iterator[Step]:
        """Each position's streams times a small matrix of that position's own; attention's is over positions."""
        coefficients = [t for t in op.inputs if self.value(t) != source]
        tokens = {self.flow.tensors[t].shape[-1] for t in self.flow.inputs.values()}
        own = coefficients and not tokens & set(self.flow.tensors[coefficients[0]].shape[1:])
        if own and not self.is_constant(self.value(coefficients[0])):
            yield Step("mix", source, value, factor=None)

    def _spread(self, value: int, op: Operation) -> Iterator[Step]:
        """[.., 1, d] times [.., streams, 1]."""
        shape = self.flow.tensors[op.outputs[0]].shape
        for tensor in op.inputs:
            mine = self.flow.tensors[tensor].shape
            if len(mine) == len(shape) > 3 and mine[-1] == shape[-1] > 1 == mine[-2] < shape[-2]:
                yield Step("spread", self.value(tensor), value, factor=None)

    def norm_source(self, value: int) -> int | None:
        """The value that a normalisation made `value` of; None where no normalisation did."""
        for exposure in self.exposures.get(value, []):
            if exposure.side == "output" and (source := self.norm_input(exposure.call)) is not None:
                return source
        op = self.producers.get(value)
        if op is not None and op.name in aten.NORMS and self.value(op.outputs[0]) == value:
            return self.operands(op)[0]
        return None if op is None else self._inline_norm(value, op)

    def _inline_norm(self, value: int, op: Operation) -> int | None:
        """x * rsqrt(mean(x^2) + eps), perhaps cast and times a weight, written out in a forward method."""
        if op.name in aten.MULTIPLICATIONS and len(op.inputs) == 2:
            a, b = self.operands(op)
            for own, other in ((a, b), (b, a)):
                if self.size(own) != self.size(value):
                    continue
                if self.is_constant(other) and self.size(other) < self.size(value):
                    return self.norm_source(own)
                if self.size(other) * self.shape(own)[-1] == self.size(own) and self._is_statistic(other, own):
                    return self._uncast(own)
        if op.name == "_to_copy":
            return self.norm_source(self.operands(op)[0])
        return None

    def _is_statistic(self, value: int, of: int) -> bool:
        """Whether `value` is a root of a mean of squares of `of`, and of nothing else that varies."""
        ops: list[Operation] = []
        stack, seen = [value], set()
        while stack:
            top = stack.pop()
            if top == of or top in seen or self.is_constant(top):
                continue
            seen.add(top)
            op = self.producers.get(top)
            if op is None or op.name in aten.PRODUCTS or len(seen) > 12:
                return False
            ops.append(op)
            stack += self.operands(op)
        over_features = aten.STATISTICS & {op.name for op in ops}
        return bool(over_features) and any(map(_is_root, ops))

    def _uncast(self, value: int) -> int:
        op = self.producers.get(value)
        if op is not None and op.name == "_to_copy":
            return self.operands(op)[0]
        return value

    def norm_input(self, call: ModuleCall) -> int | None:
        """The value that a normalisation module reads; None where the module is none.

        A normalisation is a module without submodules of one tensor in and one of its shape out, that takes a
        statistic over features and multiplies by nothing but weights of their size. No class name is asked.
        """
        if call.index in self._norm_inputs:
            return self._norm_inputs[call.index]
        found = self._norm_inputs[call.index] = self._norm_input(call)
        return found

    @cached_property
    def _norm_inputs(self) -> dict[int, int | None]:
        return {}

    def _norm_input(self, call: ModuleCall) -> int | None:
        if call.index in self.children or len(call.outputs) != 1:
            return None
        (output,) = call.outputs.values()
        shape = self.flow.tensors[output].shape
        sources = [t for t in call.entered.values() if self.flow.tensors[t].shape == shape]
        ops = self.inside(call)
        names = {op.name for op in ops}
        statistic = names & aten.NORMS or (any(map(_is_root, ops)) and len(shape) > 1)
        if len(sources) != 1 or sources[0] == output or not statistic or names & aten.PRODUCTS or "_softmax" in names:
            return None
        return self.value(sources[0])

    # Cones ------------------------------------------------------------------------------------------------------

    def cone(self, value: int, stops: Iterable[int], block: ModuleCall) -> tuple[list[Operation], set[int]]:
        """Operations of `block` on the way from any of `stops` to `value`, and the stops that are read."""
        limits, reads = set(stops), set()
        order: list[Operation] = []
        reaches: dict[int, bool] = {}
        stack = [(value, False)]
        while stack:
            top, done = stack.pop()
            op = self.producers.get(top)
            if done and op is not None:
                reaches[top] = any(reaches.get(v, False) for v in self.operands(op))
                if reaches[top]:
                    order.append(op)
            elif top not in reaches:
                reaches[top] = top in limits and top != value
                if reaches[top]:
                    reads.add(top)
                elif op is not None and block.enter < op.time < block.exit:
                    stack.append((top, True))
                    stack += [(v, False) for v in self.operands(op) if v not in reaches]
        return order, reads

    def sources(self, value: int, stops: Iterable[int], call: ModuleCall) -> set[int]:
        """What entered `call`, and depends on the tokens, that `value` is computed from without passing `stops`."""
        found: set[int] = set()
        seen, stack = {*stops}, [value]
        while stack:
            top = stack.pop()
            if top in seen:
                continue
            seen.add(top)
            if self.made_in(top, call):
                stack += self.operands(self.producers[top])
            elif not self.is_constant(top, of_tokens=True):
                found.add(top)
        return found
