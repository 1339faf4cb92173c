"""Which expert of a mixture writes the large numbers, and how often the router asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookmap.activations import Activation, Key, Sample
from hookmap.analysis.gathering import Gathering, refuse_other_rows
from hookmap.capture.options import Layers
from hookmap.capture.prepare import say_apart
from hookmap.errors import SelectionError
from hookmap.stores.number_set import NumberSet

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

Tensor = torch.Tensor
OUT, INDICES, WEIGHTS = "expert_out", "router_indices", "router_weights"


@dataclass(frozen=True, eq=False)
class LayerExperts:
    """The experts of one layer over all tokens. What an expert writes is its output times its weight."""

    chosen: Tensor
    """int64 [experts]: tokens that each was chosen for"""
    weight: Tensor
    """float64 [experts]: its mean weight where it was; 0 where it never was"""
    largest: Tensor
    """float64 [experts, d_model]: the largest magnitude that it wrote to each feature of the stream"""
    tokens: int

    @property
    def share(self) -> Tensor:
        """float64 [experts]: the share of the tokens that each was chosen for."""
        return self.chosen.double() / max(1, self.tokens)

    def of(self, feature: int, top: int = 5) -> tuple[tuple[int, float], ...]:
        """The experts that wrote the largest magnitudes to a feature, and those. Raises SelectionError."""
        if not 0 <= feature < self.largest.shape[1]:
            raise SelectionError(f"feature {feature}: the stream has 0 to {self.largest.shape[1] - 1}.")
        best = self.largest[:, feature].topk(min(top, len(self.chosen)))
        return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def as_json(self) -> list[dict[str, Any]]:
        """An entry for each expert."""
        size, feature = self.largest.max(1)
        names = ("expert", "share", "weight", "largest", "feature")
        columns = (range(len(self.chosen)), self.share.tolist(), self.weight.tolist(), size.tolist(), feature.tolist())
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def expert_outliers(hm: Hooked, prompts: Any, layers: Layers = "all", **options: Any) -> dict[int, LayerExperts]:
    """See `HookedModel.expert_outliers`."""
    refuse_other_rows(options, "every row of the texts is read", "dictionaries", "keep_dtype")
    prepared = hm.prepare(prompts, [OUT, INDICES, WEIGHTS], layers, 0, **options)
    say_apart(prepared.apart)
    sink = _Experts(tuple(selector.key for selector in prepared.run.selectors))
    prepared.into(sink)
    return sink.found()


class _Experts(Gathering):
    """Sums of what each expert writes."""

    def __init__(self, keys: tuple[Key, ...]) -> None:
        super().__init__(keys, NumberSet(), None, lambda: None)
        self._held_rows: dict[Key, Tensor] = {}
        self._pending: list[tuple[int, LayerExperts]] = []
        self._layers: dict[int, LayerExperts] = {}

    def take(self, key: Key, rows: Tensor, pieces: list[Activation]) -> None:
        self._held_rows[key] = rows
        where = key[1:]
        three = [(name, *where) for name in (OUT, INDICES, WEIGHTS)]
        if all(each in self._held_rows for each in three):
            out, indices, weights = (self._held_rows.pop(each) for each in three)
            self._pending.append((key[1] or 0, _of_rows(out, indices, weights)))

    def commit(self, samples: Mapping[int, Sample]) -> None:
        for layer, new in self._pending:
            self._layers[layer] = _joined(self._layers[layer], new) if layer in self._layers else new
        self.forget()

    def forget(self) -> None:
        self._pending, self._held_rows = [], {}

    def found(self) -> dict[int, LayerExperts]:
        return dict(sorted(self._layers.items()))


def _of_rows(out: Tensor, indices: Tensor, weights: Tensor) -> LayerExperts:
    """out: [n, k, d]; indices, weights: [n, k]. Tokens with an infinity or nan are left out."""
    good = out.isfinite().flatten(1).all(1) & weights.isfinite().all(1)
    out, indices, weights = (each[good] for each in (out, indices, weights))
    wrote = (out.double() * weights.double()[..., None]).abs().flatten(0, 1)
    which = indices.flatten().long()
    count = int(which.max()) + 1 if len(which) else 0
    chosen = torch.bincount(which, minlength=count)
    sums = torch.zeros(count, dtype=torch.float64, device=which.device).index_add_(0, which, weights.double().flatten())
    largest = wrote.new_zeros(count, wrote.shape[1])
    largest.scatter_reduce_(0, which[:, None].expand_as(wrote), wrote, "amax")
    mean = sums / chosen.clamp(min=1)
    return LayerExperts(chosen.cpu(), mean.cpu(), largest.cpu(), len(out))


def _joined(one: LayerExperts, other: LayerExperts) -> LayerExperts:
    count = max(len(one.chosen), len(other.chosen))
    a, b = (_padded(each, count) for each in (one, other))
    chosen = a.chosen + b.chosen
    weight = (a.weight * a.chosen + b.weight * b.chosen) / chosen.clamp(min=1)
    return LayerExperts(chosen, weight, torch.maximum(a.largest, b.largest), a.tokens + b.tokens)


def _padded(given: LayerExperts, count: int) -> LayerExperts:
    """The same with entries for experts that were not chosen."""
    more = count - len(given.chosen)
    chosen, weight = (torch.nn.functional.pad(each, (0, more)) for each in (given.chosen, given.weight))
    largest = torch.nn.functional.pad(given.largest, (0, 0, 0, more))
    return LayerExperts(chosen, weight, largest, given.tokens)
