"""Blocks that no list numbers: attributes, the values of a ModuleDict, one module that is called in a loop.

Of the modules that one module holds under words, those are blocks that add to a tensor of the stream's size. They are
numbered in the order of their calls, and their names are what differs between their paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.layer_list import LayerList, Numbered, adds, chain, unnumbered
from hookmap.discovery.values import Values


def worded_modules(values: Values, seq: int, lists: list[list[ModuleCall]]) -> Iterator[Numbered]:
    """Of each module, those under words that add to a tensor with `seq` positions: several, or one that runs again.

    `lists`: the calls of numbered blocks. What is inside one is a part of it; and what holds a list that is as long is
    no block beside others.
    """
    inside = [(call.enter, call.exit) for calls in lists for call in calls]
    calls_of: dict[str, dict[str, list[ModuleCall]]] = {}
    for call in values.flow.calls:
        parent, _, last = call.path.rpartition(".")
        if not last.isdecimal() and not any(start < call.enter < end for start, end in inside):
            calls_of.setdefault(parent, {}).setdefault(call.path, []).append(call)
    for siblings in calls_of.values():
        found = [calls for path, calls in siblings.items() if path and adds(values, calls[0], seq)]
        if sum(map(len, found)) > 1 and not any(
            _holds(call, each, len(found)) for (call, *_) in found for each in lists
        ):
            paths = [calls[0].path for calls in found]
            names = names_of(paths)
            runs = {(n, run): call for n, calls in enumerate(found) for run, call in enumerate(calls)}
            yield Numbered(template_of(paths, names) or "{i}", runs, names=unnumbered(names), worded=True)


def _holds(outer: ModuleCall, blocks: list[ModuleCall], count: int) -> bool:
    """Whether a module holds blocks of a list, which has at least `count` of them."""
    inside = {call.path for call in blocks if outer.enter < call.enter and call.exit < outer.exit}
    return len(inside) >= count


def trimmed(values: Values, group: Numbered, layers: LayerList, linked: bool = False) -> LayerList:
    """The list without what stands before and behind its blocks: an embedding, a final norm, a head.

    Such a module adds nothing to the stream, and is of another class than those that do.
    """
    seq, first = layers.seq, {n: call for (n, run), call in sorted(group.calls.items()) if run == 0}
    adding = {n for n, call in first.items() if (n, 0) in layers.streams and adds(values, call, seq)}
    classes = {type(first[n].module) for n in adding}
    others = {n for n in first if n not in adding and type(first[n].module) not in classes}
    if not adding or not others or others & set(range(min(adding), max(adding))):
        return layers
    start = max((n + 1 for n in others if n < min(adding)), default=0)
    end = min((n for n in others if n > max(adding)), default=group.length)
    kept = {(n - start, run): call for (n, run), call in group.calls.items() if start <= n < end}
    names = group.names or tuple(map(str, range(group.length)))
    shorter = Numbered(group.path, kept, names=unnumbered(names[start:end]), size=end - start)
    return chain(values, shorter, seq, linked) or layers


# Their names ----------------------------------------------------------------------------------------------------------


def names_of(paths: list[str]) -> tuple[str, ...]:
    """What differs between the paths: calm_low.0, calm_high.0 -> low, high."""
    words = [_words(path) for path in paths]
    front, back = _ends(words)
    return tuple("".join(each[front : len(each) - back]) for each in words)


def template_of(paths: list[str], names: tuple[str, ...]) -> str | None:
    """The template over `{i}` that is each of the paths for its name; None where there is none."""
    words = [_words(path) for path in paths]
    front, back = _ends(words)
    own = names_of(paths)
    place = "{i}"
    if own != names:
        if not all(map(str.isdecimal, (*own, *names))):
            return None
        distances = {int(a) - int(b) for a, b in zip(own, names, strict=True)}
        if len(distances) > 1 or min(distances) < 0:
            return None
        place = f"{{i+{distances.pop()}}}"
    return "".join(words[0][:front]) + place + "".join(words[0][len(words[0]) - back :])


def _words(path: str) -> list[str]:
    """The parts of a path between which a number or a word may differ: `calm_low.0` -> calm, _, low, ., 0."""
    return re.findall(r"\d+|[^\W\d_]+|[\W_]", path)


def _ends(words: list[list[str]]) -> tuple[int, int]:
    """How many words all paths begin with, and end with; one at least is left between."""
    front = _alike(words)
    return front, _alike([each[front:][::-1] for each in words])


def _alike(words: list[list[str]]) -> int:
    most = min(map(len, words)) - 1
    return next((n for n in range(most) if len({each[n] for each in words}) > 1), most)
