"""The boundaries of one pass by what stands there: one tensor, or two whose sum is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from hookmap.discovery import aten
from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.dataflow import Place as Argument
from hookmap.maps.templates import TermTemplate
from hookmap.vllm.expressions import Expressions


@dataclass(frozen=True)
class Boundary:
    """Tensors at one side of one module's call."""

    call: ModuleCall
    side: Literal["input", "output"]
    places: tuple[Argument, ...]
    tensors: tuple[int, ...]

    @property
    def time(self) -> int:
        return self.call.enter if self.side == "input" else self.call.exit

    @property
    def indices(self) -> tuple[Argument, ...]:
        """The places as a selector names them: a module has arguments, even if there is only one."""
        return tuple(0 if self.side == "input" and place is None else place for place in self.places)


class Boundaries:
    """All boundaries of one pass."""

    def __init__(self, expressions: Expressions) -> None:
        self._expressions = expressions
        self._found: dict[int, list[Boundary]] = {}
        self._calls: dict[str, list[ModuleCall]] = {}
        self._visits = Counter(id(call.module) for call in expressions.values.flow.calls)
        for call in expressions.values.flow.calls:
            self._calls.setdefault(call.path, []).append(call)
            for boundary in _of_call(expressions, call):
                own = expressions.book.sum_of([expressions.of(tensor) for tensor in boundary.tensors])
                self._found.setdefault(own, []).append(boundary)

    def calls(self, path: str) -> list[ModuleCall]:
        """The calls of one module, in their order."""
        return self._calls.get(path, [])

    def expression_at(self, path: str, number: int, side: str, index: Argument) -> int | None:
        """What stands at one boundary, of the module's call of this number; None where nothing does."""
        tensor = self._tensor_at(path, number, side, index)
        return None if tensor is None else self._expressions.of(tensor)

    def expression_of_operation(self, path: str, number: int, term: TermTemplate) -> tuple[int, tuple[int, ...]] | None:
        """What an operation in a module's own forward reads or gives, and its shape; None where there is none."""
        flow = self._expressions.values.flow
        for call in self.calls(path)[number : number + 1]:
            own = [op for op in flow.operations if op.name == term.operation and flow.calls[op.call] is call]
            for op in own[term.occurrence or 0 :][:1]:
                tensor = (op.inputs if term.side == "input" else op.outputs)[int(term.index or 0)]
                shape = flow.tensors[tensor].shape
                while (made := flow.producer(tensor)) is not None and made.name in aten.TURNS | aten.RESHAPES:
                    tensor = made.inputs[0]
                return self._expressions.of(tensor), shape
        return None

    def shape_at(self, path: str, number: int, side: str, index: Argument) -> tuple[int, ...] | None:
        """The shape of what stands there."""
        tensor = self._tensor_at(path, number, side, index)
        return None if tensor is None else self._expressions.values.flow.tensors[tensor].shape

    def _tensor_at(self, path: str, number: int, side: str, index: Argument) -> int | None:
        for call in self.calls(path)[number : number + 1]:
            for place, tensor in (call.inputs if side == "input" else call.outputs).items():
                if index == (0 if side == "input" and place is None else place):
                    return tensor
        return None

    def holding(self, expression: int, within: ModuleCall) -> list[Boundary]:
        """The boundaries inside one call, and of it, where the expression stands; single tensors first.

        Modules that several layers share (vLLM has one rotary embedding for all) are no place of one layer.
        """
        inside = [
            each
            for each in self._found.get(expression, [])
            if within.enter <= each.call.enter and each.call.exit <= within.exit
            if self._visits[id(each.call.module)] == 1
        ]
        return sorted(inside, key=lambda each: len(each.tensors))


def _of_call(expressions: Expressions, call: ModuleCall) -> Iterator[Boundary]:
    tensors = expressions.values.flow.tensors
    sides: tuple[Literal["input", "output"], ...] = ("input", "output")
    for side in sides:
        places = call.inputs if side == "input" else call.outputs
        for place, tensor in places.items():
            yield Boundary(call, side, (place,), (tensor,))
        for (p, left), (q, right) in combinations(places.items(), 2):
            if tensors[left].shape == tensors[right].shape and tensors[left].dtype.is_floating_point:
                yield Boundary(call, side, (p, q), (left, right))
