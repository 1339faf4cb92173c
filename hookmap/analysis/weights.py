"""The weights beside a point, by name: what writes to it and what reads from it, as views of the model's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from hookmap.discovery.discover import flow_of
from hookmap.discovery.weights import WeightPlace, Weights
from hookmap.errors import DiscoveryError, SelectionError
from hookmap.maps.points import PointName, is_place, parse_point

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

_WHY_NONE = {
    "resid": "branches read the stream as attn_in and mlp_in, and write to it what attn_out and mlp_out are",
    "q_rot k_rot attn_scores pattern": "attention computes it from q and k, which weights write to",
    "router_indices router_weights": "it is chosen by router_logits, which W_router writes to",
    "expert_post expert_out": "each row is of another expert; mlp_in and mlp_out have the weights of all",
    "mixer_norm_scale mlp_norm_scale final_norm_scale": "a norm computes it of the stream, without weights",
}
"""points, or how their names begin -> why there are no weights"""


@dataclass(frozen=True)
class Weight:
    """One parameter of the model beside a point."""

    name: str
    """W_Q, W_K, W_V, W_O, W_in, W_gate, W_out, W_router, W_E, W_U, w_norm, b_norm; else its module's name"""
    path: str
    """of the parameter"""
    side: Literal["writes", "reads"]
    """whether it makes the point's tensor, or reads it"""
    tensor: torch.Tensor | None
    """a view in the orientation `x @ W`: writing to it changes the model; None of a quantised parameter"""
    axes: tuple[str, ...]
    """(in, out), with `heads` and `d_head` in place of that which has heads; `experts` in front where they are fused"""
    bias: torch.Tensor | None
    """what the same product adds, as the parameter is"""
    tied: tuple[str, ...]
    """other paths of the same parameter"""
    quantised: bool
    """whether its numbers are packed: dequantise it as its library says"""

    def __repr__(self) -> str:
        shape = "quantised" if self.tensor is None else list(self.tensor.shape)
        return f"<{self.name} {self.side}: {self.path} {shape} {', '.join(self.axes)}>"


def weights(
    hm: Hooked, known: Weights, point: str, layer: int | None = None, call: int | None = None
) -> tuple[Weight, ...]:
    """See `HookedModel.weights`."""
    parsed = parse_point(point)
    if isinstance(parsed, str):
        raise SelectionError(parsed)
    layer = parsed.layer if layer is None else layer
    name = parsed.point
    if is_place(name):
        raise SelectionError(f"{point}: weights are told of points. The parameters of a module are its own.")
    beside = {
        selector.point: selector
        for selector in hm.map.selectors(
            [name, *(() if layer is None else hm.map.kind_of(layer % hm.map.num_layers).points)],
            "all" if layer is None else [layer],
            0 if call is None else call,
        )
    }
    if PointName.of(name).definition.per_layer and layer is None:
        raise SelectionError(f"{point} is a tensor of each layer: say which, as in weights({point!r}, 8).")
    try:
        places = known.of(name, beside)
    except DiscoveryError as error:
        raise SelectionError(f"no weights of {point}: {error}") from error
    if not places:
        base = PointName.of(name).base
        why = next((why for of, why in _WHY_NONE.items() if base in of.split() or base.startswith(f"{of}_")), None)
        raise SelectionError(
            f"no weights write to {point} or read from it directly"
            + (f": {why}." if why else ". hm.weights('mlp_out', LAYER) or another point of its branch may have them.")
        )
    return tuple(_weight(hm.model, place) for place in places)


def weights_from(module: torch.nn.Module) -> Weights:
    """What `weights` asks: the model runs once."""
    return Weights(flow_of(module)[0])


def _weight(model: torch.nn.Module, place: WeightPlace) -> Weight:
    found = _at(model, place.path)
    same = [path for path, each in model.named_parameters(remove_duplicate=False) if each is found]
    packed = found is None or not found.is_floating_point()
    tensor, axes = (None, ()) if packed or found is None else place.view(found)
    bias = None if place.bias is None else _at(model, place.bias)
    tied = tuple(path for path in same if path != place.path)
    return Weight(
        place.name, place.path, place.side, tensor, axes, None if bias is None else bias.detach(), tied, packed
    )


def _at(model: torch.nn.Module, path: str) -> torch.Tensor | None:
    owner, _, name = path.rpartition(".")
    found = getattr(model.get_submodule(owner), name, None)
    return found if isinstance(found, torch.Tensor) else None
