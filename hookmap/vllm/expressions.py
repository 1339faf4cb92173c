"""Expressions: whether two passes of one model compute the same, wherever it stands in each.

An expression is a number. Tensors that are computed alike from the same weights and inputs have the same one, also
those of two passes, and whatever their shape. A sum is its terms in any order: `h + r` added by a hook, and `h + r`
added by a norm, are one. Casts are left out, and zeros.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

from hookmap.discovery import aten
from hookmap.discovery.dataflow import Operation, TensorRef
from hookmap.discovery.values import Values

Sum = tuple[tuple[int, int], ...]
"""(expression, how often it is added), sorted"""


class Book:
    """Gives each expression its number, over several passes."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.sums: dict[int, Sum] = {}
        """expression that is a sum -> its terms; one of no terms is zero"""

    def number(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def sum_of(self, expressions: list[int]) -> int:
        """The expression of a sum of several."""
        counted: Counter[int] = Counter()
        for each in expressions:
            for term, often in self.terms(each):
                counted[term] += often
        terms = tuple(sorted(counted.items()))
        if len(terms) == 1 and terms[0][1] == 1:
            return terms[0][0]
        found = self.number(("sum", terms))
        self.sums[found] = terms
        return found

    def terms(self, expression: int) -> Sum:
        return self.sums.get(expression, ((expression, 1),))


class Expressions:
    """The expressions of one pass."""

    def __init__(self, values: Values, book: Book) -> None:
        self.values, self.book = values, book
        self._known: dict[int, int] = {}
        self._others = 0
        for op in values.flow.operations:
            self._of_operation(op)

    def of(self, tensor: int) -> int:
        """The expression of a tensor."""
        value = self.values.value(tensor)
        if value not in self._known:
            self._known[value] = self._leaf(value)
        return self._known[value]

    @cached_property
    def values_of(self) -> dict[int, list[int]]:
        """expression -> the values that have it"""
        found: dict[int, list[int]] = {}
        for value, expression in self._known.items():
            found.setdefault(expression, []).append(value)
        return found

    def _leaf(self, value: int) -> int:
        if value in self.values.parameters:
            return self.book.number(("weight", self.values.parameters[value]))
        inputs = {self.values.value(tensor): name for name, tensor in self.values.flow.inputs.items()}
        if value in inputs:
            return self.book.number(("input", inputs[value]))
        self._others += 1
        return self.book.number(("other", self._others, self.values.shape(value)))

    def _of_operation(self, op: Operation) -> None:
        for position, output in enumerate(op.outputs):
            value = self.values.value(output)
            if self.values.producers.get(value) is op:
                self._known[value] = self._made(op, position)

    def _made(self, op: Operation, position: int) -> int:
        operands = [self.of(tensor) for tensor in op.inputs]
        if op.name in ("zeros_like", "zeros", "new_zeros"):
            return self.book.sum_of([])
        if op.name in aten.COPIES | aten.ALIASES and operands:
            return operands[0]
        if self._is_sum(op):
            return self.book.sum_of(operands * (2 if len(operands) == 1 else 1))
        plain = tuple(_plain(arg) for arg in op.args) + tuple(sorted((k, _plain(v)) for k, v in op.kwargs.items()))
        return self.book.number((op.name, tuple(operands), plain, position))

    def _is_sum(self, op: Operation) -> bool:
        """Whether it adds two tensors of one shape."""
        if op.name != "add" or op.kwargs.get("alpha", 1) != 1 or not all(isinstance(a, TensorRef) for a in op.args[:2]):
            return False
        sizes = {self.values.size(self.values.value(arg.id)) for arg in op.args[:2]}
        return len(sizes) == 1


def _plain(argument: Any) -> Any:
    """An argument without tensors, which stand among the operands, as something that can be compared."""
    if isinstance(argument, TensorRef):
        return "tensor"
    if isinstance(argument, (list, tuple)):
        return tuple(map(_plain, argument))
    return repr(argument)
