"""Which runs are meant of layers that run several times in one forward pass. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from hookmap.errors import SelectionError
from hookmap.maps.contents import MapContents
from hookmap.maps.describe import layers_text
from hookmap.wording import counted


def last_run(m: MapContents) -> tuple[int, int | None]:
    """The layer that runs last, and in which of its runs; None where it runs once."""
    layer = m.order[-1][0] if m.runs else m.num_layers - 1
    runs = m.kind_of(layer).calls
    return layer, None if runs == 1 else runs - 1


@dataclass(frozen=True)
class WantedRuns:
    """Which runs are wanted of a layer that may run several times."""

    numbers: tuple[int, ...] | None
    """0-based, negative from the end; None: all of them"""
    problems: tuple[str, ...]

    def of(self, runs: int) -> tuple[list[int], list[int]]:
        """The runs of a layer that runs so often, and the wanted numbers that it does not have."""
        if self.numbers is None:
            return list(range(runs)), []
        here = [number for number in self.numbers if -runs <= number < runs]
        return list(dict.fromkeys(number % runs for number in here)), [n for n in self.numbers if n not in here]


def wanted_runs(m: MapContents, given: Any) -> WantedRuns:
    most = max(kind.calls for kind in m.kinds)
    if isinstance(given, str):
        if given in ("all", "last"):
            return WantedRuns(None if given == "all" else (-1,), ())
        return WantedRuns(None, (f"calls {given!r}: give 'all', 'last', or numbers from 0 to {most - 1}",))
    numbers, problems = whole_numbers(given, most, "call", "'all' or 'last'", lambda: _most(m, most))
    if not numbers and not problems:
        problems.append("no calls given: name at least one, or 'all'")
    return WantedRuns(tuple(dict.fromkeys(numbers)), tuple(problems))


def _most(m: MapContents, most: int) -> str:
    if most == 1:
        return f"each layer of {m.architecture} runs once in one forward pass, which is call 0"
    often = [layer for kind in m.kinds if kind.calls == most for layer in kind.layers]
    verb = "runs" if len(often) == 1 else "run"
    return f"{layers_text(often)} {verb} {most} times in one forward pass, calls 0 to {most - 1} (or -{most} to -1)"


def paired_runs(m: MapContents, layer: int, into: Any, out_of: Any) -> dict[int, int]:
    """Run of a layer that is written -> run that its values come from. Each as it is given to `wanted_runs`.

    Paired in the order in which they are named; a single run serves all. `out_of` None: each from the same run.
    Raises SelectionError where they do not pair.
    """
    often = m.kind_of(layer).calls
    written, _ = wanted_runs(m, into).of(often)
    if out_of is None:
        return {run: run for run in written}
    wanted = wanted_runs(m, out_of)
    read, lacking = wanted.of(often)
    problems = list(wanted.problems)
    if lacking and not problems:
        times = "once" if often == 1 else f"{often} times"
        problems += [f"layer {layer} runs {times} in one forward pass: no call {number}" for number in lacking]
    if not problems and len(read) not in (1, len(written)):
        problems.append(
            f"{counted(len(written), 'run')} of layer {layer} (calls {_numbers(written)}) cannot be written from "
            f"{counted(len(read), 'run')} of the source (calls {_numbers(read)}): name one, or as many"
        )
    if problems:
        raise SelectionError("\n".join(f"calls of the source: {each}" for each in problems))
    return dict(zip(written, read * len(written) if len(read) == 1 else read, strict=True))


def _numbers(calls: Iterable[int]) -> str:
    return ", ".join(map(str, calls))


def whole_numbers(
    given: Any, count: int, what: str, words: str, there: Callable[[], str]
) -> tuple[list[int], list[str]]:
    """The numbers given, of things numbered 0 to `count` - 1, negative from the end; and what is wrong with the others.

    `what`: their name, `words`: what may stand in place of numbers, `there`: which of them there are; for messages.
    """
    numbers, problems = list[int](), list[str]()
    for each in listed(given):
        number = int(each) if isinstance(each, Integral) else each
        if isinstance(each, bool) or not isinstance(number, int):
            problems.append(f"{what} {each!r} is not a whole number: give numbers from 0 to {count - 1}, {words}")
        elif not -count <= number < count:
            problems.append(f"{what} {number} is out of range: {there()}")
        else:
            numbers.append(number)
    return numbers, problems


def listed(given: Any) -> list[Any]:
    """One value, an array or tensor of values, or any iterable, as a list."""
    if hasattr(given, "tolist"):
        given = given.tolist()
    return [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
