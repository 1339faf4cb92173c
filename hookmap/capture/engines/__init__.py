"""Engines run a model while an observer watches. Each is one file; all show the same tensors, bit for bit."""

from typing import TYPE_CHECKING, Any, Protocol

from hookmap.errors import CaptureError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hookmap.capture.engines.observation import Observer
    from hookmap.capture.interventions.edits import Editor


class Engine(Protocol):
    """Runs the model and shows the observer each boundary that it asked for, when the model passes it."""

    name: str
    exclusive: bool
    """whether no other thread may run the model during a run"""
    module: "nn.Module"
    """the module that the map's paths start from"""
    root: "nn.Module"
    """the transformers model in it, often the same"""
    runner: "nn.Module"
    """the user's object, which is called to run the model, so that a wrapper around the model takes effect"""

    def generate(self, observer: "Observer", inputs: dict[str, Any], editor: "Editor | None" = None) -> "torch.Tensor":
        """`inputs` are the keyword arguments of transformers' `generate`. Returns its sequences `[batch, tokens]`.

        `editor`: writes at its boundaries. An engine that cannot write raises InterventionError.
        """

    def forward(self, observer: "Observer", inputs: dict[str, Any], editor: "Editor | None" = None) -> None:
        """Run one forward pass with these keyword arguments, as far as the observer needs it."""


def nnsight_engine(module: "nn.Module", root: "nn.Module", given: Any) -> Engine:
    """See `NNsightEngine`. Raises CaptureError where nnsight is missing or its private classes are others."""
    try:
        from hookmap.capture.engines.nnsight import NNsightEngine  # imported here: it takes a second or two
    except (ImportError, AttributeError) as error:
        raise CaptureError(
            f"the nnsight engine does not run with the nnsight that is installed ({error}). Expected nnsight 0.8: "
            'pip install "nnsight>=0.8.1,<0.9"; or open the bare torch module, for engine="hooks".'
        ) from error
    return NNsightEngine(module, root, given)
