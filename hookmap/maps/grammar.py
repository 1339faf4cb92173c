"""The small languages of a map's document: selectors, layers, heads, lists that repeat themselves. Text <-> values.

    0.5 * model.layers.{i}.mlp.output[0]     a selector: [FACTOR * ][MODULE][:OPERATOR[#N[/M]]].input|output[INDEX]
    .mlp.output                              the same in a block, whose own path is left out
    0-33 except 5-29 by 6                    layers: numbers and ranges, `by` a step, `except` others
    ["block_a", "coda.[0-3]"]                names of layers: block_a, coda.0, coda.1, coda.2, coda.3
    32 x 128                                 heads: so many of so many features, side by side from the first feature on
    [{"5 times": ["a"]}, "b"]                a list: a, a, a, a, a, b
    shapes, order, sum 2                     checks that proved a map, and how many statements, where not 1

A selector without a module is of the model itself; one that begins with a dot goes on behind the block's path. OPERATOR
is an operation in the module's own forward (not in that of a module in it): the one of its name, or the N-th from 0 on,
of M that every forward has. FACTOR is a number, or `{a}`, the layer's constant `a`. INDEX is a position, or a name in
single quotes. A MODULE with blanks, quotes, stars, colons or brackets in its path stands in such quotes, too. Inside
them, a backslash stands before a quote and before a backslash.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_CONSTANT = r"\{[a-hj-z][0-9]*\}"
_QUOTED = r"'(?:[^'\\]|\\['\\])*'"
_MODULE = rf"""[^\s'"*\[\]:]+|{_QUOTED}"""
_OPERATION = r":([A-Za-z_][A-Za-z0-9_]*)(?:#(0|[1-9][0-9]*)(?:/([1-9][0-9]*))?)?"
SELECTOR = (
    rf"^(?:({_NUMBER}|{_CONSTANT}) \* )?(?:(?:({_MODULE})(?:{_OPERATION})?|{_OPERATION})?(\.))?"
    rf"(input|output)(?:\[(-?[0-9]+|{_QUOTED})\])?$"
)
_RANGE = r"[0-9]+(?:-[0-9]+(?: by [1-9][0-9]*)?)?"
LAYERS = rf"^{_RANGE}(?:, {_RANGE})*(?: except {_RANGE}(?:, {_RANGE})*)?$"
HEADS = "^[1-9][0-9]* x [1-9][0-9]*$"
_CHECK = r"[A-Za-z_-]+(?: [1-9][0-9]*)?"
CHECKS = rf"^{_CHECK}(?:, {_CHECK})*$"
BLOCK = "."
"""the module that is a block itself, where paths are written from the block on"""
CONSTANTS = "abcdefghjklmnopqrstuvwxyz"
"""names of constants; `{i}` is the layer"""
_LONGEST = 100_000
"""elements of a list that repeats itself, so that a short text cannot fill the memory"""


@dataclass(frozen=True)
class Place:
    """What a selector says of one tensor, without its factor."""

    module: str
    side: str
    index: int | str | None
    operation: str | None = None
    occurrence: int | None = None
    """which operation of that name, from 0 on; None: the only one"""
    visits: int | None = None
    """how many operations of that name every forward has, where that is known"""


def operation_text(operation: str | None, occurrence: int | None, visits: int | None = None) -> str:
    """`:bmm#1`, or `:bmm#1/2` with `visits`; nothing where there is no operation."""
    if operation is None:
        return ""
    if occurrence is None:
        return f":{operation}"
    return f":{operation}#{occurrence}" + ("" if visits is None else f"/{visits}")


def selector_text(place: Place, factor: float | str = 1.0) -> str:
    """The selector of one tensor; `factor` is a number, or a constant's name in braces."""
    module, index = place.module, place.index
    times = "" if factor == 1.0 else f"{factor if isinstance(factor, str) else number_text(factor)} * "
    path = module if not module or (re.fullmatch(_MODULE, module) and module[0] != "'") else _quoted(module)
    path += operation_text(place.operation, place.occurrence, place.visits)
    at = "" if index is None else f"[{_quoted(index) if isinstance(index, str) else index}]"
    return f"{times}{path}{'.' if path not in ('', BLOCK) else ''}{place.side}{at}"


def read_selector(text: str) -> tuple[Place, float | str]:
    """The place and the factor. Raises ValueError with what is wrong."""
    found = re.match(SELECTOR, text)
    if found is None or text.endswith("\n"):
        raise ValueError(why_no_selector(text))
    times, module, *operations, dot, side, at = found.groups()
    operation, occurrence, visits = operations[:3] if module else operations[3:]
    index = None if at is None else _unquoted(at) if at[0] == "'" else int(at)
    factor = 1.0 if times is None else times if times[0] == "{" else float(times)
    own = BLOCK if dot and not operation else ""
    path = _unquoted(module) if module and module[0] == "'" else module or own
    if operation and occurrence is None:
        visits = 1
    numbers = (None if each is None else int(each) for each in (occurrence, visits))
    return Place(path, side, index, operation, *numbers), factor


def why_no_selector(text: str) -> str:
    """What is wrong with a text that is no selector."""
    factor, times, rest = text.rpartition(" * ")
    if " + " in text:
        return "a sum is a list of selectors"
    if times and not re.fullmatch(f"{_NUMBER}|{_CONSTANT}", factor):
        return f"the factor is a number, found {factor}"
    if not re.search(r"(?:^|\.)(?:input|output)(?:\[|$)", rest):
        return "it ends with .input or .output, and a place there such as [0] where it has one"
    if not re.search(rf"(?:input|output)(?:\[(?:-?[0-9]+|{_QUOTED})\])?$", rest):
        return "the place is a number or a name in single quotes: [0], ['logits']"
    return "a module's path with blanks, quotes, stars, colons or brackets stands in single quotes"


def _quoted(text: str) -> str:
    return "'" + re.sub(r"(['\\])", r"\\\1", text) + "'"


def _unquoted(text: str) -> str:
    return re.sub(r"\\(['\\])", r"\1", text[1:-1])


def number_text(value: float) -> str:
    """The shortest decimal number that is read back as the same float: 0.5, -1."""
    return repr(float(value)).removesuffix(".0")


def layers_pattern(layers: Sequence[int]) -> str:
    """Ascending layers as the shortest of: ranges, ranges with steps, and a range with exceptions."""
    whole = range(layers[0], layers[-1] + 1)
    others = sorted(set(whole) - set(layers))
    found = [ranges(layers), _steps(layers)]
    if others:
        found += [f"{_range(whole)} except {text}" for text in (ranges(others), _steps(others))]
    return min(found, key=len)


def ranges(layers: Collection[int]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    chosen = set(layers)
    starts, ends = (sorted(n for n in chosen if n + step not in chosen) for step in (-1, 1))
    return ", ".join(_range(range(start, end + 1)) for start, end in zip(starts, ends, strict=True))


def _steps(layers: Sequence[int]) -> str:
    """Of the layers that are left, the longest progression from the first of them on, again and again."""
    left, found = set(layers), []
    while left:
        first, last = min(left), max(left)
        chosen = max((_progression(first, step, left) for step in range(1, last - first + 2)), key=len)
        left -= set(chosen)
        found.append(_range(chosen))
    return ", ".join(found)


def _progression(first: int, step: int, among: set[int]) -> range:
    end = first
    while end + step in among:
        end += step
    return range(first, end + 1, step)


def _range(layers: range) -> str:
    if len(layers) == 1:
        return str(layers[0])
    return f"{layers[0]}-{layers[-1]}" + (f" by {layers.step}" if layers.step > 1 else "")


def read_layers(pattern: str, count: int) -> list[int]:
    """The layers of a pattern, ascending. Raises ValueError where one is not below `count`, or a range has no layer."""
    chosen, _, excepted = pattern.partition(" except ")
    without = set(_layers(excepted, count)) if excepted else set()
    return sorted(layer for layer in _layers(chosen, count) if layer not in without)


def _layers(pattern: str, count: int) -> Iterator[int]:
    for part in pattern.split(", "):
        ends, _, step = part.partition(" by ")
        first, _, last = ends.partition("-")
        start, end = int(first), int(last or first)
        if end < start:
            raise ValueError(f"the range {part} has no layer")
        if end >= count:
            raise ValueError(f"layer {end} is not one of 0 to {count - 1}")
        yield from range(start, end + 1, int(step or 1))


def folded_names(names: Sequence[str]) -> list[str]:
    """Names that are numbered one after the other as one: coda.0, coda.1 -> coda.[0-1]."""
    found: list[str] = []
    for (stem, is_numbered, _), group in groupby(enumerate(names), _row_of_names):
        members = [name for _, name in group]
        several = is_numbered and len(members) > 1
        found += [f"{stem}[{members[0].removeprefix(stem)}-{members[-1].removeprefix(stem)}]"] if several else members
    return found


def _row_of_names(placed: tuple[int, str]) -> tuple[str, bool, int]:
    """The same for names of which each is numbered one more than that before it."""
    place, name = placed
    numbered = re.fullmatch(r"(.*?)(0|[1-9][0-9]*)", name, re.DOTALL)
    return (numbered[1], True, int(numbered[2]) - place) if numbered else (name, False, 0)


def unfolded_names(names: Sequence[str]) -> list[str]:
    """What `folded_names` was given."""
    found: list[str] = []
    for name in names:
        several = re.fullmatch(r"(.*)\[([0-9]{1,5})-([0-9]{1,5})\]", name, re.DOTALL)
        found += [f"{several[1]}{n}" for n in range(int(several[2]), int(several[3]) + 1)] if several else [name]
    return found


def heads_text(heads: Mapping[str, int]) -> str | None:
    """`groups`, `start`, `stop` and `d_head` as text; None where the heads lie otherwise."""
    number, rest = divmod(heads["stop"], heads["d_head"])
    return None if rest or number == 0 or heads["start"] or heads["groups"] > 1 else f"{number} x {heads['d_head']}"


def read_heads(text: str) -> dict[str, int]:
    """The inverse of `heads_text`."""
    number, _, d_head = text.partition(" x ")
    return {"stop": int(number) * int(d_head), "d_head": int(d_head)}


def checks_text(checks: Mapping[str, int]) -> str:
    """`shapes, order, sum 2`."""
    return ", ".join(name if count == 1 else f"{name} {count}" for name, count in checks.items())


def read_checks(text: str) -> dict[str, int]:
    """The inverse of `checks_text`."""
    pairs = (check.partition(" ") for check in text.split(", "))
    return {name: int(count or 1) for name, _, count in pairs}


def from_block(path: str, layers_path: str) -> str:
    """A module's path as it is written in a kind of block: `.mlp` for `model.layers.{i}.mlp`, else the whole path."""
    if path == layers_path:
        return BLOCK
    return path[len(layers_path) :] if path.startswith(f"{layers_path}.") else path


def whole_path(path: str, layers_path: str) -> str:
    """The inverse of `from_block`."""
    return layers_path if path == BLOCK else layers_path + path if path.startswith(".") else path


def folded(value: Any) -> Any:
    """JSON data in which long lists are written with their repetitions."""
    if isinstance(value, dict):
        return {key: folded(item) for key, item in value.items()}
    return list(_folded(value)) if isinstance(value, list) and len(value) > 8 else value


def _folded(items: list[Any]) -> Iterator[Any]:
    place = 0
    for size, times in repetitions([json.dumps(item) for item in items]):  # as texts: in Python, 1 equals true
        piece, place = items[place : place + size], place + size * times
        if times > 1 and size * times > 3:
            yield {f"{times} times": list(_folded(piece))}
        else:
            yield from piece * times


def repetitions(items: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The items cut into pieces: (size, how often the piece stands there one behind the other), as often as can be."""
    place = 0
    while place < len(items):
        rest = items[place:]
        sizes = [1, *(size for size in range(2, len(rest) // 2 + 1) if rest[size] == rest[0])]
        size, times = max(((size, _times(rest, size)) for size in sizes), key=lambda found: found[0] * (found[1] - 1))
        yield size, times
        place += size * times


def _times(items: Sequence[str], size: int) -> int:
    """How often the first `size` items stand there, one piece behind the other."""
    times = 1
    while items[times * size : (times + 1) * size] == items[:size]:
        times += 1
    return times


def unfolded(value: Any) -> Any:
    """What `folded` was given. Raises ValueError where a list would be too long."""
    if isinstance(value, dict):
        return {key: unfolded(item) for key, item in value.items()}
    return _unfolded(value) if isinstance(value, list) else value


def _unfolded(items: list[Any]) -> list[Any]:
    found: list[Any] = []
    for item in items:
        key = next(iter(item)) if isinstance(item, dict) and len(item) == 1 else ""
        repeated = re.fullmatch(r"([1-9][0-9]{0,5}) times", key)
        if repeated and isinstance(item[key], list):
            part = _unfolded(item[key])
            if len(found) + int(repeated[1]) * len(part) > _LONGEST:
                raise ValueError(f"{key}: a list may have {_LONGEST} elements")
            found += part * int(repeated[1])
        else:
            found.append(unfolded(item))
    return found
