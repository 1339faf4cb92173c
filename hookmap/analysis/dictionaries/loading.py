"""`hookmap.load_dictionary`: from a folder or a hub id to a `Dictionary`. No pickle runs."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hookmap.analysis.dictionaries import cross_layer, formats
from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.documents import read_json
from hookmap.errors import SelectionError, StoreError
from hookmap.loading.hub import explain, quiet, reachable
from hookmap.loading.yaml_file import read_yaml
from hookmap.maps.points import parse_point
from hookmap.stores.torch_files import read_torch_file

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
"""SAELens's"""
CONFIG_PLAIN, PICKLED, GEMMA_SCOPE = "config.json", "ae.pt", "params.npz"
CROSS_LAYER = "config.yaml"
ENCODER, DECODER = "W_enc_{}.safetensors", "W_dec_{}.safetensors"
"""circuit-tracer's cross-layer transcoders, for each layer"""
MOST_LAYERS = 512
"""of a transcoder whose other layers are not fetched"""
_KNOWN = (
    f"{CONFIG} with {WEIGHTS} (SAELens), {CONFIG_PLAIN} with {PICKLED} (dictionary_learning), {CONFIG_PLAIN} with one "
    f"safetensors file, {GEMMA_SCOPE} (Gemma Scope), or {ENCODER.format('N')} with {DECODER.format('N')} "
    "(a cross-layer transcoder of circuit-tracer)"
)


def load_dictionary(
    source: str | os.PathLike[str],
    *,
    folder: str = "",
    point: str | None = None,
    layer: int | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> Dictionary:
    """A sparse autoencoder or transcoder, of SAELens, dictionary_learning, Gemma Scope, circuit-tracer or plain files.

    source: a folder, or a hub id, of which `folder` is the folder in it. point, layer: where it was trained, in place
    of what its files say. dtype: of the weights, float32 unless given. A `.pt` file is read by torch's weights-only
    unpickler: what holds more than tensors is refused, and runs nothing.
    Raises StoreError where the files are missing or broken, SelectionError where they are no dictionary known here.
    """
    path = _fetched(source, folder, revision, layer)
    try:
        found = _read(path, layer)
    except SelectionError as error:
        raise SelectionError(f"{path}: {error}") from error
    found = found.to(dtype=torch.float32 if dtype is None else dtype)
    if point is None and (layer is None or isinstance(found, cross_layer.CrossLayer)):
        return found
    named = parse_point(point if point is not None else found.about.point or "")
    if isinstance(named, str):
        raise SelectionError(f"{named}: say where the dictionary was trained: point=POINT, layer=N.")
    at = layer if layer is not None else named.layer if named.layer is not None else found.about.layer
    return replace(found, about=replace(found.about, point=named.point, layer=at))


def _read(path: Path, layer: int | None) -> Dictionary:
    there = {file.name for file in path.iterdir() if file.is_file()}
    if any(fnmatch(name, ENCODER.format("*")) for name in there):
        return _cross_layer(path, there, layer)
    plain = sorted(name for name in there if name.endswith(".safetensors"))
    if CONFIG in there and WEIGHTS in there:
        return formats.saelens(_config(path / CONFIG), _safetensors(path / WEIGHTS))
    if CONFIG_PLAIN in there and PICKLED in there:
        return formats.dictionary_learning(_config(path / CONFIG_PLAIN), _pickled(path / PICKLED))
    if GEMMA_SCOPE in there:
        return formats.gemma_scope(_arrays(path / GEMMA_SCOPE))
    if CONFIG_PLAIN in there and len(plain) == 1:
        config, tensors = _config(path / CONFIG_PLAIN), _safetensors(path / plain[0])
        read: Callable[..., Dictionary] = formats.dictionary_learning if "trainer" in config else formats.saelens
        return read(config, tensors)
    found = ", ".join(sorted(there)[:8]) or ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise StoreError(f"{path} holds no dictionary: expected {_KNOWN}, found {found}.")


def _cross_layer(path: Path, there: set[str], layer: int | None) -> Dictionary:
    """The features of one layer. Raises StoreError and SelectionError."""
    if layer is None:
        raise SelectionError("a cross-layer transcoder has features of each layer: say of which, layer=N (--layer N).")
    files = [form.format(layer) for form in (ENCODER, DECODER)]
    if missing := [name for name in files if name not in there]:
        raise StoreError(f"{path} has no {' and no '.join(missing)}: give a layer whose files are there.")
    try:
        config = read_yaml(path / CROSS_LAYER) if CROSS_LAYER in there else {}
    except ValueError as error:
        raise StoreError(f"{path / CROSS_LAYER} is broken: {error}. Copy it again.") from error
    if not isinstance(config, dict):
        raise StoreError(f"{path / CROSS_LAYER} is broken: expected names and values, found a {type(config).__name__}.")
    return cross_layer.cross_layer(config, {**_safetensors(path / files[0]), **_safetensors(path / files[1])}, layer)


def _fetched(source: str | os.PathLike[str], folder: str, revision: str | None, layer: int | None) -> Path:
    """The folder on this machine. Raises StoreError."""
    path = Path(source)
    if path.is_dir():
        path = path / folder
        if not path.is_dir():
            raise StoreError(f"there is no folder {path}. Give the folder that holds {_KNOWN}.")
        return path
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        what = "is a file" if path.exists() else "is not there"
        raise StoreError(f"{source} {what}: expected a folder that holds {_KNOWN}, or a hub id, owner/name.")
    import huggingface_hub

    names = (CONFIG, CONFIG_PLAIN, CROSS_LAYER, "*.safetensors", PICKLED, GEMMA_SCOPE)
    patterns = [f"{folder}/{name}" if folder else name for name in names]
    # A cross-layer transcoder may have a terabyte of other layers.
    others = [f"*{form.format(n)}" for form in (ENCODER, DECODER) for n in range(MOST_LAYERS) if n != layer]
    try:
        with quiet():
            root = huggingface_hub.snapshot_download(
                os.fspath(source),
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=others,
                local_files_only=not reachable(),
            )
    except Exception as error:  # the hub's client has errors of several libraries
        raise StoreError(f"cannot load the dictionary {source}: {explain(error, os.fspath(source))}") from error
    return _fetched(root, folder, None, layer)


def _config(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is broken: expected JSON: {error}. Copy it again.") from error
    if not isinstance(found, dict):
        raise StoreError(f"{path} is broken: expected a JSON object, found a {type(found).__name__}.")
    return found


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is broken: {error}. Copy it again.") from error


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a `.pt` file. Raises StoreError."""
    found = read_torch_file(path, "Give the weights as safetensors.")
    if not isinstance(found, Mapping) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise StoreError(f"{path}: expected tensors by name, found a {type(found).__name__}.")
    return dict(found)


def _arrays(path: Path) -> dict[str, torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as held:
            return {name: torch.from_numpy(held[name]) for name in held.files}
    except Exception as error:  # numpy's, zip's, and for arrays of objects
        raise StoreError(f"{path} is not loaded: {error}. Copy it again.") from error


@dataclass(frozen=True, eq=False, repr=False)
class Foreign(Dictionary):
    """A dictionary of another library, known by its `encode` and `decode` alone. It stays on its own device."""

    theirs: Any = None

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.theirs.encode(self._checked(rows))
        return found

    def decode(self, features: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = self.theirs.decode(features)
        return found


@torch.no_grad()
def as_dictionary(
    given: Any, point: str | None = None, layer: int | None = None, width: int | None = None
) -> Dictionary:
    """A dictionary as it is, or an object of another library with `encode` and `decode`, such as SAELens's SAE.

    point, layer: where it was trained; a hook's name at the object's `cfg.metadata.hook_name` is read, too. width: of
    the rows, where the object does not say (`d_in`, `activation_dim`). Raises SelectionError.
    """
    if isinstance(given, Dictionary):
        return given
    if not callable(getattr(given, "encode", None)) or not callable(getattr(given, "decode", None)):
        raise SelectionError(
            f"expected a dictionary, or an object with encode and decode, got a {type(given).__name__}."
        )
    cfg = getattr(given, "cfg", None)
    meta = getattr(cfg, "metadata", cfg)
    if point is None:
        point, layer = formats.place_of_hook(getattr(meta, "hook_name", None), getattr(meta, "hook_layer", None))
    d_in = width or next(
        (n for each in (cfg, given) for n in (getattr(each, "d_in", None), getattr(each, "activation_dim", None)) if n),
        None,
    )
    if d_in is None:
        raise SelectionError("the object does not say how wide the rows are that it reads: give width=N.")
    zero = torch.zeros(1, int(d_in))
    weight = next(iter(given.parameters()), zero) if hasattr(given, "parameters") else zero
    features = given.encode(zero.to(weight.device, weight.dtype))
    # The decoder's vectors are what one unit of each feature adds: a decoder is affine.
    bias = given.decode(torch.zeros_like(features))
    eye = torch.eye(features.shape[-1], device=weight.device, dtype=weight.dtype)
    decoder = torch.cat([given.decode(part) for part in torch.split(eye, 256)]) - bias
    about = About(
        point, layer, model=getattr(meta, "model_name", None), program=type(given).__module__.partition(".")[0]
    )
    about = replace(about, kind=type(given).__name__, prepend_bos=getattr(meta, "prepend_bos", None))
    count = features.shape[-1]
    return Foreign(
        torch.zeros(int(d_in), count, device=weight.device, dtype=weight.dtype),
        decoder,
        torch.zeros(count, device=weight.device),
        bias[0],
        about=about,
        theirs=given,
    )
