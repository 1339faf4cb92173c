"""A direction in the residual stream: which stream it reads, and what that stream is the sum of."""

from dataclasses import dataclass
from typing import Any

import torch

from hookmap.activations import Key, key_of
from hookmap.analysis.steering import SteeringVector
from hookmap.errors import SelectionError
from hookmap.maps.calls import last_run
from hookmap.maps.document import ArchitectureMap


@dataclass(frozen=True)
class Aim:
    """A direction, float32 [d_model], the key of the stream that it reads, and the summands of that stream."""

    vector: torch.Tensor
    whole: Key
    names: list[Key]


def aimed(m: ArchitectureMap, names: list[Key], given: Any, layer: int | None, tokens: tuple[Any, Any]) -> Aim:
    """A vector, or one of a steering vector's, at the stream that leaves `layer`. Raises SelectionError.

    names: the summands of the whole stream; tokens: the target and the other token, which must not be given too.
    """
    if tokens != (None, None):
        raise SelectionError("give tokens (target, against) or a direction, not both.")
    point = "resid_post"
    if isinstance(given, SteeringVector):
        point = given.about.point
        layer = given.layers[0] if layer is None and len(given.layers) == 1 else layer
        if point not in ("resid_pre", "resid_post") or layer not in given.layers:
            raise SelectionError(
                f"direction: this vector is of {point}, layers {', '.join(map(str, given.layers))}: an attribution "
                "reads one of resid_pre or resid_post. Say which of its layers: layer=N."
            )
        given = given.directions[layer]
    vector = torch.as_tensor(given).detach().float().cpu()
    if vector.shape != (m.d_model,) or not bool(vector.isfinite().all()):
        raise SelectionError(f"direction: expected {m.d_model} finite numbers, got a shape {list(vector.shape)}.")
    if layer is None:
        return Aim(vector, key_of("resid_post", *last_run(m)), names)
    if any(kind.calls > 1 for kind in m.kinds):
        raise SelectionError("layers of this model run several times in one forward pass: leave layer= out.")
    if isinstance(layer, bool) or not isinstance(layer, int) or not -m.num_layers <= layer < m.num_layers:
        raise SelectionError(f"layer {layer!r}: expected a number from 0 to {m.num_layers - 1}.")
    layer %= m.num_layers
    end = layer + (point == "resid_post")
    return Aim(vector, (point, layer), [names[0], *(key for key in names[1:] if (key[1] or 0) < end)])
