"""Reads the vectors that interventions name, as numbers or safetensors files. Nothing is ever unpickled."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hookmap.capture.interventions.documents import VectorFile
from hookmap.errors import InterventionError
from hookmap.placeholders import is_pointer, pointers_told, why_no_file


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


def read_rows(given: Any, row: tuple[int, ...]) -> torch.Tensor:
    """float32, [n, *row]: one row, or several. Raises InterventionError for another size, or numbers not finite."""
    rows = _from_file(given, None) if isinstance(given, VectorFile) else _from_numbers(given)
    size = math.prod(row)
    flat = {(size,): (1,), row: (1,), (*rows.shape[:1], size): rows.shape[:1], (*rows.shape[:1], *row): rows.shape[:1]}
    if tuple(rows.shape) not in flat or not rows.numel():
        raise InterventionError(
            f"a tensor of {list(rows.shape)}: expected {list(row)}, a row there, or one for each token, [n, …]."
        )
    if not torch.isfinite(rows).all():
        raise InterventionError("a tensor with an infinity or nan: expected finite numbers.")
    return rows.reshape(*flat[tuple(rows.shape)], *row)


def low_rank(down: Any, up: Any, row: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A map of rank k, float32: [k, d] and [d, k]. Raises InterventionError where they do not fit."""
    found = [_from_file(m) if isinstance(m, VectorFile) else _from_numbers(m) for m in (down, up)]
    first, second = found
    fits = all(m.ndim == 2 and bool(m.isfinite().all()) for m in found) and first.shape == second.T.shape
    if not fits or first.shape[1] not in (row[-1], math.prod(row)):
        widths = " or ".join(map(str, dict.fromkeys((row[-1], math.prod(row)))))
        raise InterventionError(
            f"down {list(first.shape)} and up {list(second.shape)}: expected finite numbers [k, {widths}] and "
            f"[{widths}, k]."
        )
    return first, second


def _from_numbers(given: Any) -> torch.Tensor:
    try:
        return torch.tensor(given, dtype=torch.float32)
    except ValueError as error:
        raise InterventionError(f"a vector whose rows differ in length: {error}") from error


def _from_file(given: VectorFile, axes: tuple[int, ...] | None = (1, 2)) -> torch.Tensor:
    """`axes`: how many the tensor may have; None for any number."""
    with _opened(Path(given.file)) as tensors:
        names = sorted(tensors.keys())
        if given.key not in names:
            held = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            raise InterventionError(f"{given.file} holds no tensor {given.key!r}: it holds {held or 'none'}.")
        vector: torch.Tensor = tensors.get_tensor(given.key)
    if not vector.is_floating_point() or vector.ndim not in (axes or (vector.ndim,)):
        shapes = "" if axes is None else " [d] or [heads, d_head]"
        raise InterventionError(
            f"{given.file}[{given.key!r}]: expected floating point numbers{shapes}, got {vector.dtype} "
            f"{list(vector.shape)}."
        )
    return vector.float()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        raise InterventionError(f"{file}: vectors are read from .safetensors files only.")
    if not file.is_file():
        raise InterventionError(why_no_file(file))
    if is_pointer(file):
        raise InterventionError(pointers_told(file.parent, [file.name]))
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise InterventionError(f"{file}: is no safetensors file ({error}).") from error
