"""Vectors as a user names them -> tensors. Reads safetensors only; nothing is ever unpickled."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hookmap.capture.interventions.documents import VectorFile
from hookmap.errors import InterventionError
from hookmap.placeholders import is_pointer, pointers_told


def read_vector(given: Any) -> torch.Tensor:
    """float32, [d] or [heads, d_head]. Raises InterventionError where the file, the key or a number is not there."""
    vector = _from_file(given) if isinstance(given, VectorFile) else _from_numbers(given)
    if not vector.numel() or not torch.isfinite(vector).all():
        raise InterventionError(f"a vector of {vector.numel()} numbers that are not all finite: expected finite ones.")
    return vector


def _from_numbers(given: Any) -> torch.Tensor:
    try:
        return torch.tensor(given, dtype=torch.float32)
    except ValueError as error:
        raise InterventionError(f"a vector whose rows differ in length: {error}") from error


def _from_file(given: VectorFile) -> torch.Tensor:
    with _opened(Path(given.file)) as tensors:
        names = sorted(tensors.keys())
        if given.key not in names:
            held = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            raise InterventionError(f"{given.file} holds no tensor {given.key!r}: it holds {held or 'none'}.")
        vector: torch.Tensor = tensors.get_tensor(given.key)
    if not vector.is_floating_point() or vector.ndim not in (1, 2):
        raise InterventionError(
            f"{given.file}[{given.key!r}]: expected floating point numbers [d] or [heads, d_head], "
            f"got {vector.dtype} {list(vector.shape)}."
        )
    return vector.float()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise InterventionError(f"{file}: vectors are read from .safetensors files only.")
    if not file.is_file():
        raise InterventionError(f"{file}: there is no such file.")
    if is_pointer(file):
        raise InterventionError(pointers_told(file.parent, [file.name]))
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise InterventionError(f"{file}: is no safetensors file ({error}).") from error
