"""Quantised linear layers during discovery: a plain product with weights replaces each.

What a quantised layer does inside is its library's own operation, which says nothing of a product. The modules and
their paths are those of the unquantised model, and so is the map.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_PLAIN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@contextmanager
def plain_products(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Each quantised linear layer of `model` computes `x @ 0` of the right shape; restored afterwards."""
    devices = {device, *(parameter.device for parameter in model.parameters())}
    layers = [module for module in model.modules() if _is_quantised(module)]
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _product(layer.out_features, layer.in_features, devices)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward  # accelerate sets one of its own


def _is_quantised(module: nn.Module) -> bool:
    """A layer of [out, in] features, no wrapper of one, that holds no floating-point weight of this shape."""
    shape = tuple(getattr(module, name, None) for name in ("out_features", "in_features"))
    if not all(isinstance(size, int) for size in shape) or next(module.children(), None) is not None:
        return False
    weight = module._parameters.get("weight")
    return weight is None or weight.dtype not in _PLAIN or tuple(weight.shape) != shape


def _product(rows: int, columns: int, devices: set[torch.device]) -> Callable[[Tensor], Tensor]:
    """The weights are a single zero, expanded. They exist before the pass, as weights do in its dataflow."""
    weights = {
        (dtype, device): torch.zeros((), dtype=dtype, device=device).expand(rows, columns)
        for dtype in _PLAIN
        for device in devices
    }

    def forward(x: Tensor) -> Tensor:
        return nn.functional.linear(x, weights[x.dtype, x.device])

    return forward
