"""Makes capture folders of files that torch.save wrote. Only tensors are read; no code in such a file runs."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hookmap.activations import Activation, Key, Sample, call_of, key_of
from hookmap.errors import StoreError
from hookmap.maps.points import POINTS, PointName, parse_point
from hookmap.stores.folder import FolderWriter
from hookmap.stores.manifest import manifest_of_run
from hookmap.stores.torch_files import read_torch_file

_TRUSTED = "Save its tensors alone, where you trust it: torch.save({name: tensor, …}, FILE)"
_LAYER_FIRST = re.compile(r"^(?:layers?[._]?)?(\d+)[./](.+)$", re.ASCII)
_LAYER_LAST = re.compile(r"^(.+)[./](\d+)$", re.ASCII)
_CALL = re.compile(r"^(.+)\.call(\d+)$", re.ASCII)
_LAYER = re.compile(r"^(?:layers?[._]?)?(\d+)$", re.ASCII)
_ACCEPTED = (
    'expected a dict of tensors with keys "resid_mid.8", "layer_8.resid_mid", "blocks.8.hook_resid_mid" or '
    '("resid_mid", 8), or dicts by layer or point inside; each tensor [tokens, d] or [samples, tokens, d], or a list '
    'of [tokens, d]; with "offsets" [samples + 1] the tensors are all samples, one after the other'
)


def import_pt(
    file: "str | os.PathLike[str]", out: "str | os.PathLike[str]", model: str | None = None
) -> tuple[int, list[str]]:
    """Make a capture folder of a `.pt` file. Returns how many samples it has, and what in the file was left out.

    The file is read with `weights_only=True`: one that holds anything but plain data is refused before any of it runs.
    Its samples have no prompts and tokens. Raises StoreError with all that does not fit.
    """
    loaded = read_torch_file(Path(file), _TRUSTED)
    if not isinstance(loaded, Mapping):
        raise StoreError(f"{file} holds a {type(loaded).__name__}: {_ACCEPTED}.")
    tensors: dict[Key, Any] = {}
    left_out: list[str] = []
    for key, value, name in _entries(loaded, None, ""):
        if key is None:
            left_out.append(name)
        elif key in tensors:
            raise StoreError(f"{file}: {name} is there twice, under two names.")
        else:
            tensors[key] = value
    if not tensors:
        raise StoreError(f"{file} holds no tensor of a known point: {_ACCEPTED}. Found: {', '.join(left_out[:10])}.")
    offsets = loaded.get("offsets")
    samples = {key: _samples(value, offsets) for key, value in tensors.items()}
    lengths = {key: [part.shape[0] for part in parts] for key, parts in samples.items()}
    if len({tuple(found) for found in lengths.values()}) > 1:
        lines = "\n".join(f"  - {key[0]}, layer {key[1]}: rows {found[:8]}" for key, found in lengths.items())
        raise StoreError(f"{file}: its tensors have different numbers of rows:\n{lines}")
    keys = sorted(samples, key=_place)
    rows = lengths[keys[0]]
    with FolderWriter.create(out, manifest_of_run(keys, model=model, settings={"imported": Path(file).name})) as writer:
        for number, count in enumerate(rows):
            for key in keys:
                writer.write(Activation(number, key[0], key[1], 0, samples[key][number], call_of(key)))
            writer.finish(Sample(number, "", "", (), 0, count))
    return len(rows), [name for name in left_out if name != "offsets"]


def _entries(found: Mapping[Any, Any], outer: Any, path: str) -> Iterator[tuple[Key | None, Any, str]]:
    """(key, value, name in the file); the key is None where the entry means no tensor of a point."""
    for name, value in found.items():
        shown = f"{path}{name}"
        if isinstance(value, Mapping) and outer is None:
            yield from _entries(value, name, f"{shown}.")
            continue
        is_rows = isinstance(value, torch.Tensor) or (
            isinstance(value, list | tuple) and len(value) and all(isinstance(one, torch.Tensor) for one in value)
        )
        key = _key(name) if outer is None else _key((outer, name))
        yield (key if is_rows else None), value, shown


def _key(name: Any) -> Key | None:
    """The tensor that a name in the file means, or None."""
    if isinstance(name, tuple) and len(name) == 3 and type(name[2]) is int and (of := _key(name[:2])):
        return key_of(of[0], of[1], name[2])
    if isinstance(name, tuple) and len(name) == 2:
        for point, layer in (name, name[::-1]):
            number = layer if type(layer) is int else _layer(layer)
            if isinstance(point, str) and number is not None and (key := _pair(point, number)):
                return key
        return None
    if not isinstance(name, str):
        return None
    if match := _CALL.match(name):
        of = _key(match[1])
        return None if of is None or of[1] is None else key_of(of[0], of[1], int(match[2]))
    if match := _LAYER_FIRST.match(name):
        return _pair(match[2], int(match[1]))
    if (match := _LAYER_LAST.match(name)) and (key := _pair(match[1], int(match[2]))):
        return key
    return _pair(name, None)


def _layer(name: Any) -> int | None:
    match = _LAYER.match(name) if isinstance(name, str) else None
    return int(match[1]) if match else None


def _pair(point: str, layer: int | None) -> Key | None:
    parsed = parse_point(point)
    if isinstance(parsed, str):
        return None
    layer = parsed.layer if layer is None else layer
    return (parsed.point, layer) if PointName.of(parsed.point).definition.per_layer == (layer is not None) else None


def _place(key: Key) -> tuple[int, int, int]:
    """Layers in order, each with its points in order, of one run after the other."""
    return -1 if key[1] is None else key[1], call_of(key) or 0, [*POINTS, _base(key[0])].index(_base(key[0]))


def _base(point: str) -> str:
    """`attn_out` of `attn_out.1`."""
    return PointName.of(point).base


def _samples(value: Any, offsets: Any) -> list[torch.Tensor]:
    """The rows of each sample, [tokens, d]."""
    if isinstance(value, torch.Tensor) and isinstance(offsets, torch.Tensor):
        ends = [int(end) for end in offsets.flatten()]
        whole = bool(ends) and ends[0] == 0 and ends[-1] == value.shape[0] and ends == sorted(ends)
        if not whole:
            raise StoreError(f"offsets {ends[:5]}… do not divide {value.shape[0]} rows into samples.")
        return [value[start:end] for start, end in itertools.pairwise(ends)]
    parts = list(value) if not isinstance(value, torch.Tensor) or value.ndim > 2 else [value]
    if any(part.ndim < 2 for part in parts):
        raise StoreError(f"a tensor of shape {list(parts[0].shape)} has no rows: {_ACCEPTED}.")
    return parts
