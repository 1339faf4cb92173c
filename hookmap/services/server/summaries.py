"""Figures of each generated token, one for each layer, sent with the token: for a heat map that is drawn as it comes.

A figure describes the row that the token was predicted from: that of the last token the model had read. So every
generated token has figures, also the last one, and they are known when the token is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from hookmap.maps.terms import Term
from hookmap.model import HookedModel
from hookmap.services.server.errors import bad
from hookmap.services.server.requests import SummaryRequest
from hookmap.vllm.model import VllmModel

PARAM = "hookmap.summary"
MOST_ROWS = 100_000
"""of a prompt's tokens times layers: each is unembedded by itself"""


@dataclass(frozen=True)
class Figures:
    """The figures of one token."""

    position: int
    """the row's position in the sample; 0 is the prompt's first token"""
    values: tuple[float, ...]
    """for each layer the row's norm, or the probability of the lens's likeliest token"""
    tokens: tuple[int, ...] = ()
    """for each layer the lens's likeliest token"""
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    """for each layer the lens's likeliest tokens and their probabilities, where more than one was asked for"""
    followed: tuple[tuple[int, float], ...] = ()
    """for each layer the rank of the token that is followed, 1 for the likeliest, and its probability"""
    earlier: "tuple[Figures, ...]" = ()
    """with the first generated token: those of the prompt's tokens before the last, where they were asked for"""


@dataclass(frozen=True)
class Summary:
    """The figures that a request asks for."""

    of: str
    selectors: tuple[Selector, ...]
    """one point, at each layer"""
    prompt: bool = False
    """whether the rows of the prompt have figures too"""
    top: int = 1
    follow: int | None = None

    def reading(self, hm: HookedModel) -> Unembeds | None:
        """What the lens applies. It is verified at its first use, for which the model runs. Raises ApiError."""
        if self.of != "lens":
            return None
        try:
            return hm.unembedding if isinstance(hm, VllmModel) else unembedding_of(hm)
        except HookmapError as error:
            raise bad(str(error), PARAM, type(error).__name__) from error

    def told(
        self, choice: int, token: int, figures: Figures, prompt: Sequence[int], decode: Callable[[list[int]], str]
    ) -> list[dict[str, Any]]:
        """The figures of a token as JSON, behind those of the prompt. `prompt`: its token ids."""
        earlier = [
            {**self._told(choice, prompt[each.position + 1], each, decode), **_read(prompt, each.position, decode)}
            for each in figures.earlier
        ]
        own = self._told(choice, token, figures, decode)
        if self.prompt and figures.position < len(prompt):
            own |= _read(prompt, figures.position, decode)
        return [*earlier, own]

    def _told(self, choice: int, token: int, figures: Figures, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        calls = [selector.call for selector in self.selectors]
        words: dict[str, Any] = {}
        if self.of == "lens":
            words["tokens"] = [decode([id]) for id in figures.tokens]
        if figures.top:
            words["top"] = [
                [{"token": decode([id]), "token_id": id, "probability": _number(share)} for id, share in best]
                for best in figures.top
            ]
        if figures.followed:
            words["ranks"] = [rank for rank, _ in figures.followed]
            words["probabilities"] = [_number(share) for _, share in figures.followed]
        return {
            "choice": choice,
            "position": figures.position,
            "token": decode([token]),
            "token_id": token,
            "point": self.selectors[0].point,
            "of": self.of,
            "layers": [selector.layer for selector in self.selectors],
            **({"calls": calls} if any(call is not None for call in calls) else {}),
            "values": [_number(value) for value in figures.values],
            **words,
        }


def _number(value: float) -> float | None:
    """As JSON has it, which knows neither infinity nor NaN."""
    return value if math.isfinite(value) else None


def _read(prompt: Sequence[int], position: int, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """The token of the prompt that stands at a position."""
    return {"read": decode([prompt[position]]), "read_id": prompt[position]}


def offered(architecture_map: ArchitectureMap) -> dict[str, list[str]]:
    """For each kind of figure, the points of a model that have it."""
    names = dict.fromkeys(name for kind in architecture_map.kinds for name in kind.points)
    norm = [name for name in names if _refusal(name, "norm") is None]
    return {"norm": norm, "lens": [name for name in norm if _refusal(name, "lens") is None]}


def summary_of(asked: SummaryRequest, architecture_map: ArchitectureMap) -> Summary:
    """Check a request's summary against the map. Raises ApiError."""
    size = architecture_map.d_vocab
    if asked.of != "lens" and (asked.top is not None or asked.follow is not None):
        raise bad("summary: top and follow are of the lens; give of: lens.", f"{PARAM}.of")
    if asked.follow is not None and size is not None and asked.follow >= size:
        raise bad(f"summary: follow: token id {asked.follow}: the vocabulary is 0 to {size - 1}.", f"{PARAM}.follow")
    try:
        selectors = architecture_map.selectors([asked.point], asked.layers, asked.calls)
    except HookmapError as error:
        raise bad(str(error), PARAM, type(error).__name__) from error
    if not selectors:
        raise bad(f"summary: no layer of {asked.layers!r} has {asked.point}.", f"{PARAM}.layers")
    if why := _refusal(selectors[0].point, asked.of):
        raise bad(f"summary: {why}", f"{PARAM}.point")
    return Summary(asked.of, selectors, bool(asked.prompt), asked.top or 1, asked.follow)


def _refusal(point: str, of: str) -> str | None:
    """Why a point has no such figure; None where it has."""
    name, axes = PointName.of(point).base, PointName.of(point).definition.axes
    if not PointName.of(point).definition.per_layer:
        return f"{point} is not of a layer."
    if "key" in axes or axes == PLACE_AXES or name in NUMBERS:
        return f"{point} has no length that says something; name another point."
    if PointName.of(point).definition.eager:
        return f"{point} is there in eager attention only, and answers come without. Keep its rows: points."
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
        """`selectors` and the arguments after it: see `Observer`. Raises ApiError for a prompt that is too long."""
        super().__init__((*selectors, *summary.selectors), *args, **options)
        self._first, self._summary, self._unembedding = len(selectors), summary, unembedding
        self._rows: dict[int, list[torch.Tensor]] = {}
        """of each selector, [batch, new, ...] of the passes whose rows have no figures yet"""
        self._waits = summary.prompt
        """whether the figures of the prompt are still to come"""
        rows = self.layout.width * len(self.layout.samples) * len(summary.selectors)
        if summary.prompt and unembedding is not None and rows > MOST_ROWS:
            raise bad(
                f"summary: the lens of this prompt has {rows} cells, {MOST_ROWS} is the most; give fewer layers.",
                f"{PARAM}.prompt",
            )

    def _as_it_lies(self, number: int, term: Term) -> bool:
        return number < self._first and super()._as_it_lies(number, term)

    def _keeps(self, number: int) -> bool:
        return number >= self._first or super()._keeps(number)

    def _take(self, number: int, tensor: torch.Tensor) -> None:
        if number < self._first:
            super()._take(number, tensor)
            return
        rows = tensor if self._waits else tensor[:, -1:]
        # Copied, for later modules may write over it.
        found = rows.clone() if self._unembedding is not None else rows.flatten(2).float().norm(dim=2)
        before = self._rows.get(number, []) if self._waits else []
        self._rows[number] = [*before, found]

    def figures(self, length: int) -> list[Figures]:
        """The figures of each row of the batch, once it is `length` columns long."""
        self._waits = False
        with self.aside(), torch.no_grad():
            rows = [torch.cat(self._rows[number], dim=1) for number in sorted(self._rows)]
            self._rows = {}
            stacked = torch.stack([each.to(rows[-1].device) for each in rows], dim=2)
            first, found = length - 1 - stacked.shape[1], []
            for row, columns in enumerate(stacked):
                positions = [first + column - self.layout.pads(row) for column in range(len(columns))]
                told = [
                    figures_of(self._unembedding, each, position, self._summary)
                    for each, position in zip(columns, positions, strict=True)
                    if position >= 0
                ]
                found.append(replace(told[-1], earlier=tuple(told[:-1])))
            return found


def figures_of(unembedding: Unembeds | None, rows: torch.Tensor, position: int, summary: Summary) -> Figures:
    """The figures of one token. `rows`: [layers] lengths, or [layers, d_model] for the lens."""
    if unembedding is None:
        return Figures(position, tuple(rows.tolist()))
    shares = unembedding(rows[None].to(unembedding.dtype))[0].float().softmax(-1)
    best = shares.topk(min(summary.top, shares.shape[-1]), dim=-1)
    pairs = [tuple(zip(*each, strict=True)) for each in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    followed: tuple[tuple[int, float], ...] = ()
    if summary.follow is not None:
        own = shares[:, summary.follow]
        ranks = (shares > own[:, None]).sum(-1) + 1
        followed = tuple(zip(ranks.tolist(), own.tolist(), strict=True))
    return Figures(
        position,
        tuple(best.values[:, 0].tolist()),
        tuple(best.indices[:, 0].tolist()),
        tuple(pairs) if summary.top > 1 else (),
        followed,
    )
