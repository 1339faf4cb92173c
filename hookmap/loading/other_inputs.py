"""What a model's `forward` is given besides token ids, where ids alone do not run it: a picture, boxes, other ids.

The names are those that transformers uses for these arguments in all of its models; the sizes are the config's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hookmap.errors import HookmapError
from hookmap.loading.modules import device_of

Result = TypeVar("Result")

_OTHER_IDS = 3
"""as many ids of another text, such as the one that a Q-Former reads: fewer than tokens, so that the two differ"""
_CHOSEN: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def attempts(model: nn.Module, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments besides those given: none; then what else `forward` knows of a text; then pictures too.

    `given` has the ids of the text, [batch, pos].
    """
    yield {}
    if not isinstance(ids := given.get("input_ids"), Tensor):
        return
    names = _parameters(model)
    beside = {name: make(model, ids) for name, make in _BESIDE.items() if name in names}
    beside |= {name: _ones(model, ids) for name in names if name.endswith("_input_ids") and "decoder" not in name}
    if beside:
        yield beside
    for name, images in (("pixel_values", (None, 1)), ("image_embeds", ())) if "pixel_values" in names else ():
        for count in images:
            if (picture := pixels(model, ids, count)) is not None:
                yield {**beside, name: picture}
    if "image_embeds" in names and (width := _size(model, "hidden_size", "embed_dim")):
        yield {**beside, "image_embeds": _numbers(model, (ids.shape[0], 1, width))}


def ran(model: nn.Module, given: Mapping[str, Any], run: Callable[[dict[str, Any]], Result]) -> Result:
    """What `run` gives with the first of the attempts that it runs with; `chosen` gives that attempt from then on.

    Raises what it raised with ids alone where it runs with none, and hookmap's own errors at once.
    """
    first: Exception | None = None
    for number, others in enumerate(attempts(model, given)):
        _CHOSEN[model] = number
        try:
            return run(others)
        except HookmapError:
            raise
        except Exception as error:  # a model's own code raises what it likes
            if first is None:
                first = error
            elif str(error) != str(first):
                shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in others.items())
                first.add_note(f"with {shapes}: {_in_words(error)}")
    _CHOSEN[model] = 0
    raise first or AssertionError


def said(error: Exception) -> str:
    """What a model raised with ids alone, and with each of the other attempts where it raised something else."""
    return "; ".join((_in_words(error), *getattr(error, "__notes__", ())))


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def chosen(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments besides those given that this model ran with before; none where it ran on ids alone."""
    number = _CHOSEN.get(model, 0)
    return next((others for place, others in enumerate(attempts(model, given)) if place == number), {})


def demands_more(model: nn.Module) -> bool:
    """Whether this model did not run on token ids alone."""
    return _CHOSEN.get(model, 0) > 0


def pixels(model: nn.Module, ids: Tensor, images: int | None = None) -> Tensor | None:
    """A picture of noise for each sequence: [batch, channels, height, width], or with `images` behind the batch.

    None where the config has no size of pictures.
    """
    part = _part_with(getattr(model, "config", None), "image_size")
    if part is None:
        return None
    size = part.image_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(part, "num_channels", None) or getattr(part, "in_channels", None) or 3
    return _numbers(model, (ids.shape[0], *(() if images is None else (images,)), channels, height, width))


def _first_only(model: nn.Module, ids: Tensor) -> Tensor:
    """Whether an image stands at each position: at the first."""
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape) == 0


def _ones(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.ones((ids.shape[0], _OTHER_IDS), dtype=torch.long, device=ids.device)


_BESIDE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "bbox": lambda _, ids: torch.zeros((*ids.shape, 4), dtype=torch.long, device=ids.device),
    "image_attention_mask": lambda _, ids: torch.ones((*ids.shape, 1), dtype=torch.long, device=ids.device),
    "image_embeds_position_mask": _first_only,
}


def _parameters(model: nn.Module) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)


def _size(model: nn.Module, *names: str) -> int | None:
    text = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    return next((size for name in names if isinstance(size := getattr(text, name, None), int)), None)


def _part_with(config: Any, name: str) -> Any:
    """The config that has this field: this one, or the first inside it."""
    inner = (getattr(config, each, None) for each in getattr(config, "sub_configs", None) or ())
    return next((each for each in (*inner, config) if getattr(each, name, None) is not None), None)


def _numbers(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The same noise for every call, in the model's precision."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    device = device_of(model)
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
