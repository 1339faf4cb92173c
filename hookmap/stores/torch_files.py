"""Reads files that torch.save wrote, by PyTorch's restricted unpickler: no code in such a file runs."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from hookmap.errors import StoreError


def read_torch_file(path: Path, advice: str) -> Any:
    """The tensors and plain containers of a file. `advice`: what to do with one that holds anything else.

    Raises StoreError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle's protocol: what is refused is told below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise StoreError(f"{path} is not there.") from error
    except pickle.UnpicklingError as error:
        what = str(error).split("GLOBAL ")[-1].split(" ")[0] if "GLOBAL" in str(error) else "an unknown instruction"
        raise StoreError(
            f"{path} holds more than tensors ({what}): it could run any program when it is loaded, and was not. "
            f"{advice}"
        ) from error
    except Exception as error:  # torch's, zip's and the disk's
        first = str(error).strip().partition("\n")[0]
        raise StoreError(f"{path} cannot be read as a file of torch.save: {first}") from error
