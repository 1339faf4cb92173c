"""The fingerprint of a model's weights, held against its definition; and the walk over modules that it takes."""

import hashlib

import torch
from torch import nn

from hookmap.loading.modules import each_module
from hookmap.loading.weights import VALUES, weights_of


class Shared(nn.Module):
    """Modules and parameters that are there twice, absent ones, and a tensor that does not lie row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.none = nn.Linear(30, 7), None
        self.pair = nn.ModuleList([nn.LayerNorm(5), self.left])
        self.pair.append(nn.ModuleDict({"deep": nn.Sequential(nn.Identity(), nn.Embedding(40, 3))}))
        self.register_module("absent", None)
        self.register_buffer("turned", torch.arange(600.0).view(20, 30).T)
        self.register_buffer("own", torch.ones(3), persistent=False)
        self.twice = self.pair[0].weight


def test_modules_come_as_pytorch_names_them() -> None:
    model = Shared()
    assert [*each_module(model)] == [*model.named_modules()]


def test_the_fingerprint_is_of_evenly_spaced_numbers_of_each_saved_tensor() -> None:
    model = Shared()
    buffers = [(f".{name}", tensor) for name, tensor in model.named_buffers() if name != "own"]
    digest, numbers = hashlib.sha256(), list[torch.Tensor]()
    for name, tensor in (*model.named_parameters(), *buffers):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        numbers.append(flat[:: max(1, -(-len(flat) // VALUES))])
    digest.update(torch.cat(numbers).numpy().tobytes())
    assert weights_of(model) == {
        "tensors": len(numbers),
        "dtypes": ["float32"],
        "values_of_each": VALUES,
        "sha256": digest.hexdigest(),
    }
