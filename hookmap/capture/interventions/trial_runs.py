"""Runs of one kind of block on a few random tokens, with and without a change: what a write is held against."""

from collections.abc import Mapping
from functools import cached_property

import torch

from hookmap.activations import Activation, Key
from hookmap.capture.engines import Engine
from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.finiteness import why_not_finite
from hookmap.capture.interventions.edits import Edit, Editor, TokenPositions
from hookmap.capture.run import device_of
from hookmap.loading.encoder_decoder import with_source
from hookmap.loading.finiteness import is_stream
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.selectors import Selector, select
from hookmap.maps.templates import BlockKind

TOKENS = 6
Values = dict[Key, torch.Tensor]
"""(point, layer) -> [TOKENS, ...]"""


class TrialRuns:
    """Runs that show the points of one layer and of what follows it; or those of the whole model."""

    def __init__(self, engine: Engine, architecture_map: ArchitectureMap, kind: BlockKind | None) -> None:
        """`kind`: whose first layer is watched, one that another layer follows if there is such a one."""
        self._engine, self._map, self._kind = engine, architecture_map, kind
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
        old = self.plain[stream.point, stream.layer]
        return self.run({stream: old + noise(old, 0)})

    @cached_property
    def repeats(self) -> bool:
        """Whether two runs agree bit for bit: some GPU kernels add in another order each time."""
        again = self.run({})
        return all(torch.equal(again[key], self.plain[key]) for key in self.plain)

    def why_not_finite(self) -> str | None:
        """Why nothing can be proved where the plain run's stream is not finite; None where it is."""
        if all(bool(rows.isfinite().all()) for (name, _), rows in self.plain.items() if is_stream(name)):
            return None
        return why_not_finite(self._engine, self._map, self._tokens()[0].tolist())

    def selector(self, point: str) -> Selector:
        """The point in the watched layer."""
        return select(self._map, [point], "all" if self._kind is None else [self._layer(self._kind)])[0]

    def run(self, written: Mapping[Selector, torch.Tensor]) -> Values:
        """One forward pass in which these points get these values."""
        ids = self._tokens()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        inputs = with_source(self._engine.root, inputs, torch.Generator().manual_seed(0))
        rows: dict[Key, list[torch.Tensor]] = {}

        def take(activation: Activation) -> None:
            rows.setdefault((activation.point, activation.layer), []).append(activation.tensor)

        observer = Observer(self._watched(), BatchLayout((0,), (TOKENS,), right=True), take)
        edits = [_write(selector, value) for selector, value in written.items()]
        self._engine.forward(observer, inputs, Editor(edits, observer) if edits else None)
        observer.finish(TOKENS)
        return {key: torch.cat(parts) for key, parts in rows.items()}

    def _watched(self) -> tuple[Selector, ...]:
        """The points of the layer, and where what it writes arrives: the next layer's stream, or the final norm."""
        model_points = list(self._map.model_points)
        if self._kind is None:
            return select(self._map, [*model_points, "resid_pre"], [0])
        layer = self._layer(self._kind)
        own = select(self._map, [p for p in self._kind.points if not p.startswith("pattern")], [layer])
        if layer + 1 < self._map.num_layers:
            return (*own, *select(self._map, ["resid_pre", "resid_post"], [layer + 1]))
        return (*own, *(select(self._map, ["final_norm"]) if "final_norm" in model_points else ()))

    def _layer(self, kind: BlockKind) -> int:
        return next((layer for layer in kind.layers if layer + 1 < self._map.num_layers), kind.layers[0])

    def _tokens(self) -> torch.Tensor:
        count = len(self._engine.root.get_input_embeddings().weight)  # type: ignore[operator]
        draw = torch.Generator().manual_seed(0)
        return torch.randint(min(3, count - 1), count, (1, TOKENS), generator=draw).to(device_of(self._engine))


def noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Random values of the same shape, dtype and standard deviation."""
    draw = torch.Generator().manual_seed(seed)
    size = like.float().std().clamp_min(1e-3)
    return (torch.randn(like.shape, generator=draw) * size).to(like.dtype)


def _write(selector: Selector, value: torch.Tensor) -> Edit:
    def operation(rows: torch.Tensor, where: TokenPositions, means: torch.Tensor | None) -> torch.Tensor:
        return value.to(rows.device)[[position for _, position in where]]

    return Edit(selector, operation)
