"""Blocks with a second residual stream in a tensor of its own: reversible pairs, and streams that are mixed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.linear_steps import Step, linear_path
from hookmap.discovery.values import Values


@dataclass(frozen=True)
class Streams:
    """The way of a block's stream, and of a second one where there is one."""

    own: list[Step]
    twin: list[Step] = field(default_factory=list)
    """of a reversible block, whose branches each read one stream and add to the other"""
    mixed: bool = False
    """whether the streams are mixed with one another in some other way"""


def streams_of(values: Values, call: ModuleCall, entry: int, leave: int) -> Streams:
    """The linear steps of the stream from `entry` to `leave`, and what a second stream does to it."""
    own = linear_path(values, call, entry, leave)
    found = Streams(own)
    for start, end in _others(values, call, entry, leave) if own else ():
        if end in (step.result for step in own) or not values.made_in(end, call):
            continue
        twin = linear_path(values, call, start, end)
        if twin and leave not in (step.result for step in twin):
            reads = _of_branches(values, call, own, twin), _of_branches(values, call, twin, own)
            if _are_mixed(values, call, own, twin):
                return Streams(own, mixed=True)
            if all(reads):
                crosses = all(one == {True} for one in reads)
                found = Streams(own, twin) if crosses else Streams(own, mixed=True)
    return found


def _others(values: Values, call: ModuleCall, entry: int, leave: int) -> Iterator[tuple[int, int]]:
    """The other values of the stream's shape that enter, each with each of those that leave and are read behind it.

    An attention's values, which the next one mixes with its own, are no stream: they are split into heads, or what
    leaves is not read, where only the first layer's are mixed into all.
    """
    shapes = {values.flow.tensors[t].shape for t in call.entered.values() if values.value(t) == entry}
    entering, leaving = (
        [values.value(t) for t in tensors.values() if values.flow.tensors[t].shape in shapes]
        for tensors in (call.entered, call.outputs)
    )
    if entry in entering:
        entering.remove(entry)  # it may enter in two places, as both streams of the first block
    return product(entering, (value for value in leaving if value != leave and _is_read_behind(values, call, value)))


def _is_read_behind(values: Values, call: ModuleCall, value: int) -> bool:
    return any(op.time > call.exit for op in values.consumers.get(value, ()))


def _are_mixed(values: Values, call: ModuleCall, own: list[Step], twin: list[Step]) -> bool:
    """Whether a state of either stream is added to one of them as it is, or times a constant or a weight."""
    states = {own[0].source, twin[0].source, *(step.result for step in own + twin)}
    added = [step.branch for step in own + twin if step.branch is not None]
    ways = (linear_path(values, call, state, value) for value in added for state in states)
    return bool(states & set(added)) or any(way and all(step.kind != "norm" for step in way) for way in ways)


def _of_branches(values: Values, call: ModuleCall, added_to: list[Step], other: list[Step]) -> set[bool]:
    """Of what is added to one stream and reads any: whether it reads nothing but the other.

    Both may be one at the beginning of the first block: that value is read alone, or not at all.
    """
    own, others = ({path[0].source, *(step.result for step in path)} for path in (added_to, other))
    reads = [values.cone(step.branch, own | others, call)[1] for step in added_to if step.branch is not None]
    both = own & others
    return {each <= others and (each <= both or not each & both) for each in reads if each}
