"""The list of blocks: which numbered modules carry the residual stream, and which value of it enters and leaves each.

A candidate is a group of modules whose paths differ in one number, each of which hands a tensor [.., pos, d] to the
next. Among the candidates the one whose blocks add to the stream is chosen. No other part of a module's name is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from hookmap.discovery.dataflow import ModuleCall, Place
from hookmap.discovery.linear import linear_path
from hookmap.discovery.values import Values

Rows = Literal["all", "first", "last"]
Stream = tuple[int, int]
"""the value of the residual stream that enters a block, and the one that leaves it"""


@dataclass(frozen=True)
class Numbered:
    """Modules whose paths differ in one number."""

    path: str
    """template over `{i}`"""
    calls: dict[int, ModuleCall]
    """number -> the first call of the module; a number that is missing was never called"""

    @property
    def length(self) -> int:
        return max(self.calls) + 1

    @property
    def order(self) -> list[int]:
        """The numbers, in the order of the calls."""
        return sorted(self.calls, key=lambda number: self.calls[number].enter)


@dataclass(frozen=True)
class LayerList:
    """The list of blocks that carries the residual stream."""

    path: str
    """template over `{i}`"""
    calls: dict[int, ModuleCall]
    """block number -> its first call; a number that is missing was never called"""
    length: int
    streams: dict[int, Stream]
    """block number -> its stream, of the first call"""
    width: int
    seq: int
    """positions of the stream, usually as many as tokens"""
    tokens: int
    rows: Rows = "all"
    """the positions of the stream that are the tokens', where there are more"""
    lists: tuple[str, ...] = ()
    """templates of all lists that the modules of a block are in; more than `path` where a block is no module"""
    contiguous: bool = True
    """the stream that leaves a block enters the next unchanged; not so where the model adds to it between them (BLT)"""
    uncovered_lists: tuple[str, ...] = ()
    """templates of other lists of blocks that the output is computed through"""
    runs: dict[int, int] = field(default_factory=dict)
    """block number -> how often the block runs in one forward pass"""

    @property
    def order(self) -> list[int]:
        """The numbers of the blocks with a stream, in the order of their calls."""
        return sorted(self.streams, key=lambda number: self.calls[number].enter)

    @property
    def first(self) -> ModuleCall:
        return min(self.calls.values(), key=lambda call: call.enter)

    @property
    def last(self) -> ModuleCall:
        return max(self.calls.values(), key=lambda call: call.enter)

    @property
    def end(self) -> int:
        """The value of the stream that leaves the block of the highest number."""
        return self.streams[max(self.streams)][1]


def numbered_modules(values: Values) -> list[Numbered]:
    """All groups of modules whose paths end in a number and differ in no other part."""
    found: dict[str, dict[int, ModuleCall]] = {}
    for call in values.flow.calls:
        parent, _, last = call.path.rpartition(".")
        if last.isdecimal():
            found.setdefault(f"{parent}.{{i}}" if parent else "{i}", {}).setdefault(int(last), call)
    return [Numbered(path, calls) for path, calls in found.items()]


# A chain: modules that hand a tensor on -------------------------------------------------------------------------------


def chain(values: Values, modules: Numbered, seq: int, linked: bool = False) -> LayerList | None:
    """The modules as a list of blocks, where each hands a tensor with `seq` positions to the next; else None.

    `linked`: what leaves a block may be added to, or scaled, before it enters the next.
    """
    if len(modules.calls) == 1 and modules.length > 1:
        return None
    handed = {
        (here, after): _handed(values, modules.calls[here], modules.calls[after], seq, linked)
        for here, after in pairwise(modules.order)
    }
    links = sum(map(bool, handed.values()))
    if handed and links < max(1, len(handed) // 2):
        return None
    streams = dict(_streams(values, modules, seq, handed))
    if not streams:
        return None
    width = values.shape(next(iter(streams.values()))[0])[-1]
    found = LayerList(modules.path, modules.calls, modules.length, streams, width, seq, seq, lists=(modules.path,))
    in_order = [streams[number] for number in found.order]
    return replace(found, contiguous=not linked or all(a[1] == b[0] for a, b in pairwise(in_order)))


def _handed(values: Values, here: ModuleCall, after: ModuleCall, seq: int, linked: bool) -> dict[Place, int]:
    """Place in the arguments of `after` -> the value that `here` made, gave out, and that enters there."""
    made = [value for value in _wide(values, here.outputs, seq).values() if values.made_in(value, here)]
    entering = _wide(values, after.entered, seq)
    if not linked:
        return {place: value for place, value in entering.items() if value in made}
    between = replace(here, enter=here.exit, exit=after.enter)
    return {
        place: given
        for place, value in entering.items()
        for given in made
        if value == given or linear_path(values, between, given, value)
    }


def _wide(values: Values, tensors: Mapping[Place, int], seq: int) -> dict[Place, int]:
    """Those that have `seq` positions and an axis of features, as values."""
    shapes = {place: values.shape(tensor) for place, tensor in tensors.items()}
    return {p: values.value(t) for p, t in tensors.items() if len(shapes[p]) >= 3 and seq in shapes[p][:-1]}


def _streams(
    values: Values, modules: Numbered, seq: int, handed: dict[tuple[int, int], dict[Place, int]]
) -> Iterator[tuple[int, Stream]]:
    """Number -> stream, of each module that a stream enters and leaves."""
    votes = _votes(values, modules, seq, handed)
    entries: dict[int, list[Place]] = {}
    exits: dict[int, int] = {}
    for (here, after), places in handed.items():
        if places:
            exits[here] = places[max(places, key=lambda place: votes[place])]
            entries[after] = [place for place, value in places.items() if value == exits[here]]
    usual = next(iter(entries.values()), [0])[:1]
    for number in modules.order:
        call = modules.calls[number]
        entering = _wide(values, call.entered, seq)
        at_place = (entering[place] for place in entries.get(number, usual) if place in entering)
        entry = next(at_place, next(iter(entering.values()), None))
        if entry is None:
            continue
        leave = exits[number] if number in exits else _leaving(values, call, seq, entry)
        if leave is not None:
            yield number, (entry, leave)


def _votes(
    values: Values, modules: Numbered, seq: int, handed: dict[tuple[int, int], dict[Place, int]]
) -> Counter[Place]:
    """How much speaks for each place in the arguments as that of the stream.

    Where several tensors cross the blocks, the stream is the one that is added to. Of two that are added to (a
    reversible block), it is the one that the block's own branches read.
    """
    votes = Counter(place for places in handed.values() for place in places)
    for (here, _), places in handed.items() if len(votes) > 1 else ():
        call = modules.calls[here]
        entering = _wide(values, call.entered, seq)
        added = [p for p, leave in places.items() if p in entering and additions(values, call, (entering[p], leave))]
        votes.update(added)
        votes.update(p for p in added if len(added) > 1 and _feeds(values, call, (entering[p], places[p])))
    return votes


def _leaving(values: Values, call: ModuleCall, seq: int, entry: int) -> int | None:
    """The output of a module that the stream leaves by, where no next module says which: the one that is added to."""
    same = [v for v in _wide(values, call.outputs, seq).values() if values.size(v) == values.size(entry)]
    return next((v for v in same if len(same) > 1 and additions(values, call, (entry, v))), same[0] if same else None)


def additions(values: Values, call: ModuleCall, stream: Stream) -> int:
    """How many additions lie on the way of the stream through a block."""
    return sum(step.kind == "add" for step in linear_path(values, call, *stream))


def _feeds(values: Values, call: ModuleCall, stream: Stream) -> bool:
    """Whether something that is added to the stream was computed from it."""
    added = [step.branch for step in linear_path(values, call, *stream) if step.branch is not None]
    return any(stream[0] in values.cone(branch, [stream[0]], call)[1] for branch in added)


# Blocks that are no modules -------------------------------------------------------------------------------------------


def scattered(values: Values, groups: list[Numbered], seq: int) -> Iterator[LayerList]:
    """Blocks that are no modules: the first attention, norm, MLP … of several lists side by side, then the second.

    A block begins where the first of them is entered, and ends where that list is entered the next time.
    """
    for modules in groups:
        calls, length = modules.calls, modules.length
        if 0 not in calls or length < 2 or len(calls) != length:
            continue
        parent = values.flow.calls[calls[0].parent or 0]
        siblings = [each for each in groups if each.length == length and _is_child(each, calls[0].parent)]
        if len(siblings) < 2 or calls[0].enter != min(each.calls[0].enter for each in siblings):
            continue
        entries = [next(iter(_wide(values, calls[n].entered, seq).values()), None) for n in range(length)]
        leave = next(map(values.value, parent.outputs.values()), None)
        states = [value for value in (*entries, leave) if value is not None]
        if len(states) <= length:
            continue
        ends = [*(calls[n].enter for n in range(1, length)), parent.exit]
        spans = {
            n: ModuleCall(parent.index, calls[n].path, parent.module, parent.parent, calls[n].enter - 1, ends[n])
            for n in range(length)
        }
        streams = dict(enumerate(pairwise(states)))
        width = values.shape(states[-1])[-1]
        yield LayerList(
            modules.path, spans, length, streams, width, seq, seq, lists=tuple(each.path for each in siblings)
        )


def _is_child(modules: Numbered, parent: int | None) -> bool:
    return 0 in modules.calls and modules.calls[0].parent == parent
