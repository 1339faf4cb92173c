"""What is asked for, read and checked: which reductions, and by which groups of rows. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any

import torch

from hookmap.analysis.reductions.accumulators import Accumulator, Covariance, Extrema, Histogram, Moments
from hookmap.analysis.reductions.sketches import Quantiles
from hookmap.analysis.steering import SteeringVector
from hookmap.errors import SelectionError
from hookmap.wording import did_you_mean, sentence

VALUE, NORM, COSINE = "value", "norm", "cosine"
"""what is reduced of each row: its features, its L2 norm, its cosine to a direction"""
OUTLIER, MASSIVE = "outlier", "massive"
"""or whether each of its features is one: 1 or 0"""
MAGNITUDE = 6.0
"""from which on a feature is an outlier (Dettmers et al. 2022)"""
MASSIVE_MAGNITUDE, MASSIVE_RATIO = 100.0, 1000.0
"""a massive activation is above the one, and so many times the median magnitude of its text's rows (Sun et al. 2024)"""
MOMENTS = {"count": 0, "mean": 1, "variance": 2, "std": 2, "skewness": 3, "kurtosis": 4}
"""name -> the highest power that it needs"""
EXTREMA = ("min", "max")
NAMES = (*MOMENTS, *EXTREMA, "covariance", "quantiles", "histogram", NORM, COSINE, OUTLIER, MASSIVE)
DEFAULT = ("mean", "variance", "max")
OF_NUMBERS = ("mean", "variance", "std", "skewness", "kurtosis", "min", "max")
"""what is told of the norms, and of the cosines"""
EDGES = tuple(float(edge) for edge in range(-20, 21))

SINK, POSITION, TOKEN, LABEL = "sink", "position", "token", "label:"
GROUPINGS = f"{SINK}, {POSITION}, {TOKEN} or {LABEL}NAME"

KINDS: dict[str, type[Accumulator]] = {each.kind: each for each in (Moments, Extrema, Covariance, Histogram, Quantiles)}
Slot = tuple[str, str]
"""(what is reduced of each row, kind of accumulator)"""


@dataclass(frozen=True)
class Wanted:
    """The reductions of a run. Made by `wanted`."""

    reductions: tuple[str, ...]
    by: tuple[str, ...]
    edges: tuple[float, ...] = EDGES
    directions: Mapping[int | None, torch.Tensor] = field(default_factory=dict)
    """float64 [d], by layer; None: the one of every layer"""

    @property
    def accumulators(self) -> dict[Slot, Any]:
        """What is accumulated in each group, and the parameter of each kind."""
        found: dict[Slot, Any] = {}
        orders = [MOMENTS[name] for name in self.reductions if name in MOMENTS]
        found[VALUE, Moments.kind] = max(orders, default=0)  # the count is always there
        if any(name in EXTREMA for name in self.reductions):
            found[VALUE, Extrema.kind] = None
        for name, kind, parameter in (
            ("covariance", Covariance.kind, None),
            ("histogram", Histogram.kind, self.edges),
            ("quantiles", Quantiles.kind, None),
        ):
            if name in self.reductions:
                found[VALUE, kind] = parameter
        for view in (NORM, COSINE):
            if view in self.reductions:
                found |= {(view, Moments.kind): 4, (view, Extrema.kind): None}
        found |= {(view, Moments.kind): 1 for view in (OUTLIER, MASSIVE) if view in self.reductions}
        return found

    def of_rows(self, view: str, rows: torch.Tensor, layer: int | None, text: torch.Tensor) -> torch.Tensor:
        """What is reduced of rows [n, d]: [n, d], or [n, 1]. `text`: int64 [n], which of the batch each row is of.

        Raises SelectionError for a direction of another width.
        """
        if view == VALUE:
            return rows
        if view == OUTLIER:
            return torch.ge(rows.abs(), MAGNITUDE)
        if view == MASSIVE:
            size = rows.double().abs()
            medians = torch.stack([size[text == each].median() for each in range(int(text.max()) + 1)])
            return torch.logical_and(size >= MASSIVE_RATIO * medians[text][:, None], size > MASSIVE_MAGNITUDE)
        norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        if view == NORM:
            return norms
        direction = self.directions[None if None in self.directions else layer].to(rows.device)
        if len(direction) != rows.shape[1]:
            raise SelectionError(
                f"direction: expected {rows.shape[1]} numbers, the width of a row here, got {len(direction)}."
            )
        found: torch.Tensor = (rows.double() @ direction)[:, None] / (norms * direction.norm()).clamp(min=1e-300)
        return found

    def as_json(self) -> dict[str, Any]:
        """Without the directions, which are tensors."""
        edges = {"edges": list(self.edges)} if "histogram" in self.reductions else {}
        return {"reductions": list(self.reductions), "by": list(self.by), **edges}


def wanted(
    reductions: str | Iterable[str] = DEFAULT,
    by: str | Iterable[str] = (SINK,),
    edges: Iterable[float] | None = None,
    direction: Any = None,
) -> Wanted:
    """Read what a user gives. Raises SelectionError with every problem at once."""
    names, groupings = _listed(reductions), _listed(by)
    problems = []
    for name in names:
        if name not in NAMES:
            near = sentence(did_you_mean(name, NAMES, n=1))
            problems.append(f"reduction {name!r}: expected some of {', '.join(NAMES)}.{near}")
    if not names:
        problems.append(f"no reductions: name some of {', '.join(NAMES)}.")
    for grouping in groupings:
        if grouping not in (SINK, POSITION, TOKEN) and not (grouping.startswith(LABEL) and grouping != LABEL):
            problems.append(f"by {grouping!r}: expected {GROUPINGS}.")
    found_edges = EDGES if edges is None else tuple(edges)
    if not _ascend(found_edges):
        problems.append(f"edges: expected two or more finite numbers, ascending, got {found_edges!r:.80}.")
    if edges is not None and "histogram" not in names:
        problems.append("edges are of the reduction histogram: name it too.")
    directions: dict[int | None, torch.Tensor] = {}
    try:
        directions = _directions(direction)
    except SelectionError as error:
        problems.append(str(error))
    if (COSINE in names) != (direction is not None):
        problems.append(
            "the reduction cosine needs a direction, and a direction needs the reduction cosine: give both."
        )
    if problems:
        raise SelectionError("\n".join(problems))
    return Wanted(names, groupings, tuple(map(float, found_edges)), directions)


def _listed(given: str | Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([given] if isinstance(given, str) else map(str, given)))


def _ascend(edges: tuple[Any, ...]) -> bool:
    numbers = all(isinstance(edge, Real) and math.isfinite(edge) for edge in edges)
    return numbers and len(edges) > 1 and all(a < b for a, b in pairwise(edges))


def _directions(given: Any) -> dict[int | None, torch.Tensor]:
    """A vector of every layer, one for each layer, or a steering vector."""
    if given is None:
        return {}
    if isinstance(given, SteeringVector):
        given = given.directions
    each = dict(given) if isinstance(given, Mapping) else {None: given}
    found = {layer: torch.as_tensor(value).detach().double().cpu() for layer, value in each.items()}
    for layer, value in found.items():
        if value.ndim != 1 or not bool(value.isfinite().all()) or not bool(value.any()):
            where = "" if layer is None else f" of layer {layer}"
            raise SelectionError(
                f"direction{where}: expected a vector [d] of finite numbers that are not all 0, got shape "
                f"{list(value.shape)}."
            )
    return found
