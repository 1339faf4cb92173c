"""Wrong maps: one point of one kind of block stands where its neighbour does."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookmap.loading import modules
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.relations import Relation
from hookmap.maps.templates import PointTemplate
from hookmap.verification.checks import checks_of
from hookmap.verification.context import run_once


@dataclass(frozen=True)
class Mutant:
    """A map in which `point` of a kind has the selector of another point, `taken`."""

    kind: str
    point: str
    taken: str
    stated: bool
    """whether the map still states its relations; else those that name the point are left out"""
    map: ArchitectureMap

    def __str__(self) -> str:
        return f"{self.kind}: {self.point} where {self.taken} is" + ("" if self.stated else ", without its relations")


def mutants(found: ArchitectureMap, model: nn.Module) -> Iterator[Mutant]:
    """Of each point: one mutant for the nearest points before and after it that hold another tensor.

    Of the model and of each kind. The neighbours have the same shape, so that only numbers can tell. Where two points
    hold the same numbers on every layer, the one is no wrong place of the other. Each mutant of a kind comes twice: as
    it is, and without the relations that name the point, as a discovery that is wrong would state it.
    """
    with modules.eager(model):
        values = run_once(found, model, 0).values
    for point, other in _neighbours(found.model_points, [None], values):
        taken = found.model_points[other].model_copy(update={"order": found.model_points[point].order})
        changed = found.model_copy(update={"model_points": {**found.model_points, point: taken}})
        yield Mutant("the model", point, other, True, changed)
    for number, kind in enumerate(found.kinds):
        for point, other in _neighbours(kind.points, kind.layers, values):
            wrong = {**kind.points, point: kind.points[other].model_copy(update={"order": kind.points[point].order})}
            for stated in (True, False):
                relations = tuple(text for text in kind.relations if stated or not _names(text, point))
                changed = kind.model_copy(update={"points": wrong, "relations": relations})
                kinds = (*found.kinds[:number], changed, *found.kinds[number + 1 :])
                yield Mutant(kind.name, point, other, stated, found.model_copy(update={"kinds": kinds}))


HELD: list[int] = []
"""how many wrong maps each model was held against, since `asked` is set"""
asked = False
"""whether `support.invented.check` holds each model against its wrong maps, too: pytest --mutants"""


def survivors(found: ArchitectureMap, model: nn.Module) -> list[str]:
    """The wrong maps of a model that verification passes."""
    wrong = list(mutants(found, model))
    HELD.append(len(wrong))
    return [str(mutant) for mutant in wrong if survives(mutant, model)]


def survives(mutant: Mutant, model: nn.Module) -> bool:
    """Whether verification passes the wrong map. It ends at the first check that fails."""
    with modules.eager(model), modules.plain_experts(model):
        return all(check.passed for check in checks_of(mutant.map, model))


def _names(text: str, point: str) -> bool:
    relation = Relation.parse(text)
    return relation is None or point in relation.points()


def _neighbours(
    points: Mapping[str, PointTemplate], layers: Sequence[int | None], values: Any
) -> Iterator[tuple[str, str]]:
    layers = [layer for layer in layers if all((name, layer) in values for name in points)]
    ordered = sorted(points, key=lambda name: points[name].order)
    for place, point in enumerate(ordered):
        for side in (reversed(ordered[:place]), ordered[place + 1 :]):
            like = (other for other in side if _like(values, layers, point, other))
            if (other := next(like, None)) is not None:
                yield point, other


def _like(values: Any, layers: Sequence[int | None], point: str, other: str) -> bool:
    """Whether the two have one shape, and other numbers on some layer."""
    pairs: list[tuple[Tensor, Tensor]] = [(values[point, layer], values[other, layer]) for layer in layers]
    return bool(pairs) and all(a.shape == b.shape for a, b in pairs) and not all(torch.equal(a, b) for a, b in pairs)
