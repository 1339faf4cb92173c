"""What every library of benchmarks/beside.py is asked for. Imports no hookmap: peers' environments lack it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Tensor = torch.Tensor
Ways = dict[str, Callable[[], Callable[[], Tensor]]]
"""A way does its work when it is called, and returns a function that picks the numbers to compare out of it."""
RIGHT, WRONG = 5, 7
"""the tokens whose logits' difference a sweep measures; gradients are of the first one's"""


@dataclass(frozen=True)
class Work:
    """What every library is asked for."""

    folder: str
    """the model"""
    layers: int
    dictionary: str
    """a folder as SAELens writes it: a standard dictionary of `resid_post` of the layer `at`"""
    new: int = 16
    prompt: Tensor = field(default_factory=lambda: torch.arange(1000, 1032)[None])
    batch: Tensor = field(default_factory=lambda: torch.arange(2000, 2256).reshape(4, 64))
    clean: Tensor = field(default_factory=lambda: torch.arange(3000, 3008)[None])
    corrupted: Tensor = field(default_factory=lambda: torch.arange(4000, 4008)[None])

    @property
    def few(self) -> list[int]:
        return [self.layers * quarter // 4 for quarter in (1, 2, 3)]

    @property
    def cells(self) -> list[tuple[int, int]]:
        """The layers and tokens that a sweep patches one by one: the rows of `many_corrupted`."""
        return [(layer, token) for layer in self.swept for token in range(self.clean.shape[1])]

    @property
    def swept(self) -> list[int]:
        return [self.layers * sixth // 6 for sixth in range(6)]

    @property
    def many_corrupted(self) -> Tensor:
        return self.corrupted.repeat(len(self.cells), 1)

    def written(self, rows: Tensor, layer: int, clean: Tensor) -> Tensor:
        """The rows of a layer, [cells, tokens, width], with the tokens of the clean prompt that are patched there."""
        rows, cells = rows.clone(), [number for number, cell in enumerate(self.cells) if cell[0] == layer]
        tokens = range(len(cells))
        rows[cells, tokens] = clean[0, tokens]
        return rows

    @property
    def at(self) -> int:
        return self.layers // 2

    @property
    def generate(self) -> dict[str, Any]:
        return {"max_new_tokens": self.new, "min_new_tokens": self.new, "do_sample": False, "pad_token_id": 0}


def plain(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def difference(logits: Tensor) -> Tensor:
    """[…, vocabulary] -> […]"""
    return logits[..., RIGHT] - logits[..., WRONG]


def dictionary_weights(work: Work) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(f"{work.dictionary}/sae_weights.safetensors"))
