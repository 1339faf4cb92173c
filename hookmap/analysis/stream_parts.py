"""The parts that a stream is said to be the sum of: its branches, and heads, neurons or experts in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hookmap.activations import Key, call_of, key_of
from hookmap.analysis.expert_outputs import expert_outputs, keys_of_experts
from hookmap.analysis.head_outputs import head_outputs, neuron_outputs
from hookmap.capture.options import Layers
from hookmap.capture.result import Capture
from hookmap.capture.stacks import label
from hookmap.errors import SelectionError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.stores.interface import Store

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked


@dataclass(frozen=True)
class Inside:
    """Which branches are split."""

    heads: bool
    neurons: frozenset[int]
    experts: frozenset[int]

    def of_mlp(self, m: ArchitectureMap, key: Key) -> str | None:
        """What this branch is split into where it is an MLP: neuron, expert, or nothing."""
        own, layer = PointName.of(key[0]), key[1]
        if own.base != "mlp_out" or layer is None:
            return None
        points = m.kind_of(layer).points
        if layer in self.neurons and own.numbered("mlp_post") in points:
            return "neuron"
        return "expert" if layer in self.experts and own.numbered("expert_out") in points else None

    def keys(self, m: ArchitectureMap, names: Sequence[Key]) -> list[Key]:
        """What the neurons and experts of these summands are computed from."""
        found: list[Key] = []
        for key in names:
            what = self.of_mlp(m, key)
            if what == "neuron":
                found.append(key_of(PointName.of(key[0]).numbered("mlp_post"), key[1], call_of(key)))
            elif what == "expert":
                found += keys_of_experts(m, key)
        return found


def inside_of(hm: Hooked, heads: bool, neurons: Layers, experts: Layers) -> Inside:
    """Of the options. Raises SelectionError where a layer has no such parts, or is to be split in two ways."""
    found = Inside(heads, _layers_with(hm, "mlp_post", neurons), _layers_with(hm, "expert_out", experts))
    if both := found.neurons & found.experts:
        raise SelectionError(f"layer {min(both)} is split into neurons and into experts: choose one of them.")
    return found


def _layers_with(hm: Hooked, point: str, layers: Layers) -> frozenset[int]:
    if isinstance(layers, tuple) and not layers:
        return frozenset()
    return frozenset(s.layer for s in hm.selectors(point, layers) if s.layer is not None)


def parts_of(
    hm: Hooked, run: Capture | Store, names: list[Key], inside: Inside, close: float, sample: int
) -> tuple[list[str], torch.Tensor]:
    """The labels of the parts, and the parts, float32 [parts, pos, d_model]."""
    labels: list[str] = []
    parts: list[torch.Tensor] = []
    for key in names:
        name, what = label(key), inside.of_mlp(hm.map, key)
        if what == "expert":
            found = expert_outputs(hm, run, key, close, sample)
            labels += [f"{name} expert {number}" for number in found.experts]
            parts += [*found.routed]
            if found.shared is not None:
                labels.append(f"{name} shared experts")
                parts.append(found.shared)
            continue
        if what == "neuron":
            own, rest = neuron_outputs(hm, run, key, close, sample)
        elif key[0] == "mixer_out" and inside.heads and key_of("z", key[1], call_of(key)) in run.keys:
            (own, rest), what = head_outputs(hm, run, key, close, sample), "head"
        else:
            labels.append(name)
            parts.append(run.read(sample, *key).float())
            continue
        labels += [f"{name} {what} {n}" for n in range(len(own))]
        parts += [*own]
        if not bool(rest.abs().max() > close * own.abs().max()):
            parts[-1] = parts[-1] + rest  # rounding
            continue
        labels.append(f"{name} bias")
        parts.append(rest)
    return labels, torch.stack(parts)
