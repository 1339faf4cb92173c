"""Figures of each generated token, one for each layer, sent with the token: for a heat map that is drawn as it comes.

A figure describes the row that the token was predicted from: that of the last token the model had read. So every
generated token has figures, also the last one, and they are known when the token is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hookmap.analysis.lens import STREAM_POINTS
from hookmap.analysis.unembedding import Unembeds, unembedding_of
from hookmap.capture.engines.observation import Observer
from hookmap.capture.rows import NUMBERS
from hookmap.errors import HookmapError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PLACE_AXES, PointName
from hookmap.maps.selectors import Selector
from hookmap.model import HookedModel
from hookmap.services.server.errors import bad
from hookmap.services.server.requests import SummaryRequest
from hookmap.vllm.model import VllmModel

PARAM = "hookmap.summary"


@dataclass(frozen=True)
class Figures:
    """The figures of one token."""

    position: int
    """the row's position in the sample; 0 is the prompt's first token"""
    values: tuple[float, ...]
    """for each layer the row's norm, or the probability of the lens's likeliest token"""
    tokens: tuple[int, ...] = ()
    """for each layer the lens's likeliest token"""


@dataclass(frozen=True)
class Summary:
    """The figures that a request asks for."""

    of: str
    selectors: tuple[Selector, ...]
    """one point, at each layer"""

    def reading(self, hm: HookedModel) -> Unembeds | None:
        """What the lens applies. It is verified at its first use, for which the model runs. Raises ApiError."""
        if self.of != "lens":
            return None
        try:
            return hm.unembedding if isinstance(hm, VllmModel) else unembedding_of(hm)
        except HookmapError as error:
            raise bad(str(error), PARAM, type(error).__name__) from error

    def told(self, choice: int, token: str, figures: Figures, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """The figures of a token as JSON."""
        calls = [selector.call for selector in self.selectors]
        words = {"tokens": [decode([id]) for id in figures.tokens]} if self.of == "lens" else {}
        return {
            "choice": choice,
            "position": figures.position,
            "token": token,
            "point": self.selectors[0].point,
            "of": self.of,
            "layers": [selector.layer for selector in self.selectors],
            **({"calls": calls} if any(call is not None for call in calls) else {}),
            "values": [value if math.isfinite(value) else None for value in figures.values],
            **words,
        }


def offered(architecture_map: ArchitectureMap) -> dict[str, list[str]]:
    """For each kind of figure, the points of a model that have it."""
    names = dict.fromkeys(name for kind in architecture_map.kinds for name in kind.points)
    norm = [name for name in names if _refusal(name, "norm") is None]
    return {"norm": norm, "lens": [name for name in norm if _refusal(name, "lens") is None]}


def summary_of(asked: SummaryRequest, architecture_map: ArchitectureMap) -> Summary:
    """Check a request's summary against the map. Raises ApiError."""
    try:
        selectors = architecture_map.selectors([asked.point], asked.layers, asked.calls)
    except HookmapError as error:
        raise bad(str(error), PARAM, type(error).__name__) from error
    if not selectors:
        raise bad(f"summary: no layer of {asked.layers!r} has {asked.point}.", f"{PARAM}.layers")
    if why := _refusal(selectors[0].point, asked.of):
        raise bad(f"summary: {why}", f"{PARAM}.point")
    return Summary(asked.of, selectors)


def _refusal(point: str, of: str) -> str | None:
    """Why a point has no such figure; None where it has."""
    name, axes = PointName.of(point).base, PointName.of(point).definition.axes
    if not PointName.of(point).definition.per_layer:
        return f"{point} is not of a layer."
    if "key" in axes or axes == PLACE_AXES or name in NUMBERS:
        return f"{point} has no length that says something; name another point."
    if of == "lens" and name not in STREAM_POINTS:
        return f"no lens on {point}: it is not in the space of the residual stream. Use {', '.join(STREAM_POINTS)}."
    return None


class Summarising(Observer):
    """An observer that also remembers the summary's rows of the newest token in each forward pass."""

    def __init__(
        self,
        summary: Summary,
        unembedding: Unembeds | None,
        selectors: Sequence[Selector],
        *args: Any,
        **options: Any,
    ) -> None:
        """`selectors` and the arguments after it: see `Observer`."""
        super().__init__((*selectors, *summary.selectors), *args, **options)
        self._first, self._unembedding = len(selectors), unembedding
        self._newest: dict[int, torch.Tensor] = {}

    def _keeps(self, number: int) -> bool:
        return number >= self._first or super()._keeps(number)

    def _take(self, number: int, tensor: torch.Tensor) -> None:
        if number < self._first:
            super()._take(number, tensor)
            return
        row = tensor[:, -1]
        # Copied, for later modules may write over it.
        self._newest[number] = row.clone() if self._unembedding is not None else row.flatten(1).float().norm(dim=1)

    def figures(self, length: int) -> list[Figures]:
        """The figures of each row of the batch, once it is `length` columns long."""
        with self.aside(), torch.no_grad():
            newest = [self._newest[number] for number in sorted(self._newest)]
            stacked = torch.stack([each.to(newest[-1].device) for each in newest], dim=1)
            positions = [length - 2 - self.layout.pads(row) for row in range(len(stacked))]
            return [figures_of(self._unembedding, *each) for each in zip(stacked, positions, strict=True)]


def figures_of(unembedding: Unembeds | None, rows: torch.Tensor, position: int) -> Figures:
    """The figures of one token. `rows`: [layers] lengths, or [layers, d_model] for the lens."""
    if unembedding is None:
        return Figures(position, tuple(rows.tolist()))
    found = unembedding(rows[None].to(unembedding.dtype))[0].float().softmax(-1).max(-1)
    return Figures(position, tuple(found.values.tolist()), tuple(found.indices.tolist()))
