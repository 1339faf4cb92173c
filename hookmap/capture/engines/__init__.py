"""What runs a model while an observer watches. Each engine is a file; all show the same tensors, bit for bit."""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hookmap.capture.engines.observation import Observer
    from hookmap.capture.interventions.edits import Editor


class Engine(Protocol):
    """Runs the model and shows the observer every boundary it asked for, as it is passed."""

    name: str
    exclusive: bool
    """whether nothing else may run the model meanwhile, on any thread"""
    module: "nn.Module"
    """what map paths start from"""
    root: "nn.Module"
    """the transformers model in it that `generate` calls, often the same"""
    runner: "nn.Module"
    """what is called to run it: the user's object, so that what a wrapper does around the model is done"""

    def generate(self, observer: "Observer", inputs: dict[str, Any], editor: "Editor | None" = None) -> "torch.Tensor":
        """`inputs` are the keyword arguments of transformers' `generate`. Returns its sequences `[batch, tokens]`.

        `editor`: what it writes at its boundaries; an engine that cannot raises InterventionError.
        """

    def forward(self, observer: "Observer", inputs: dict[str, Any], editor: "Editor | None" = None) -> None:
        """One forward pass of the model with these keyword arguments, as far as the observer needs it."""
