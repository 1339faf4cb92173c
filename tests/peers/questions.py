"""What hookmap and its peers are asked on the same checkpoints. Imported by all of their interpreters: torch alone.

An answer is a safetensors file with a tensor for each question, and a JSON file that says why others have none.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TOKENS = [5, 17, 3, 60, 22, 9, 41]
SOURCE = [11, 2, 33, 8, 70, 44, 19]
"""as long: the prompt that patches come from, and the clean one of a sweep"""
LAYER, LAYERS, HEAD, WIDTH = 1, 3, 2, 32
TARGET, AGAINST = 13, 8
PLACES = [1, 4]
STRENGTH = 2.0
VECTOR = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)) * 3


def seen(point: str, tensor: torch.Tensor) -> torch.Tensor:
    """Of scores, those of keys that a query sees: the others are a mask's, and programs put other numbers there."""
    return tensor.tril() if point == "attn_scores" else tensor


class Answers:
    """What one program says of one model."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.refused: dict[str, str] = {}

    def ask(self, name: str, answer: Callable[[], torch.Tensor]) -> None:
        """Notes the tensor, or the error."""
        try:
            with torch.no_grad():
                self.tensors[name] = answer().detach().float().cpu().contiguous().clone()
        except Exception as error:  # whatever a program raises is its answer
            self.note(name, error)

    def note(self, name: str, error: Exception) -> None:
        lines = str(error).strip().splitlines() or [""]
        self.refused[name] = f"{type(error).__name__}: {lines[0]}" + (f" … {lines[-1]}" if lines[1:] else "")

    def save(self, path: Path) -> None:
        save_file(self.tensors, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps(self.refused, indent=1))

    @classmethod
    def load(cls, path: Path) -> "Answers":
        found = cls()
        found.tensors = load_file(path.with_suffix(".safetensors"))
        found.refused = json.loads(path.with_suffix(".json").read_text())
        return found
