"""Derivatives between two points of one forward pass, whose graph autograd still has: through all that lies between."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from hookmap.activations import Key
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.engines.taps import Taps
from hookmap.errors import CaptureError


class LocalGraph:
    """The graph of one batch. Tensors "as they lie" are those of the model, not yet [batch, pos, ...]."""

    def __init__(self, taps: Taps, layout: BatchLayout) -> None:
        self._taps = taps
        self.layout = layout
        self._numbers = {selector.key: number for number, selector in enumerate(taps.selectors)}

    def gradient(self, key: Key) -> torch.Tensor:
        """The gradient of the metric at a point, as it lies."""
        return self._taps.found[self._numbers[key]]

    def of_point(self, key: Key, gradient: torch.Tensor) -> torch.Tensor:
        """A gradient as it lies, as that of the point, [batch, pos, ...]."""
        return self._taps.of_point(self._numbers[key], gradient)

    def heads(self, key: Key) -> int:
        """How many heads a point has."""
        number = self._numbers[key]
        return int(self._taps.arranged(number, self._taps.found[number]).shape[2])

    def of_head(self, key: Key, tensor: torch.Tensor, head: int) -> torch.Tensor:
        """The tensor, as it lies, with zeros in place of all other heads."""
        kept = torch.zeros_like(self._taps.arranged(self._numbers[key], tensor))
        kept[:, :, head] = 1
        return tensor * self.placed(key, kept)

    def placed(self, key: Key, values: torch.Tensor) -> torch.Tensor:
        """Values of a point, [batch, pos, heads, d_head], as they lie: zeros where the tensor holds something else."""
        number = self._numbers[key]
        term, whole = self._taps.term(number), torch.zeros_like(self._taps.found[number])
        if term.heads is None:
            view = term.arrange(whole, *self._taps.shape)
            if view.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                raise CaptureError(
                    f"{term}: its heads cannot be told apart, since the model keeps their numbers in another order. "
                    "Ask for another point of this branch: hookmap show MODEL lists them."
                )
            view[:] = values.reshape(view.shape)
            return whole
        places = torch.arange(whole.shape[-1], device=whole.device).expand(1, 1, -1)
        split = term.view(places)[0, 0]
        flat = replace(term, heads=None).arrange(whole.flatten(0, -3) if whole.ndim > 3 else whole, *self._taps.shape)
        flat[..., split.flatten()] = values.flatten(-2).to(flat.dtype)
        return whole

    def pull(self, key: Key, to: Key, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of `to`, an earlier point, through `key` alone: [batch, pos, ...], from one of `key` as it lies.

        Raises CaptureError where `key` is not computed from `to`.
        """
        edges = [self._taps.edge(self._numbers[each]) for each in (key, to)]
        (found,) = torch.autograd.grad([edges[0]], [edges[1]], [gradient], retain_graph=True, allow_unused=True)
        if found is None:
            raise CaptureError(f"{key[0]} of layer {key[1]} is not computed from {to[0]}, as far as autograd sees.")
        with torch.no_grad():
            return self.of_point(to, found)

    def push(self, key: Key, to: Key, changes: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """How `to`, a later point, moves with each change of `key`, to first order: [batch, pos, ...].

        `changes`: as they lie. It is the derivative of a gradient by what it is taken of, which autograd knows.
        """
        edges = [self._taps.edge(self._numbers[each]) for each in (key, to)]
        weights = torch.zeros_like(self._taps.found[self._numbers[to]], requires_grad=True)
        with torch.enable_grad():
            (pulled,) = torch.autograd.grad([edges[1]], [edges[0]], [weights], create_graph=True)
        for change in changes:
            (moved,) = torch.autograd.grad([pulled], [weights], [change], retain_graph=True)
            yield self._taps.share(self._numbers[to], moved).detach()
