"""Steering vectors as control vectors: GGUF files that llama.cpp loads and repeng writes.

`direction.N`, float32 [d_model], is added to the output of block N (0-based): resid_post of layer N. llama.cpp has no
direction for block 0. The file's architecture is `controlvector`, `controlvector.model_hint` names the type of model,
and `controlvector.layer_count` is the number of directions, as repeng writes it.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hookmap.analysis.steering import About, SteeringVector, from_file, load_vector
from hookmap.errors import StoreError
from hookmap.extras import needed
from hookmap.placeholders import why_no_file
from hookmap.stores.durable_files import writing

ARCHITECTURE = "controlvector"
POINT = "resid_post"

_OWN = ("method", "model")


def write_gguf(vector: SteeringVector, path: str | Path, model_hint: str | None = None) -> Path:
    """Write a control vector. model_hint: the model's type unless given; llama.cpp only displays it.

    Raises StoreError for points other than resid_post, for layer 0, and where the file cannot be written.
    """
    target, about = Path(path), vector.about
    if about.point != POINT:
        raise StoreError(
            f"{target}: a control vector is added to what leaves a block, {POINT}; this vector is of {about.point}. "
            f"Make one of {POINT}, or keep this as .safetensors."
        )
    if about.call is not None:
        raise StoreError(
            f"{target}: llama.cpp adds a control vector each time that a layer runs; this vector is of call "
            f"{about.call} alone. Keep it as .safetensors."
        )
    if 0 in vector.directions:
        raise StoreError(
            f"{target}: llama.cpp has no direction for block 0, and does not load a file that names one. Make the "
            "vector without layer 0: --layers 1-" + str(max(max(vector.layers), 1))
        )
    writer = _gguf().GGUFWriter(target, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint or about.model_type or "")
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vector.layers))
    for name in _OWN:
        if getattr(about, name):
            writer.add_string(f"hookmap.{name}", getattr(about, name))
    for layer in vector.layers:
        writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector[layer].numpy(), dtype=np.float32))
    with writing(target), contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return target


def read_gguf(path: str | Path) -> SteeringVector:
    """Read the control vector in a GGUF file. Raises StoreError, with what was found, for another file."""
    if not Path(path).is_file():
        raise StoreError(why_no_file(Path(path)))
    try:
        reader = _gguf().GGUFReader(path)
        fields = {name: _text(field) for name, field in reader.fields.items()}
        tensors = {t.name: (t.tensor_type.name, np.array(t.data)) for t in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise StoreError(f"{path} is no GGUF file that can be read ({type(error).__name__}: {error}).") from error
    if fields.get("general.architecture") != ARCHITECTURE:
        raise StoreError(
            f"{path}: expected general.architecture {ARCHITECTURE!r}, found {fields.get('general.architecture')!r}: "
            "this is no control vector."
        )
    directions = {}
    for name, (kind, data) in tensors.items():
        match = re.fullmatch(r"direction\.([0-9]{1,6})", name)
        if match is None or kind != "F32" or data.ndim != 1:
            raise StoreError(
                f"{path}: expected tensors direction.N of F32 [d_model], found {name} of {kind} {list(data.shape)}."
            )
        directions[int(match[1])] = torch.from_numpy(data.astype(np.float32))
    about = About(
        point=POINT,
        method=fields.get("hookmap.method") or "unknown",
        model=fields.get("hookmap.model"),
        model_type=fields.get(f"{ARCHITECTURE}.model_hint") or None,
    )
    return from_file(path, about, directions)


def open_vector(path: str | Path) -> SteeringVector:
    """Read a .gguf or a .safetensors file. Raises what `read_gguf` and `load_vector` raise."""
    return read_gguf(path) if Path(path).suffix == ".gguf" else load_vector(path)


def _text(field: Any) -> str | None:
    """A field's value if it is a text."""
    value = field.contents()
    return value if isinstance(value, str) else None


def _gguf() -> Any:
    return needed("gguf", 'GGUF files need the gguf package: pip install "hookmap[gguf]"', StoreError)
