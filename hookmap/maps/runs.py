"""The order in which layers run, as people write it: `0-1, 3 x (2-3), 4-5`. Pure: text <-> layer numbers.

A layer is written once for each time that it runs; `3 x (...)` is what runs three times, and may hold another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby

_TOKEN = re.compile(r"\s*(?:(\d+)\s*x\s*\(|(\d+)(?:\s*-\s*(\d+))?|([),]))")


@lru_cache(maxsize=256)
def layers_of(text: str) -> tuple[int, ...]:
    """The layers in the order in which they run: `0, 2 x (1-2)` -> (0, 1, 2, 1, 2). Raises ValueError."""
    found, end = _items(text, 0)
    if text[end:].strip():
        raise ValueError(f"{text!r} is no order of layers, such as '0-1, 3 x (2-3), 4': {text[end:]!r} is unexpected")
    return tuple(found)


@lru_cache(maxsize=256)
def pairs_of(texts: tuple[str, ...]) -> frozenset[tuple[int, int]]:
    """(`3 -> 2`, `0-1 -> 1-2`) -> {(3, 2), (0, 1), (1, 2)}. Raises ValueError."""
    found: set[tuple[int, int]] = set()
    for text in texts:
        before, _, here = text.partition(" -> ")
        found |= set(zip(layers_of(before), layers_of(here), strict=True))
    return frozenset(found)


def _items(text: str, place: int) -> tuple[list[int], int]:
    """What stands at a place, up to the end or the bracket that closes it; and where that is."""
    found: list[int] = []
    while (token := _TOKEN.match(text, place)) is not None:
        times, first, last, mark = token.groups()
        if mark == ")":
            break
        place = token.end()
        if times is not None:
            inside, place = _items(text, place)
            if text[place : place + 1] != ")":
                raise ValueError(f"{text!r} is no order of layers: a bracket is not closed")
            found, place = found + inside * int(times), place + 1
        elif first is not None:
            found += range(int(first), int(last or first) + 1)
    return found, place


def text_of(layers: Sequence[int]) -> str:
    """The inverse of `layers_of`: the shortest text that shows what is repeated."""
    times = {layer: layers.count(layer) for layer in set(layers)}
    return ", ".join(_folded(list(_ranges(layers, times))))


def _ranges(layers: Sequence[int], times: Mapping[int, int]) -> Iterator[str]:
    """Ranges of layers that follow one another and run equally often: (0, 1, 2, 1, 2) -> 0, 1-2, 1-2."""
    numbered = enumerate(layers)
    for _, group in groupby(numbered, key=lambda item: (item[1] - item[0], times[item[1]])):
        members = [layer for _, layer in group]
        yield str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}"


def _folded(parts: list[str]) -> Iterator[str]:
    """Equal neighbours once, with their number; of several ways, the one that covers most."""
    place = 0
    while place < len(parts):
        size, times = max(
            ((size, _repeats(parts, place, size)) for size in range(1, (len(parts) - place) // 2 + 1)),
            key=lambda found: (found[1] > 1, found[0] * found[1], -found[0]),
            default=(1, 1),
        )
        if times > 1:
            yield f"{times} x ({', '.join(_folded(parts[place : place + size]))})"
        else:
            size = 1
            yield parts[place]
        place += size * times


def _repeats(parts: list[str], place: int, size: int) -> int:
    """How often what stands at a place, `size` long, stands there one behind the other."""
    unit, times = parts[place : place + size], 1
    while parts[place + times * size : place + (times + 1) * size] == unit:
        times += 1
    return times
