"""The values of the parameters that a model multiplies its branches by."""

from collections.abc import Callable

import torch

from hookmap.errors import CaptureError
from hookmap.loading.modules import tensor_at


def no_parameters(path: str) -> torch.Tensor:
    """Raises CaptureError: the weights are on another machine."""
    raise CaptureError(
        f"{path} is a parameter that a branch is multiplied by, and the weights of this model are not here: open the "
        "model where its weights are, or choose another point."
    )


def parameters_of(model: torch.nn.Module) -> Callable[[str], torch.Tensor]:
    """What looks a parameter or a buffer up by its path; it raises CaptureError where there is none with data."""

    def parameter_at(path: str) -> torch.Tensor:
        owner, _, name = path.rpartition(".")
        try:
            found = tensor_at(model, path)
        except AttributeError as error:
            raise CaptureError(
                f"{type(model).__name__} has no parameter {path!r}: the map is another model's: run `hookmap discover`."
            ) from error
        own = model.get_submodule(owner)
        if not any(name in kept for kept in (own._parameters, own._buffers, getattr(own, "parametrizations", {}))):
            raise CaptureError(
                f"{path}: a {type(own).__name__} stands there now, which computes with more than this parameter (an "
                "adapter). Merge it, or discover the model as it is now: `hookmap.open` it again."
            )
        if found.is_meta:
            no_parameters(path)
        return found

    return parameter_at
