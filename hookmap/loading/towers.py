"""The part of a model that reads pictures: where it is, how a config of one alone is built, and what it is given."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hookmap.errors import DiscoveryError
from hookmap.loading.encoder_decoder import DECODER_TOKENS, TOKENS
from hookmap.loading.modules import model_inside

_GRID = (2, 22)
"""rows and columns of patches where a tower takes any"""
_MERGED_GRIDS = ((6, 6), (8, 12), _GRID)
"""the same where patches are merged, or stand in windows: the first is within one window"""
_OF_PICTURES = {"image", "video"}


def reads_pictures_alone(model: Any) -> bool:
    """Whether a transformers model, or its class, reads pictures and no text: its `forward` takes no token ids."""
    said = getattr(model, "input_modalities", None) or ()
    found = {said} if isinstance(said, str) else set(said)
    if not found & _OF_PICTURES or not found <= _OF_PICTURES:
        return False
    own = model if isinstance(model, type) else type(model)
    return not {TOKENS, DECODER_TOKENS} & set(inspect.signature(own.forward).parameters)  # type: ignore[attr-defined]


def class_of_tower(config: Any) -> Any:
    """transformers' AutoModel where that gives, for a config, a model that reads pictures alone; else None."""
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    found = MODEL_MAPPING.get(type(config), None)
    return AutoModel if reads_pictures_alone(found[0] if isinstance(found, tuple) else found) else None


def tower_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The path of the part that reads pictures, and the part. Raises DiscoveryError where there is none, or several."""
    inside = model_inside(model)
    if inside is None:
        raise DiscoveryError(f"{type(model).__name__} holds no transformers model, of which a part says what it reads.")
    towers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if (
            is_tower(module)
            and list(given(module))
            and not any(path == known or path.startswith(f"{known}.") or not known for known in towers)
        ):
            towers[path] = module
    if len(towers) != 1 and (own := _encoder(inside)) is not None and list(given(own)):
        towers = {path: module for path, module in model.named_modules() if module is own}
    if len(towers) == 1:
        return next(iter(towers.items()))
    raise DiscoveryError(f"{type(inside).__name__}: {_why_none(model, towers)}.")


def _why_none(model: nn.Module, several: Iterable[str]) -> str:
    if several:
        return f"several parts read pictures: {', '.join(several)}. Discover one of them as a module"
    named = [path or "it" for path, module in model.named_modules() if is_tower(module)]
    if named:
        return f"{named[0]} reads pictures, and its config does not say of what size or in what patches"
    return "no part of it reads pictures alone"


def is_tower(module: nn.Module) -> bool:
    """Whether a module is a transformers model that reads pictures alone."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel) and reads_pictures_alone(module)


def _encoder(model: Any) -> Any:
    """The part that transformers itself calls the model's encoder of images; None where it names none."""
    try:
        found = model.get_encoder(modality="image")
    except (AttributeError, TypeError):  # an older transformers knows of text encoders alone
        return None
    return None if found in (model, getattr(model, "base_model", model)) else found


def given(tower: nn.Module) -> Iterator[dict[str, Any]]:
    """Arguments of the tower's forward pass, of one picture; several where its signature does not say which."""
    names = list(inspect.signature(type(tower).forward).parameters)[1:]
    first = names[0] if names else ""
    config = getattr(tower, "config", None)
    if config is None or first not in ("pixel_values", "hidden_states", "flattened_patches"):
        return
    patches = _patches(config)
    if "grid_thw" in names or "image_grid_thw" in names:
        frames = getattr(config, "temporal_patch_size", None) or 1
        for rows, columns in _MERGED_GRIDS if patches is not None else ():
            grid = torch.tensor([[1, rows, columns]])
            beside = {"grid_thw": grid, "image_grid_thw": grid, "merge_sizes": torch.tensor([1])}
            for shape in _shapes_of_patches(config, rows * columns, frames):
                yield _named(tower, names, {first: shape}, beside)
    elif "spatial_shapes" in names and patches is not None:
        count = _GRID[0] * _GRID[1]
        beside = {"spatial_shapes": torch.tensor([_GRID]), "pixel_attention_mask": torch.ones(1, count).long()}
        yield _named(tower, names, {first: (1, count, patches)}, beside)
    elif first == "flattened_patches" and patches is not None:
        yield _named(tower, names, {first: (1, _GRID[0] * _GRID[1], 2 + patches)}, {})
    else:
        # The config's own size first: Swin fits its windows to a smaller picture, and keeps them so.
        sizes = [_pair(getattr(config, "image_size", None)), _of_grid(getattr(config, "patch_size", None))]
        for height, width in filter(None, sizes):
            yield _named(tower, names, {first: (1, _channels(config), height, width)}, {})


def _shapes_of_patches(config: Any, count: int, frames: int) -> Iterator[tuple[int, ...]]:
    patch = _patches(config) or 0
    for width in dict.fromkeys((patch * frames, patch)):
        yield (count, width)
    if (size := _pair(getattr(config, "patch_size", None))) is not None:
        yield (count, _channels(config), *size)


def _named(tower: nn.Module, names: list[str], shapes: dict[str, tuple[int, ...]], beside: dict[str, Tensor]) -> Any:
    parameter = next(p for p in tower.parameters() if p.dtype.is_floating_point)
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        made[name] = numbers.to(device=parameter.device, dtype=parameter.dtype)
    device = parameter.device
    return {**made, **{name: tensor.to(device) for name, tensor in beside.items() if name in names}}


def _patches(config: Any) -> int | None:
    """Numbers in a patch of one frame."""
    size = _pair(getattr(config, "patch_size", None))
    return None if size is None else _channels(config) * size[0] * size[1]


def _of_grid(patch: Any) -> tuple[int, int] | None:
    """A picture of few patches, whose number no width is likely to have; most towers take one size alone."""
    size = _pair(patch)
    return None if size is None else (_GRID[0] * size[0], _GRID[1] * size[1])


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width, of a field that has one number or both."""
    if isinstance(size, int):
        return size, size
    both = isinstance(size, (list, tuple)) and len(size) == 2
    return (int(size[0]), int(size[1])) if both else None


def _channels(config: Any) -> int:
    names = ("num_channels", "in_channels", "in_chans", "in_channel")
    return next((count for name in names if isinstance(count := getattr(config, name, None), int)), 3)
