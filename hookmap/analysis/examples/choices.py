"""What a router chooses as features: of each token the weights of its experts, 0 for the others."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

import torch

from hookmap.activations import Activation, Key, Sample, Sink, key_of
from hookmap.errors import SelectionError
from hookmap.maps.points import PointName

INDICES: Final = "router_indices"
WEIGHTS: Final = "router_weights"


def keys_of_choices(keys: Iterable[Key]) -> tuple[Key, ...]:
    """The tensors of weights among these, whose names the choices have."""
    return tuple(key for key in keys if PointName.of(key[0]).base == WEIGHTS)


class Choices:
    """A sink for both tensors of a router, which hands on the choices: sparse [n, experts], as the weights."""

    def __init__(self, sink: Sink, experts: int) -> None:
        self._sink, self._experts = sink, experts
        self._held: dict[tuple[int, Key, int], Activation] = {}

    def write(self, activation: Activation) -> None:
        name = PointName.of(activation.point)
        other = name.numbered(WEIGHTS if name.base == INDICES else INDICES)
        place = (activation.sample, key_of(other, activation.layer, activation.call), activation.start)
        held = self._held.pop(place, None)
        if held is None:
            self._held[activation.sample, activation.key, activation.start] = activation
            return
        one, two = (activation, held) if name.base == INDICES else (held, activation)
        self._sink.write(replace(two, tensor=chosen(one.tensor, two.tensor, self._experts)))

    def finish(self, sample: Sample) -> None:
        self._sink.finish(sample)

    def abandon(self) -> None:
        self._held = {}
        self._sink.abandon()


def chosen(indices: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """[n, k] both -> sparse [n, experts]. Raises SelectionError for an expert that there is not."""
    which = indices.long()
    if which.numel() and int(which.max()) >= experts:
        raise SelectionError(f"the router chose expert {int(which.max())}, and the map says that there are {experts}.")
    row = torch.arange(len(which), device=which.device)[:, None].expand_as(which)
    at = torch.stack([row.flatten(), which.flatten()])
    size = (len(which), experts)
    return torch.sparse_coo_tensor(at, weights.flatten(), size, check_invariants=True).coalesce()
