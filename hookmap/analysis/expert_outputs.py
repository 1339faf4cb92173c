"""What each expert of a mixture adds to the stream: what it gives, times its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hookmap.activations import Key, call_of, key_of
from hookmap.analysis.head_outputs import MORE, refused
from hookmap.capture.result import Capture
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.stores.interface import Store

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

_POINTS = ("router_indices", "expert_out", "router_weights", "shared_expert_out")


@dataclass(frozen=True)
class ExpertOutputs:
    """The parts of one mixture's `mlp_out`, float32. They sum to it but for rounding."""

    experts: tuple[int, ...]
    """the numbers of those that one of the tokens has"""
    routed: torch.Tensor
    """[experts, pos, d_model]; 0 where a token does not have the expert"""
    shared: torch.Tensor | None
    """[pos, d_model], of the experts that every token has; None where there are none"""


def keys_of_experts(m: ArchitectureMap, key: Key) -> list[Key]:
    """What has to be captured to split this `mlp_out`: all that the layer has of its mixture."""
    assert key[1] is not None
    points = m.kind_of(key[1]).points
    names = (PointName.of(key[0]).numbered(name) for name in _POINTS)
    return [key_of(name, key[1], call_of(key)) for name in names if name in points]


def expert_outputs(hm: Hooked, run: Capture | Store, key: Key, close: float, sample: int = 0) -> ExpertOutputs:
    """From a capture of `mlp_out`, at `key`, and of `keys_of_experts`.

    `close`: how much the sum may be off, relative to the largest value. Raises SelectionError where the MLP adds more
    than its experts.
    """
    layer, call = key[1], call_of(key)
    assert layer is not None
    own = PointName.of(key[0])
    held = {each[0]: run.read(sample, *each) for each in keys_of_experts(hm.map, key)}
    chosen, given, weights, shared = (held.get(own.numbered(name)) for name in _POINTS)
    if chosen is None or given is None:
        lacking = own.numbered("expert_out" if given is None else "router_indices")
        reason = f"it has no {lacking}: {hm.map.unavailable(lacking, layer)}"
        raise refused(hm, layer, reason, "experts", "MLP")
    whole = run.read(sample, *key).float()
    (added,) = hm.map.selectors(key[0], layer, call or 0)
    rest = whole if shared is None else whole - shared.float() * added.scale
    rows = given.float() if weights is None else given.float() * weights.float()[..., None]
    summed = rows.sum(1)
    if summed.shape != rest.shape:
        raise refused(hm, layer, MORE, "experts", "MLP")
    rows = rows * (summed * rest).sum() / summed.square().sum()  # some mixtures scale the sum
    if not float((rows.sum(1) - rest).abs().max()) <= close * float(whole.abs().max()):
        raise refused(hm, layer, MORE, "experts", "MLP")
    numbers = tuple(sorted({*chosen.flatten().tolist()}))
    routed = torch.stack([(rows * (chosen == number)[..., None]).sum(1) for number in numbers])
    left = whole - routed.sum(0)
    if shared is None:
        routed[-1] += left  # rounding
    return ExpertOutputs(numbers, routed, None if shared is None else left)
