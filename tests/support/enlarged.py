"""A model whose stream leaves the range of float16."""

import torch
from support import plain_hooks
from torch import nn


def enlarged(factor: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Llama, with one feature of what block 1's MLP adds that many times as large."""
    model = plain_hooks.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[7] *= factor  # type: ignore[union-attr,index]
    return model.to(dtype)
