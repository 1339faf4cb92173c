"""A cheap fingerprint of a model's weights; it changes where a tensor is replaced, scaled or cast."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hookmap.loading.modules import each_module

VALUES = 64
"""the most numbers that are read of each tensor, evenly spaced"""


def weights_of(module: nn.Module) -> dict[str, Any] | None:
    """What a manifest says of the weights; None where some are elsewhere (on a disk, on another machine).

    Of every parameter and every buffer that is saved with the model: name, dtype, shape and VALUES of its numbers. So
    another checkpoint, another dtype, an adapter, or a tensor that was scaled is seen; a few numbers changed by hand
    may not be.
    """
    digest, values = hashlib.sha256(), dict[torch.dtype, list[torch.Tensor]]()
    count = 0
    for name, tensor in _saved(module):
        if tensor.is_meta:
            return None
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values.setdefault(tensor.dtype, []).append(_some(tensor.detach()))
        count += 1
    for found in values.values():
        # Joined where they are: a copy to the host for each would wait for the device each time.
        together = len({each.device for each in found}) == 1
        joined = torch.cat(found if together else [each.cpu() for each in found])
        digest.update(joined.cpu().view(torch.uint8).numpy().tobytes())
    dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in values)
    return {"tensors": count, "dtypes": dtypes, "values_of_each": VALUES, "sha256": digest.hexdigest()}


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """At most VALUES of its numbers, evenly spaced."""
    size = tensor.numel()
    step = max(1, -(-size // VALUES))
    # One operation: every capture asks this of every weight.
    if type(tensor) is torch.Tensor and tensor.is_contiguous():
        return tensor.as_strided((-(-size // step),), (step,))
    return tensor.flatten()[::step]


def _saved(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    parts, seen = [*each_module(module)], set[nn.Parameter]()
    for path, part in parts:
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{path}.{name}" if path else name, parameter
    for path, part in parts:
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer
