"""What a user asks for -> points and the layers on which each is wanted, or what is wrong with it. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hookmap.maps.calls import whole_numbers
from hookmap.maps.contents import MapContents
from hookmap.maps.points import PointName, parse_point, takes_layers


@dataclass(frozen=True)
class Request:
    """One point that exists in the vocabulary, and the layers on which it is wanted."""

    point: str
    layers: tuple[int | None, ...]
    """(None,) for a point of the whole model"""
    may_lack: Literal["none", "some", "all"]
    """on how many of the layers the point may be missing: some of "all" layers, any for "all" points"""
    named: bool = False
    """whether the layers were named: then each must run as often as is asked"""


def requests(m: MapContents, points: Any, layers: Any) -> Iterator[Request | str]:
    layers = list(layers) if isinstance(layers, Iterator) else layers  # each point reads them
    if isinstance(points, Mapping):
        asked = list(points.items())
        if not is_all(layers):
            yield "points name layers of their own: leave layers out"
        for name, own in asked:
            if own is not None and not is_all(own) and isinstance(name, str) and not takes_layers(name):
                yield f"{name} says itself where it is, and takes no layers: give {{{name!r}: 'all'}}"
    else:
        yield from layers_in(m, layers)[1]  # reported even where no point is known
        asked = [(name, layers) for name in _names(m, points)]
    if not asked:
        yield "no points given: name at least one, or 'all'"
    for name, own in asked:
        yield from _request(m, name, own, any_point=is_all(points))


def _names(m: MapContents, points: Any) -> list[Any]:
    if is_all(points):
        return [name for name in m.points if not PointName.of(name).definition.deeper]
    return [points] if isinstance(points, str) or not isinstance(points, Iterable) else list(points)


def _request(m: MapContents, name: Any, layers: Any, any_point: bool) -> Iterator[Request | str]:
    if not isinstance(name, str):
        yield f"point {name!r} is not a name: give names such as 'resid_mid', or 'all'"
        return
    parsed = parse_point(name)
    if isinstance(parsed, str):
        yield parsed
    elif not PointName.of(parsed.point).definition.per_layer:
        yield Request(parsed.point, (None,), "none")
    else:
        wanted = layers if parsed.layer is None else [parsed.layer]
        chosen, problems = layers_in(m, wanted)
        yield from problems
        if chosen:
            may_lack: Any = "all" if any_point else "some" if is_all(wanted) else "none"
            yield Request(parsed.point, chosen, may_lack, not is_all(wanted))
        elif not problems:
            yield f"no layers given for {name}: name at least one, or 'all'"


def layers_in(m: MapContents, given: Any) -> tuple[tuple[int, ...], list[str]]:
    """Layers from 0 up, each once, and what is wrong with the others."""
    count = m.num_layers
    if is_all(given):
        return tuple(range(count)), []
    chosen, problems = whole_numbers(given, count, "layer", "or 'all'", lambda: m.layers_there)
    return tuple(dict.fromkeys(layer % count for layer in chosen)), problems


def is_all(given: Any) -> bool:
    return isinstance(given, str) and given == "all"
