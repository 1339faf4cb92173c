"""A cheap fingerprint of a model's weights; it changes where a tensor is replaced, scaled or cast."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

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
        flat = tensor.detach().flatten()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values.setdefault(tensor.dtype, []).append(flat[:: max(1, -(-len(flat) // VALUES))].cpu())
        count += 1
    for found in values.values():
        digest.update(torch.cat(found).view(torch.uint8).numpy().tobytes())
    dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in values)
    return {"tensors": count, "dtypes": dtypes, "values_of_each": VALUES, "sha256": digest.hexdigest()}


def _saved(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer
