"""The dataflow as values: which tensors are one value in other shapes, who makes it, who reads it, who exposes it.

Reads the graph of `dataflow` and answers questions; knows operations, not architectures.
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
