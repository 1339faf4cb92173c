"""The boundaries of one pass by what stands there: one tensor, or two whose sum is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.dataflow import Place as Argument
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
        """The boundaries inside one call, and of it, where the expression stands; single tensors first."""
        inside = [
            each
            for each in self._found.get(expression, [])
            if within.enter <= each.call.enter and each.call.exit <= within.exit
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
