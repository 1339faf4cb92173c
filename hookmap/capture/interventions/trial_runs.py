"""Runs of one kind of block on a few random tokens, with and without a change: what a write is held against."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch

from hookmap.activations import Activation, Key
from hookmap.capture.engines import Engine
from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.finiteness import why_not_finite
from hookmap.capture.interventions.edits import Edit, Editor, TokensAt
from hookmap.capture.run import device_of, vocabulary_of
from hookmap.loading.encoder_decoder import with_source
from hookmap.loading.finiteness import is_stream
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector, select
from hookmap.maps.templates import BlockKind

TOKENS = 6
_MASKED = 1e4
"""a score of so much is a mask's"""
Measured = Callable[[tuple[Selector, ...]], tuple[Selector, ...]]
Run = tuple[int, int]
"""(layer, call)"""
Values = dict[Key, torch.Tensor]
"""key -> [TOKENS, ...]"""


class TrialRuns:
    """Runs that show the points of one run of a layer and of what follows it; or those of the whole model."""

    def __init__(
        self,
        engine: Engine,
        architecture_map: ArchitectureMap,
        kind: BlockKind | None,
        call: int | None = None,
        place: str | None = None,
        eager: str | None = None,
        measured: Measured = tuple,
    ) -> None:
        """`kind`: whose first layer is watched, one that another layer follows if there is such a one; in this call.

        `place`: a tensor that is named by its place; it is watched, and the `end`. `eager`: the one point that is
        watched of those which only eager attention shows. `measured`: see
        `hookmap.capture.places.Places`.
        """
        self._engine, self._map, self._kind, self._call = engine, architecture_map, kind, call or 0
        self._place, self._eager, self._measured = place, eager, measured
        self.patched: dict[str, Values] = {}
        """point -> the run in which it alone was written, with its value of `upstream`"""

    @cached_property
    def plain(self) -> Values:
        """The run without a change."""
        return self.run({})

    @cached_property
    def upstream(self) -> Values:
        """The run in which the stream that enters the block is changed."""
        stream = self.selector("resid_pre")
        old = self.plain[stream.key]
        return self.run({stream: old + noise(old, 0)})

    @cached_property
    def repeats(self) -> bool:
        """Whether two runs agree bit for bit: some GPU kernels add in another order each time."""
        again = self.run({})
        return all(torch.equal(again[key], self.plain[key]) for key in self.plain)

    def why_not_finite(self) -> str | None:
        """Why nothing can be proved where the plain run's stream is not finite; None where it is."""
        if all(bool(rows.isfinite().all()) for key, rows in self.plain.items() if is_stream(key[0])):
            return None
        return why_not_finite(self._engine, self._map, self._tokens()[0].tolist())

    def selector(self, point: str) -> Selector:
        """The point in the watched layer."""
        return self._measured(select(self._map, [point], *self._places()))[0]

    @property
    def end(self) -> str:
        """The last point of the model: what changes with a tensor that anything reads."""
        return next((name for name in ("logits", "final_norm") if name in self._map.model_points), "resid_post")

    def run(self, written: Mapping[Selector, torch.Tensor]) -> Values:
        """One forward pass in which these points get these values."""
        ids = self._tokens()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        inputs = with_source(self._engine.root, inputs, torch.Generator().manual_seed(0))
        rows: dict[Key, list[torch.Tensor]] = {}

        def take(activation: Activation) -> None:
            rows.setdefault(activation.key, []).append(activation.tensor)

        observer = Observer(self._watched(), BatchLayout((0,), (TOKENS,), right=True), take)
        edits = [_write(selector, value) for selector, value in written.items()]
        self._engine.forward(observer, inputs, Editor(edits, observer) if edits else None)
        observer.finish(TOKENS)
        return {key: torch.cat(parts) for key, parts in rows.items()}

    def _watched(self) -> tuple[Selector, ...]:
        """The points of the layer, and where what it writes arrives: the next layer's stream, or the final norm."""
        if self._place is not None:
            last = ([self._map.order[-1][0]], "last") if self.end == "resid_post" else ("all", "all")
            return (self.selector(self._place), *select(self._map, [self.end], *last))
        model_points = list(self._map.model_points)
        if self._kind is None:
            return select(self._map, [*model_points, "resid_pre"], [0], [0])
        plain = [p for p in self._kind.points if not PointName.of(p).definition.eager]
        own = select(self._map, [*dict.fromkeys([*plain, *([self._eager] if self._eager else [])])], *self._places())
        if (after := self._after()) is not None:
            layer, call = after
            return (*own, *select(self._map, ["resid_pre", "resid_post"], [layer], [call]))
        return (*own, *(select(self._map, ["final_norm"]) if "final_norm" in model_points else ()))

    def _places(self) -> tuple[Any, Any]:
        """Layers and calls that are watched."""
        return ("all", "all") if self._kind is None else ([self._layer(self._kind)], [self._call])

    def _after(self) -> Run | None:
        """The run of a layer that comes next, if one does."""
        assert self._kind is not None
        order = self._map.order
        return next(iter(order[order.index((self._layer(self._kind), self._call)) + 1 :]), None)

    def _layer(self, kind: BlockKind) -> int:
        last = self._map.order[-1]
        return next((layer for layer in kind.layers if (layer, self._call) != last), kind.layers[0])

    def _tokens(self) -> torch.Tensor:
        count = vocabulary_of(self._engine)
        draw = torch.Generator().manual_seed(0)
        return torch.randint(min(3, count - 1), count, (1, TOKENS), generator=draw).to(device_of(self._engine))


def changed(value: torch.Tensor) -> torch.Tensor:
    """The value with noise on it; infinities, and what masks put there, stay."""
    usual = value.abs() < _MASKED
    return torch.where(usual, value + noise(value.where(usual, 0.0), 1), value)


def noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Random values of the same shape, dtype and standard deviation."""
    draw = torch.Generator().manual_seed(seed)
    size = like.float().std().clamp_min(1e-3)
    return (torch.randn(like.shape, generator=draw) * size).to(like.dtype)


def _write(selector: Selector, value: torch.Tensor) -> Edit:
    def operation(rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        return value.to(rows.device)[[token.position for token in where]]

    return Edit(selector, operation)
