"""What runs a model while an observer watches. `nnsight` is the local engine; each other one is a file of its own."""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from hookmap.engines.observation import Observer


class Engine(Protocol):
    """Runs one `generate` and shows the observer every boundary it asked for, as it is passed."""

    def generate(self, observer: "Observer", inputs: dict[str, Any]) -> "torch.Tensor":
        """`inputs` are the keyword arguments of transformers' `generate`. Returns its sequences `[batch, tokens]`."""
