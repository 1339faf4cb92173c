"""Several lists of blocks that one stream goes through, as one list: prelude, core and coda; two stacks in turn.

What leaves a block of one list enters a block of another, or is made into what enters it without mixing positions. The
blocks are numbered list by list, in the order in which the lists begin to run.
"""

from __future__ import annotations

from collections.abc import Iterator

from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.layer_list import LayerList, Run, Stream, additions
from hookmap.discovery.mixing import mixing
from hookmap.discovery.values import Values


def joined(values: Values, candidates: list[LayerList]) -> Iterator[LayerList]:
    """Lists that the same stream goes through, as one, for each set of them."""
    lists = [each for each in candidates if _all_add(values, each)]
    family = list(range(len(lists)))
    for a, b in _links(values, lists):
        old, new = family[b], family[a]
        family = [new if number == old else number for number in family]
    for number in dict.fromkeys(family):
        members = [each for each, own in zip(lists, family, strict=True) if own == number]
        if len(members) > 1 and not any(_nested(a, b) for a in members for b in members if a is not b):
            yield _as_one(sorted(members, key=lambda each: each.first.enter))


def _all_add(values: Values, layers: LayerList) -> bool:
    """Whether each block adds to the stream in its first run."""
    first = [(layers.calls[run], stream) for run, stream in layers.streams.items() if run[1] == 0]
    return all(additions(values, call, stream) for call, stream in first)


def _links(values: Values, lists: list[LayerList]) -> Iterator[tuple[int, int]]:
    """Pairs of lists where the stream that leaves a block of the first enters the second."""
    leaving: dict[int, list[int]] = {}
    for number, each in enumerate(lists):
        for _, leave in each.streams.values():
            leaving.setdefault(leave, []).append(number)
    for here, each in enumerate(lists):
        alike = {leave for leave, owners in leaving.items() for other in owners if _alike(lists[other], each)}
        before = [None, *each.order]
        for last, run in zip(before, each.order, strict=False):
            entry = each.streams[run][0]
            if last is not None and each.streams[last][1] == entry:
                continue
            for leave in _read(values, entry, alike, each.seq):
                yield from ((other, here) for other in leaving[leave] if _may_join(lists[other], each))


def _may_join(a: LayerList, b: LayerList) -> bool:
    return a is not b and _alike(a, b) and not _nested(a, b)


def _alike(a: LayerList, b: LayerList) -> bool:
    return (a.width, a.seq) == (b.width, b.seq)


def _nested(a: LayerList, b: LayerList) -> bool:
    """Whether blocks of one run inside a block of the other."""
    return any(x.enter <= y.exit and y.enter <= x.exit for x in a.calls.values() for y in b.calls.values())


def _read(values: Values, entry: int, leaving: set[int], seq: int) -> set[int]:
    """Those of `leaving` that a value is made of, position by position."""
    if entry in leaving:
        return {entry}
    ops, reads = values.cone(entry, leaving, values.flow.calls[0])
    return set() if mixing(values, ops, seq) else reads


def _as_one(members: list[LayerList]) -> LayerList:
    calls, streams = dict[Run, ModuleCall](), dict[Run, Stream]()
    paths: list[str] = []
    for each in members:
        start = len(paths)
        calls |= {(start + number, run): call for (number, run), call in each.calls.items()}
        streams |= {(start + number, run): stream for (number, run), stream in each.streams.items()}
        paths += [each.path.replace("{i}", each.name(number)) for number in range(each.length)]
    prefix = _common(paths)
    path, first = ".".join([*prefix, "{i}"]), members[0]
    names = tuple(".".join(each.split(".")[len(prefix) :]) for each in paths)
    return LayerList(path, calls, len(paths), streams, first.width, first.seq, first.tokens, lists=(path,), names=names)


def _common(paths: list[str]) -> list[str]:
    """The names that all paths begin with, without their last."""
    found = []
    for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        found.append(names[0])
    return found
