"""Blocks that are no modules: one forward method adds to the stream what modules of several lists compute.

The trunk is the longest chain of additions that leads to the logits. Its additions repeat: attention, MLP, attention,
MLP, … A block begins where its first branch begins to be computed, and ends where the next block begins.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hookmap.discovery.dataflow import ModuleCall, Operation
from hookmap.discovery.layer_list import LayerList, Run, unnumbered
from hookmap.discovery.linear_steps import STREAM_STEPS, Step, steps
from hookmap.discovery.mixing import mixing
from hookmap.discovery.unnumbered_blocks import names_of, template_of
from hookmap.discovery.values import Values


@dataclass(frozen=True)
class _Addition:
    """What one addition to the trunk adds."""

    place: int
    """index of its step on the trunk"""
    ops: list[Operation]
    """that compute what is added"""
    reads: list[int]
    """indices of the states of the trunk that they read, in order"""
    parts: list[ModuleCall]
    """the modules that they are in"""
    likeness: tuple[Any, ...]
    """the lists that its modules are of, and whether it mixes positions: equal for the same branch of two blocks"""


def scattered(values: Values, seq: int, output: set[int]) -> LayerList | None:
    """The blocks that one forward method makes of modules; None where no additions repeat.

    `output`: the values that the logits are computed from.
    """
    path = _trunk(values, seq, output)
    around = _holder(values, [values.producers[step.result] for step in path if step.kind == "add"])
    if around is None:
        return None
    states = [path[0].source, *(step.result for step in path)]
    additions = [
        _addition(values, states, place, step, around, seq)
        for place, step in enumerate(path)
        if step.kind == "add" and values.made_in(step.result, around)
    ]
    additions = [each for each in additions if each.reads and each.parts]
    period = _period([each.likeness for each in additions])
    return None if period is None else _blocks(values, around, states, additions, period, seq)


# The trunk ------------------------------------------------------------------------------------------------------------


def _trunk(values: Values, seq: int, output: set[int]) -> list[Step]:
    """The linear steps of the longest chain of additions among the values of `output`."""
    count: dict[int, int] = {}
    last: dict[int, Step] = {}
    for value in sorted(values.producers, key=lambda value: values.producers[value].time):
        if value not in output or seq not in values.shape(value):
            continue
        for step in (step for step in steps(values, value) if step.kind in STREAM_STEPS):
            total = count.get(step.source, 0) + (step.kind == "add")
            known = last.get(value)
            older = known is not None and _time(values, step.source) < _time(values, known.source)
            if known is None or total > count[value] or (total == count[value] and older):
                count[value], last[value] = total, step
    if not count:
        return []
    end = max(count, key=lambda value: (count[value], -values.producers[value].time))
    path = []
    while (found := last.get(end)) is not None:
        path.append(found)
        end = found.source
    return path[::-1]


def _holder(values: Values, adding: list[Operation]) -> ModuleCall | None:
    """The innermost module in which most of the additions are; None where there are none."""
    counts = Counter(index for op in adding for index in _around(values, op.call))
    inner = [index for index, count in counts.items() if count > max(1, len(adding) // 2)]
    return values.flow.calls[max(inner)] if inner else None


def _around(values: Values, index: int | None) -> Iterator[int]:
    while index is not None and index >= 0:
        yield index
        index = values.flow.calls[index].parent


def _time(values: Values, value: int) -> int:
    return values.producers[value].time if value in values.producers else -1


def _addition(values: Values, states: list[int], place: int, step: Step, around: ModuleCall, seq: int) -> _Addition:
    ops, reads = values.cone(step.branch or 0, states[: place + 1], around)
    times = [op.time for op in ops]
    children = values.children.get(around.index, [])
    parts = [call for call in children if any(call.enter < time < call.exit for time in times)]
    lists = tuple(re.sub(r"\d+", "#", call.path.rpartition(".")[0]) for call in parts)
    likeness = (lists, bool(mixing(values, ops, seq)))
    return _Addition(place, ops, sorted(map(states.index, reads)), parts, likeness)


def _period(likenesses: Sequence[object]) -> int | None:
    """After how many additions the same ones come again."""
    count = len(likenesses)
    for period in range(1, count // 2 + 1):
        if count % period == 0 and all(a == b for a, b in zip(likenesses, likenesses[period:], strict=False)):
            return period
    return None


# The blocks -----------------------------------------------------------------------------------------------------------


def _blocks(
    values: Values, around: ModuleCall, states: list[int], additions: list[_Addition], period: int, seq: int
) -> LayerList:
    own = [additions[first : first + period] for first in range(0, len(additions), period)]
    entries = [each[0].reads[-1] for each in own]
    starts = [min(_begin(branch) for branch in each) for each in own]
    behind = {entry - before[-1].place - 1 for before, entry in zip(own, entries[1:], strict=False)}
    leave = _continued(values, states, own[-1][-1].place + 1, min(behind), own[-2][-1].place + 1)
    ends = [*starts[1:], _end(values, around, leave)]
    rows = [_modules(values, around, start, end) for start, end in zip(starts, ends, strict=True)]
    if len(set(map(len, rows))) > 1:
        rows = [[branch.parts[0].path for branch in each] for each in own]
    kept = list(dict.fromkeys(map(tuple, rows)))
    columns = [column for column in map(list, zip(*kept, strict=True)) if len(set(column)) == len(column)]
    names = names_of(columns[0]) if columns else ()
    lists = [template for column in columns if (template := template_of(column, names)) is not None]
    times: Counter[int] = Counter()
    calls: dict[Run, ModuleCall] = {}
    for row, start, end in zip(rows, starts, ends, strict=True):
        number = kept.index(tuple(row))
        calls[number, times[number]] = ModuleCall(
            around.index, row[0], around.module, around.parent, enter=start - 1, exit=end
        )
        times[number] += 1
    streams = dict(zip(calls, pairwise([*(states[entry] for entry in entries), leave]), strict=True))
    width = values.shape(leave)[-1]
    path = lists[0] if lists else around.path
    return LayerList(
        path, calls, len(kept), streams, width, seq, seq, lists=tuple(lists), names=unnumbered(names) if lists else ()
    )


def _begin(branch: _Addition) -> int:
    """When the first operation or module of a branch began."""
    return min(min(op.time for op in branch.ops), *(call.enter for call in branch.parts))


def _end(values: Values, around: ModuleCall, leave: int) -> int:
    """The time after which a value is there, and the module that gives it has returned."""
    time = values.producers[leave].time
    return max([time, *(c.exit for c in values.children.get(around.index, []) if c.enter < time < c.exit)]) + 1


def _continued(values: Values, states: list[int], place: int, count: int, like: int) -> int:
    """The last block's end: as many steps behind its last addition as in the blocks before (post-norms, masks)."""
    value = states[place]
    for offset in range(count):
        wanted = _kinds(values, states[like + offset], states[like + offset + 1])
        following = [
            result
            for result, op in values.producers.items()
            if op.time > _time(values, value) and _kinds(values, value, result) & wanted
        ]
        value = min(following, key=lambda result: values.producers[result].time, default=value)
    return value


def _kinds(values: Values, source: int, result: int) -> set[str]:
    return {step.kind for step in steps(values, result) if step.source == source}


def _modules(values: Values, around: ModuleCall, start: int, end: int) -> list[str]:
    """Paths of the modules that run between two times, in their order."""
    return [call.path for call in values.children.get(around.index, []) if start <= call.enter < end]
