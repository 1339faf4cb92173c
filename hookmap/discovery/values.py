"""The dataflow as values: a value is all tensors that hold the same numbers, whatever their shape.

Answers which operation computes a value, which read it, and at which module boundaries it stands. Knows operations,
not architectures.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from hookmap.discovery import aten
from hookmap.discovery.dataflow import Dataflow, ModuleCall, Operation, Place


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


class Values:
    """The values of one dataflow. A value is the number of one of its tensors, which stands for all of them."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self._parent = list(range(len(flow.tensors)))
        self._again: set[int] = set()
        """times of additions of what was added before, to the same"""
        sums: dict[tuple[object, ...], int] = {}
        for op in flow.operations:
            if self._is_same(op):
                self._parent[self._find(op.outputs[0])] = self._find(_source(op))
            elif op.name == "add" and len(op.inputs) == 2:
                key = self._sum(op)
                if key in sums and op.outputs[0] != sums[key]:
                    self._parent[self._find(op.outputs[0])] = self._find(sums[key])
                    self._again.add(op.time)
                sums.setdefault(key, op.outputs[0])

    def _sum(self, op: Operation) -> tuple[object, ...]:
        """What two additions have in common that give the same numbers."""
        made = self.flow.tensors[op.outputs[0]]
        operands = sorted(map(self._find, op.inputs)) if not op.kwargs else map(self._find, op.inputs)
        return (*operands, str(op.kwargs), made.shape, made.dtype)

    def _find(self, tensor: int) -> int:
        while self._parent[tensor] != tensor:
            self._parent[tensor] = self._parent[self._parent[tensor]]
            tensor = self._parent[tensor]
        return tensor

    def _is_same(self, op: Operation) -> bool:
        if not op.outputs or not op.inputs or op.outputs[0] in op.inputs:
            return False
        a, b = self.flow.tensors[_source(op)], self.flow.tensors[op.outputs[0]]
        if op.time in self._again:
            return True
        named = op.name in aten.SAME or (op.name == "alias_update" and op.args[-1])
        named |= op.name == "copy" and not self._is_slice(op.inputs[0])
        if op.name == "constant_pad_nd" and any(op.args[1]):
            return False  # it has as many numbers as before, and they are shifted
        return named and a.dtype == b.dtype and prod(a.shape) == prod(b.shape)

    def _is_slice(self, tensor: int) -> bool:
        """Whether a tensor is a part of another along an axis that both have: what is written there may be shifted."""
        op = self.flow.producer(tensor)
        while op is not None and op.name == "alias_update":
            op = self.flow.producer(op.inputs[0])
        return op is not None and op.name in aten.CUTS and op.name not in ("select", "unbind")

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

    @cached_property
    def parameters(self) -> dict[int, str]:
        """value -> path of the parameter that holds it"""
        return {self.value(tensor): path for tensor, path in self.flow.parameters.items()}

    def made_in(self, value: int, call: ModuleCall) -> bool:
        op = self.producers.get(value)
        return op is not None and call.enter < op.time < call.exit

    def operands(self, op: Operation) -> tuple[int, ...]:
        """The values that an operation computes with."""
        return () if op.name in aten.ONLY_SHAPE else tuple(map(self.value, op.inputs))

    def is_constant(self, value: int, of_tokens: bool = False) -> bool:
        """Whether the value depends on no input of the model: it is a weight, or computed from weights.

        `of_tokens`: whether it depends on no token. It may depend on the attention mask.
        """
        return not self._depends(value, self._dependence[of_tokens])

    def _depends(self, value: int, cache: dict[int, bool]) -> bool:
        stack = [value]
        while stack:
            top = stack[-1]
            if top in cache:
                stack.pop()
                continue
            op = self.producers.get(top)
            if op is None:
                cache[top] = False
                continue
            waiting = [v for v in self.operands(op) if v not in cache and v != top]
            if waiting:
                stack += waiting
            else:
                cache[top] = any(cache.get(v, False) for v in self.operands(op))
        return cache[value]

    @cached_property
    def _dependence(self) -> dict[bool, dict[int, bool]]:
        """Of what is read alone, or of any input -> what is known so far: value -> whether it depends on them.

        What is read is the tokens, and what an encoder reads; not masks.
        """
        inputs = self.flow.inputs.items()
        return {
            of_tokens: {self.value(t): True for name, t in inputs if not of_tokens or "mask" not in name}
            for of_tokens in (True, False)
        }

    def cone(self, value: int, stops: Iterable[int], block: ModuleCall) -> tuple[list[Operation], set[int]]:
        """The operations inside `block` that compute `value` from any of `stops`, and the stops that they read."""
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
        """The values that enter `call` and depend on the tokens, and that `value` is computed from without `stops`."""
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


def _source(op: Operation) -> int:
    """The tensor whose numbers the result may hold: of what is written into another tensor, not that tensor."""
    return op.inputs[-1 if op.name in ("alias_update", "copy") else 0]
