"""The order in which layers run, as people write it: `0-1, 3 x (2-3), 4-5`. Pure: text <-> layer numbers.

A layer is written once for each time that it runs; `3 x (...)` is what runs three times, and may hold another.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby

from hookmap.maps.grammar import repetitions

_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_TOKEN = re.compile(r"\s*(?:(\d+)\s*x\s*\(|(\d+)(?:\s*-\s*(\d+))?|([),]))", re.ASCII)


@lru_cache(maxsize=256)
def layers_of(text: str) -> tuple[int, ...]:
    """The layers in the order in which they run: `0, 2 x (1-2)` -> (0, 1, 2, 1, 2). Raises ValueError."""
    found, end = _items(text, 0)
    if text[end:].strip():
        raise ValueError(f"{text!r} is no order of layers, such as '0-1, 3 x (2-3), 4': {text[end:]!r} is unexpected")
    return tuple(found)


@lru_cache(maxsize=256)
def pairs_of(texts: tuple[str, ...]) -> frozenset[tuple[int, int]]:
    """(`3 -> 2`, `0-1 -> 1-2`) -> {(3, 2), (0, 1), (1, 2)}; without `3 -> final_norm`. Raises ValueError."""
    found: set[tuple[int, int]] = set()
    for text in texts:
        before, _, here = text.partition(" -> ")
        if here == "final_norm":
            continue
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
    return _joined(_folded(list(_ranges(layers))))


def _ranges(layers: Sequence[int]) -> Iterator[str]:
    """Ranges of layers that follow one another, run equally often and for the same time: 0, 1-2, 1-2."""
    often, so_far = Counter(layers), Counter[int]()
    parts = []
    for place, layer in enumerate(layers):
        parts.append((layer - place, often[layer], so_far[layer], layer))
        so_far[layer] += 1
    for _, group in groupby(parts, key=lambda part: part[:3]):
        members = [part[-1] for part in group]
        yield _range(members[0], members[-1])


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _joined(parts: Iterable[str]) -> str:
    """The parts behind one another; ranges that follow one another as one: 0, 1-2 -> 0-2."""
    found: list[str] = []
    for part in parts:
        ends = [_RANGE.fullmatch(each) for each in (*found[-1:], part)]
        numbers = [int(end) for match in ends if match is not None for end in (match[1], match[2] or match[1])]
        if len(numbers) == 4 and numbers[2] == numbers[1] + 1:
            found[-1] = _range(numbers[0], numbers[3])
        else:
            found.append(part)
    return ", ".join(found)


def _folded(parts: list[str]) -> Iterator[str]:
    """Equal neighbours once, with their number."""
    place = 0
    for size, times in repetitions(parts):
        piece, place = parts[place : place + size], place + size * times
        yield f"{times} x ({_joined(_folded(piece))})" if times > 1 else piece[0]
