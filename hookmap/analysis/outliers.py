"""Outlier features and massive activations, by the definitions of those who described them.

- An *outlier feature* (Dettmers et al. 2022, LLM.int8()) is a feature of the stream that has a magnitude of 6 or more
  in at least 25 % of the layers, and at 6 % or more of all positions of all layers.
- A *massive activation* (Sun et al. 2024) is above 100, and at least 1,000 times the median magnitude of its hidden
  state: of all features of all tokens of its text, at that layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookmap.activations import Key
from hookmap.analysis.reductions.run import reduce
from hookmap.analysis.reductions.statistics import Statistics
from hookmap.analysis.reductions.wanted import (
    MAGNITUDE,
    MASSIVE,
    MASSIVE_MAGNITUDE,
    MASSIVE_RATIO,
    OUTLIER,
    SINK,
)
from hookmap.capture.options import Layers, Points
from hookmap.errors import SelectionError
from hookmap.stores.ledger import tensor_name
from hookmap.wording import counted

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

OF_LAYERS, OF_POSITIONS = 0.25, 0.06
"""shares that an outlier feature reaches (Dettmers et al. 2022)"""


@dataclass(frozen=True)
class OutlierFeature:
    """One feature of a point, over all layers that were read."""

    point: str
    feature: int
    largest: float
    """its value of the largest magnitude"""
    at: int | None
    """the layer of that value"""
    layers: float
    """share of the layers in which its magnitude is 6 or more somewhere"""
    positions: float
    """share of the positions of all layers at which it is"""
    outlier: bool
    """whether it is an outlier feature, by both shares"""
    massive: float
    """share of the positions of all layers at which it is a massive activation"""
    massive_layers: tuple[int | None, ...]
    """the layers in which it is one somewhere"""
    sink: float
    """the part of its massive activations that are on the first token of a text; nan where it has none"""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; null for what is not a number."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**found, "massive_layers": list(self.massive_layers), "sink": self.sink if self.massive else None}


@dataclass(frozen=True)
class OutlierFeatures:
    """The features with massive activations, then the other outlier features, the largest first."""

    features: tuple[OutlierFeature, ...]
    """those that are outlier features, massive somewhere, or both"""
    statistics: Statistics
    """what they were read from: min, max and shares of each feature, by layer"""

    @property
    def points(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key[0] for key in self.statistics.keys))

    def of(self, point: str) -> tuple[OutlierFeature, ...]:
        """Those of one point."""
        return tuple(each for each in self.features if each.point == point)

    def magnitudes(self, point: str, features: Sequence[int]) -> tuple[tuple[Key, ...], torch.Tensor]:
        """The largest magnitude of each feature in each layer: the tensors, and float64 [tensors, features]."""
        keys = tuple(key for key in self.statistics.keys if key[0] == point and key in self.statistics.tensors)
        return keys, torch.stack([_size(self.statistics, key)[list(features)] for key in keys])

    def as_json(self) -> dict[str, Any]:
        """The definitions, and each feature, with its largest magnitude by layer."""
        rows = {}
        for point in self.points:
            own = self.of(point)
            keys, sizes = self.magnitudes(point, [each.feature for each in own])
            for each, values in zip(own, sizes.T.tolist(), strict=True):
                by = dict(zip(map(tensor_name, keys), values, strict=True))
                rows[each] = {**each.as_json(), "largest_by_layer": by}
        return {
            "model": self.statistics.about.get("model"),
            "definitions": {
                "outlier": {"magnitude": MAGNITUDE, "layers": OF_LAYERS, "positions": OF_POSITIONS},
                "massive": {"magnitude": MASSIVE_MAGNITUDE, "times_median_of_text": MASSIVE_RATIO},
            },
            "rows": {tensor_name(key): self.statistics[key].count for key in self.statistics.tensors},
            "features": [rows[each] for each in self.features],
        }

    def __repr__(self) -> str:
        outliers = counted(sum(each.outlier for each in self.features), "outlier feature")
        massive = counted(
            sum(each.massive > 0 for each in self.features),
            "feature with massive activations",
            "with massive activations",
        )
        return f"<OutlierFeatures of {', '.join(self.points)}: {outliers}, {massive}>"


def outliers(
    hm: Hooked, prompts: Any, points: Points = "resid_post", layers: Layers = "all", **options: Any
) -> OutlierFeatures:
    """See `HookedModel.outliers`."""
    return of_statistics(reduce(hm, prompts, points, layers, ("min", "max", OUTLIER, MASSIVE), by=(SINK,), **options))


def of_statistics(statistics: Statistics) -> OutlierFeatures:
    """The outlier features that statistics of min, max, outlier and massive, by sink, show. Raises SelectionError."""
    lacking = {"min", "max", OUTLIER, MASSIVE} - {*statistics.wanted.reductions}
    if lacking or SINK not in statistics.wanted.by:
        raise SelectionError(
            f"outlier features need the reductions min, max, {OUTLIER} and {MASSIVE}, by {SINK}: these have "
            f"{', '.join(statistics.wanted.reductions)} by {', '.join(statistics.wanted.by) or 'nothing'}."
        )
    found: list[OutlierFeature] = []
    for point in dict.fromkeys(key[0] for key in statistics.keys):
        keys = [key for key in statistics.keys if key[0] == point and key in statistics.tensors]
        if keys:
            found += _of_point(statistics, point, keys)
    return OutlierFeatures(tuple(sorted(found, key=lambda each: (not each.massive, -abs(each.largest)))), statistics)


def _of_point(statistics: Statistics, point: str, keys: list[Key]) -> list[OutlierFeature]:
    summaries = [statistics[key] for key in keys]
    widths = {len(each["max"].flatten()) for each in summaries}
    if len(widths) > 1:
        raise SelectionError(f"{point} has layers of the widths {sorted(widths)}: its features are not the same ones.")
    counts = torch.tensor([each.count for each in summaries]).double()[:, None]
    values = torch.stack([_signed(each["min"].flatten(), each["max"].flatten()) for each in summaries])  # [layers, d]
    outlier, massive = (torch.stack([each[name].flatten() for each in summaries]) for name in (OUTLIER, MASSIVE))
    positions, often = ((share * counts).sum(0) / counts.sum() for share in (outlier, massive))
    in_layers = (outlier > 0).double().mean(0)
    is_outlier = (in_layers >= OF_LAYERS) & (positions >= OF_POSITIONS)
    on_sinks = torch.stack([_on_sinks(each) for each in summaries]).sum(0) / (massive * counts).sum(0)
    where = values.abs().argmax(0)
    found = []
    for feature in (is_outlier | (often > 0)).nonzero().flatten().tolist():
        place = int(where[feature])
        held = [keys[n][1] for n in (massive[:, feature] > 0).nonzero().flatten().tolist()]
        found.append(
            OutlierFeature(
                point,
                feature,
                float(values[place, feature]),
                keys[place][1],
                float(in_layers[feature]),
                float(positions[feature]),
                bool(is_outlier[feature]),
                float(often[feature]),
                tuple(dict.fromkeys(held)),
                float(on_sinks[feature]),
            )
        )
    return found


def _on_sinks(summary: Any) -> torch.Tensor:
    """How many rows of first tokens each feature is massive in, [d]."""
    table = summary.by(SINK)
    if SINK not in table.groups:
        return torch.zeros(len(summary["max"].flatten()), dtype=torch.float64)
    group = table.groups.index(SINK)
    return torch.mul(table[MASSIVE][group].flatten(), table.count[group])


def _signed(least: torch.Tensor, greatest: torch.Tensor) -> torch.Tensor:
    """Of each feature, the value of the larger magnitude."""
    return torch.where(least.abs() > greatest.abs(), least, greatest)


def _size(statistics: Statistics, key: Key) -> torch.Tensor:
    found = statistics[key]
    return _signed(found["min"].flatten(), found["max"].flatten()).abs()
