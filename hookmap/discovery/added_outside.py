"""Blocks that give only what is to be added, `x = x + block(x)`: the addition stands behind the block's module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from hookmap.discovery import aten
from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.layer_list import LayerList, Numbered, Run, Stream, adds, shape_at, wide
from hookmap.discovery.linear_steps import linear_path, steps
from hookmap.discovery.values import Values

_BETWEEN = ("cast", "scale", "norm", "gate")
"""what may be done to the sum before it enters the next block"""


def added_outside(values: Values, groups: list[Numbered], seq: int) -> Iterator[LayerList]:
    """Lists of modules where the model adds what each gives to what entered it, and hands the sum to the next.

    A block begins as its module does, and ends with the addition.
    """
    for group in groups:
        order = group.order
        if len(order) < 2 or any(adds(values, group.calls[run], seq) for run in order):
            continue
        streams = {run: found for run in order if (found := sum_behind(values, group.calls[run], seq)) is not None}
        if len(streams) < len(order) or not all(_hands_on(values, streams[a], streams[b]) for a, b in pairwise(order)):
            continue
        calls = {run: _with_sum(values, group.calls[run], streams[run][1]) for run in order}
        yield _list_of(values, group, calls, streams, seq)


def sum_behind(values: Values, call: ModuleCall, seq: int) -> Stream | None:
    """What enters a module, and its sum with what the module gives, or a multiple of it; None where there is none."""
    entered = set(wide(values, call.entered, seq).values())
    given = set(wide(values, call.outputs, seq).values())
    later = {op.time: op for value in entered for op in values.consumers.get(value, ()) if op.time > call.exit}
    for _, op in sorted(later.items()):
        if op.name not in aten.ADDITIONS:
            continue
        behind = replace(call, enter=call.exit, exit=op.time)
        for step in steps(values, values.value(op.outputs[0])):
            added = step.branch if step.source in entered else None
            if added is not None and any(added == own or linear_path(values, behind, own, added) for own in given):
                return step.source, step.result
    return None


def _hands_on(values: Values, before: Stream, after: Stream) -> bool:
    """Whether nothing is added to the sum behind one block before it enters the next."""
    path = linear_path(values, values.flow.calls[0], before[1], after[0])
    return before[1] == after[0] or (bool(path) and all(step.kind in _BETWEEN for step in path))


def _with_sum(values: Values, call: ModuleCall, total: int) -> ModuleCall:
    """The call until the sum is there; the module itself is inside it."""
    return replace(call, enter=call.enter - 1, exit=values.producers[total].time + 1, outputs={None: total})


def _list_of(
    values: Values, group: Numbered, calls: dict[Run, ModuleCall], streams: dict[Run, Stream], seq: int
) -> LayerList:
    first = group.order[0]
    width = shape_at(values, calls[first], streams[first][0])[-1]
    joined = all(streams[a][1] == streams[b][0] for a, b in pairwise(group.order))
    return LayerList(
        group.path, calls, group.length, streams, width, seq, seq,
        lists=(group.path,), names=group.names, contiguous=joined, worded=group.worded,
    )  # fmt: skip
