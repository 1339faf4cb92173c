"""Where a point can be written: everything that reads it does so later, and from there."""

from __future__ import annotations

from collections.abc import Iterable

from hookmap.discovery.dataflow import Operation
from hookmap.vllm.boundaries import Boundary
from hookmap.vllm.expressions import Expressions


def how_written(seen: Expressions, boundary: Boundary, expression: int, is_stream: bool) -> str | None:
    """`replace`: other tensors may be passed on there; `in place`: the tensors are to be overwritten; None: neither.

    `is_stream`: whether the point is the stream itself, which must change for all of its readers. Another point that is
    the same tensor (what a branch without a norm reads) changes for that module alone.
    """
    values = seen.values
    own = [values.value(tensor) for tensor in boundary.tensors]
    readers = [op for value in own for op in values.consumers.get(value, [])]
    behind = [op for op in readers if op.time > boundary.time]
    if len(own) > 1:
        sums = {values.value(out) for op in behind for out in op.outputs}
        is_complete = {*seen.values_of.get(expression, [])} <= sums
        is_complete &= all(expression in map(seen.of, op.outputs) for op in behind)
    elif is_stream or boundary.side == "output":
        is_complete = len(behind) == len(readers) and _all_from(seen, own[0], expression, boundary.time)
    else:
        is_complete = any(op.time < boundary.call.exit for op in behind)
    if not behind or not is_complete:
        return None
    if boundary.side == "output" or all(op.time < boundary.call.exit for op in behind):
        return "replace"
    return "in place" if is_stream else "replace"


def _all_from(seen: Expressions, value: int, expression: int, time: int) -> bool:
    """Whether every value with the expression is this one, or a copy made of it later."""
    others = [each for each in seen.values_of.get(expression, []) if each != value]
    made = [seen.values.producers.get(each) for each in others]
    return all(op is not None and op.time > time and _reads(seen, op, [value, *others]) for op in made)


def _reads(seen: Expressions, op: Operation, values: Iterable[int]) -> bool:
    return bool({*values} & {*seen.values.operands(op)})
