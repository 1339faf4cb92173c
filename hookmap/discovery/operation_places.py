"""Locates a tensor at an operation in a module's own forward, where no module's boundary exposes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hookmap.discovery import aten
from hookmap.discovery.dataflow import Operation
from hookmap.discovery.locate import Location, Locator
from hookmap.maps.reading import BY_DATAFLOW
from hookmap.maps.templates import TermTemplate

_NOT_EVERYWHERE = {*aten.RESHAPES, *aten.ALIASES, *aten.COPIES, *aten.REPEATS, "alias_update", "copy"}
"""operations that run or not with the dtype, the device, the cache or the size of a batch"""


def at_output(locator: Locator, tensor: int, axes: Sequence[str] | None) -> Location | None:
    """The tensor as what an operation inside the locator's call gives; None where that says nothing certain."""
    op = locator.values.flow.producer(tensor)
    if op is None:
        return None
    return _at(locator, op, "output", op.outputs.index(tensor) if len(op.outputs) > 1 else None, axes)


def before_casts(locator: Locator, tensor: int) -> Iterator[int]:
    """The tensor, and those with the same numbers that it was cast or copied from, inside the locator's call."""
    yield tensor
    flow = locator.values.flow
    while (op := flow.producer(tensor)) is not None and op.name in aten.COPIES and op.time > locator.within.enter:
        (tensor,) = op.inputs[:1]
        yield tensor


def at_input(locator: Locator, op: Operation, number: int, axes: Sequence[str] | None) -> Location | None:
    """The `number`-th tensor that an operation reads."""
    return _at(locator, op, "input", number, axes)


def _at(locator: Locator, op: Operation, side: str, index: int | None, axes: Sequence[str] | None) -> Location | None:
    flow = locator.values.flow
    if op.name in _NOT_EVERYWHERE or op.call < 0 or not locator.within.enter < op.time < locator.within.exit:
        return None
    call = flow.calls[op.call]
    alike = [each.time for each in flow.operations if each.call == op.call and each.name == op.name]
    calls = locator.calls_of[id(call.module)]
    if not locator.is_of_one_layer(call):
        return None
    tensor = (op.inputs if side == "input" else op.outputs)[index or 0]
    term = TermTemplate(
        module=locator.templated(call.path),
        side=side,  # type: ignore[arg-type]
        index=index,
        axes=None if axes is None else tuple(axes),
        flat=len(flow.tensors[tensor].shape) < 3 and axes is None,
        rows=locator.rows,
        operation=op.name,
        occurrence=alike.index(op.time) if len(alike) > 1 or op.name == "cat" else None,
        visits=None if op.name == "cat" else len(alike),  # a cache joins, too
        call=calls.index(call) if len(calls) > 1 else None,
    )
    return Location((term,), op.time, BY_DATAFLOW)
