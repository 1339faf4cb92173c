"""Reads the vectors that interventions name, as numbers or safetensors files. Nothing is ever unpickled."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hookmap.capture.interventions.documents import VectorFile
from hookmap.errors import InterventionError
from hookmap.placeholders import is_pointer, pointers_told


def read_vector(given: Any) -> torch.Tensor:
    """float32, [d] or [heads, d_head]. Raises InterventionError where the file or the key is missing, and for nan."""
    vector = _from_file(given) if isinstance(given, VectorFile) else _from_numbers(given)
    if not vector.numel() or not torch.isfinite(vector).all():
        raise InterventionError(f"a vector of {vector.numel()} numbers that are not all finite: expected finite ones.")
    return vector


def row_vector(given: Any, row: tuple[int, ...]) -> torch.Tensor:
    """The vector in the shape of a row, or of a row's last axis. Raises InterventionError for another size."""
    vector = read_vector(given)
    if tuple(vector.shape) in (row, row[-1:]):
        return vector
    if vector.ndim == 1 and vector.numel() == math.prod(row):
        return vector.reshape(row)
    raise InterventionError(f"a vector of {list(vector.shape)}: expected {list(row)}, a row there.")


def unit_vector(given: Any, row: tuple[int, ...]) -> torch.Tensor:
    """The vector divided by its length, float32. Raises InterventionError where the length is 0."""
    vector = row_vector(given, row)
    length = vector.norm(dim=-1, keepdim=True)
    if not bool(((length > 0) & length.isfinite()).all()):  # the squares left the range of float32
        vector = vector.double()
        length = vector.norm(dim=-1, keepdim=True)
    if not bool((length > 0).all()):
        raise InterventionError("a direction of length 0: expected one that points somewhere.")
    unit: torch.Tensor = vector / length
    return unit.float()


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
