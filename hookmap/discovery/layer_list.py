"""The list of blocks: which numbered modules carry the residual stream, and which value of it enters and leaves each.

A candidate is a group of modules whose paths differ in one number, each of which hands a tensor [.., pos, d] to the
next. Among the candidates the one whose blocks add to the stream is chosen. No other part of a module's name is asked.
A block may run several times in one forward pass: everything is known of each run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from hookmap.discovery.dataflow import ModuleCall, Place
from hookmap.discovery.linear_steps import linear_path
from hookmap.discovery.values import Values

Rows = Literal["all", "first", "last"]
Run = tuple[int, int]
"""the number of a block, and which of its runs in one forward pass, from 0"""
Stream = tuple[int, int]
"""the value of the residual stream that enters a block, and the one that leaves it"""
_Handed = dict[tuple[Run, Run], dict[Place, int]]
"""two runs, one behind the other -> place in the arguments of the second -> the value that the first hands it"""


@dataclass(frozen=True)
class Numbered:
    """Modules whose paths differ in one number."""

    path: str
    """template over `{i}`"""
    calls: dict[Run, ModuleCall]
    """each call of each module; a number that is missing was never called"""
    names: tuple[str, ...] = ()
    """what `{i}` is for each module, where that is not its number"""
    worded: bool = False
    """they are modules under words"""
    size: int = 0
    """how many modules the list holds, called or not"""

    @property
    def length(self) -> int:
        return max(self.size, *(number + 1 for number, _ in self.calls))

    @property
    def order(self) -> list[Run]:
        """The runs, in the order of the calls."""
        return sorted(self.calls, key=lambda run: self.calls[run].enter)

    @property
    def numbers(self) -> set[int]:
        """The numbers that were called."""
        return {number for number, _ in self.calls}


@dataclass(frozen=True)
class LayerList:
    """The list of blocks that carries the residual stream."""

    path: str
    """template over `{i}`"""
    calls: dict[Run, ModuleCall]
    """each run of each block; a number that is missing was never called"""
    length: int
    streams: dict[Run, Stream]
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
    names: tuple[str, ...] = ()
    """what `{i}` is for each block, where that is not its number"""
    worded: bool = False
    """the blocks are modules under words"""
    unread: dict[int, str] = field(default_factory=dict)
    """number of a block that runs and has no points -> the reason"""
    uncovered_lists: tuple[str, ...] = ()
    """templates of other lists of blocks that the output is computed through"""

    @property
    def order(self) -> list[Run]:
        """The runs with a stream, in the order of their calls."""
        return sorted(self.streams, key=lambda run: self.calls[run].enter)

    @property
    def numbers(self) -> list[int]:
        """The blocks with a stream."""
        return sorted({number for number, _ in self.streams})

    def name(self, number: int) -> str:
        """What `{i}` is for a block."""
        return self.names[number] if self.names else str(number)

    def times(self, number: int) -> int:
        """How often a block runs in one forward pass."""
        return sum(block == number for block, _ in self.calls)

    @property
    def first(self) -> ModuleCall:
        return min(self.calls.values(), key=lambda call: call.enter)

    @property
    def last(self) -> ModuleCall:
        return max(self.calls.values(), key=lambda call: call.enter)

    @property
    def end(self) -> int:
        """The value of the stream that leaves the block that runs last."""
        return self.streams[self.order[-1]][1]


def shape_at(values: Values, call: ModuleCall, value: int) -> tuple[int, ...]:
    """The shape in which a value enters a block; the model may have computed it in another."""
    entered = (t for t in call.entered.values() if values.value(t) == value)
    return values.flow.tensors[next(entered, value)].shape


def numbered_modules(values: Values) -> list[Numbered]:
    """All groups of modules whose paths end in a number and differ in no other part."""
    found: dict[str, dict[str, list[ModuleCall]]] = {}
    for call in values.flow.calls:
        parent, _, last = call.path.rpartition(".")
        if last.isdecimal():
            found.setdefault(f"{parent}.{{i}}" if parent else "{i}", {}).setdefault(last, []).append(call)
    return [_numbered(values, path, calls) for path, calls in found.items()]


def _numbered(values: Values, path: str, calls_of: dict[str, list[ModuleCall]]) -> Numbered:
    """The modules that are there, called or not; those of a list with gaps keep their numbers as names."""
    root = values.flow.calls[0]  # of a part, its path is that in the whole model
    own = path.removesuffix("{i}").removesuffix(".").removeprefix(root.path).removeprefix(".")
    holder = root.module.get_submodule(own)
    names = sorted({*calls_of, *(name for name in holder._modules if name.isdecimal())}, key=int)
    runs = {(names.index(name), run): call for name, calls in calls_of.items() for run, call in enumerate(calls)}
    return Numbered(path, runs, names=unnumbered(names), size=len(names))


def unnumbered(names: Sequence[str]) -> tuple[str, ...]:
    """The names; none where they are the numbers 0, 1, 2, …"""
    return () if list(names) == [str(n) for n in range(len(names))] else tuple(names)


# A chain: modules that hand a tensor on -------------------------------------------------------------------------------


def chain(values: Values, modules: Numbered, seq: int, linked: bool = False) -> LayerList | None:
    """The modules as a list of blocks, where each hands a tensor with `seq` positions to the next; else None.

    `linked`: what leaves a block may be added to, or scaled, before it enters the next.
    """
    if len(modules.numbers) == 1 and max(modules.numbers) > 0:
        return None
    handed = {
        (here, after): _handed(values, modules.calls[here], modules.calls[after], seq, linked)
        for here, after in pairwise(modules.order)
    }
    onward = [places for (here, after), places in handed.items() if here[0] < after[0]]  # not where a round begins
    if onward and sum(map(bool, onward)) < max(1, len(onward) // 2):
        return None
    streams = dict(_streams(values, modules, seq, handed))
    if not streams:
        return None
    first = next(iter(streams))
    width = shape_at(values, modules.calls[first], streams[first][0])[-1]
    found = LayerList(
        modules.path,
        modules.calls,
        modules.length,
        streams,
        width,
        seq,
        seq,
        lists=(modules.path,),
        names=modules.names,
        worded=modules.worded,
    )
    in_order = [streams[number] for number in found.order]
    return replace(found, contiguous=not linked or all(a[1] == b[0] for a, b in pairwise(in_order)))


def _handed(values: Values, here: ModuleCall, after: ModuleCall, seq: int, linked: bool) -> dict[Place, int]:
    """Place in the arguments of `after` -> the value that `here` made, gave out, and that enters there."""
    made = [value for value in wide(values, here.outputs, seq).values() if values.made_in(value, here)]
    entering = wide(values, after.entered, seq)
    if not linked:
        return {place: value for place, value in entering.items() if value in made}
    between = replace(here, enter=here.exit, exit=after.enter)
    return {
        place: given
        for place, value in entering.items()
        for given in made
        if value == given or linear_path(values, between, given, value, gathers=True)
    }


def wide(values: Values, tensors: Mapping[Place, int], seq: int) -> dict[Place, int]:
    """Those that have `seq` positions and an axis of features, as values; `[batch * pos, d]` if there are no others."""
    shapes = {place: values.shape(tensor) for place, tensor in tensors.items()}
    found = {p: values.value(t) for p, t in tensors.items() if len(shapes[p]) >= 3 and seq in shapes[p][:-1]}
    return found or {p: values.value(t) for p, t in tensors.items() if len(shapes[p]) == 2 and shapes[p][0] == seq}


def _streams(values: Values, modules: Numbered, seq: int, handed: _Handed) -> Iterator[tuple[Run, Stream]]:
    """The stream of each run that a stream enters and leaves."""
    votes = _votes(values, modules, seq, handed)
    entries: dict[Run, list[Place]] = {}
    exits: dict[Run, int] = {}
    for (here, after), places in handed.items():
        if places:
            exits[here] = places[max(places, key=lambda place: votes[place])]
            entries[after] = [place for place, value in places.items() if value == exits[here]]
    usual = next(iter(entries.values()), [0])[:1]
    for run in modules.order:
        call = modules.calls[run]
        entering = wide(values, call.entered, seq)
        at_place = (entering[place] for place in entries.get(run, usual) if place in entering)
        entry = next(at_place, next(iter(entering.values()), None))
        if entry is None:
            continue
        leave = exits[run] if run in exits else _leaving(values, call, seq, entry)
        if leave is not None:
            yield run, (entry, leave)


def _votes(values: Values, modules: Numbered, seq: int, handed: _Handed) -> Counter[Place]:
    """How much speaks for each place in the arguments as that of the stream.

    Where several tensors cross the blocks, the stream is the one that is added to. Of two that are added to (a
    reversible block), it is the one that the block's own branches read.
    """
    votes = Counter(place for places in handed.values() for place in places)
    for (here, _), places in handed.items() if len(votes) > 1 else ():
        call = modules.calls[here]
        entering = wide(values, call.entered, seq)
        added = [p for p, leave in places.items() if p in entering and additions(values, call, (entering[p], leave))]
        votes.update(added)
        votes.update(p for p in added if len(added) > 1 and _feeds(values, call, (entering[p], places[p])))
    return votes


def _leaving(values: Values, call: ModuleCall, seq: int, entry: int) -> int | None:
    """The output of a module that the stream leaves by, where no next module says which: the one that is added to."""
    same = [v for v in wide(values, call.outputs, seq).values() if values.size(v) == values.size(entry)]
    return next((v for v in same if len(same) > 1 and additions(values, call, (entry, v))), same[0] if same else None)


def additions(values: Values, call: ModuleCall, stream: Stream) -> int:
    """How many additions lie on the way of the stream through a block."""
    return sum(step.kind == "add" for step in linear_path(values, call, *stream))


def adds(values: Values, call: ModuleCall, seq: int) -> bool:
    """Whether a module adds what it computes of the tokens to a tensor that enters it."""
    leaving = wide(values, call.outputs, seq).values()
    paths = (
        linear_path(values, call, entry, leave)
        for entry in wide(values, call.entered, seq).values()
        for leave in leaving
        if values.size(entry) == values.size(leave)
    )
    branches = (step.branch for path in paths for step in path if step.branch is not None)
    return any(not values.is_constant(branch, of_tokens=True) for branch in branches)


def _feeds(values: Values, call: ModuleCall, stream: Stream) -> bool:
    """Whether something that is added to the stream was computed from it."""
    added = [step.branch for step in linear_path(values, call, *stream) if step.branch is not None]
    return any(stream[0] in values.cone(branch, [stream[0]], call)[1] for branch in added)
