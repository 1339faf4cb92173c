"""What a model's `forward` is given besides token ids, where ids alone do not run it: a picture, sounds, boxes, codes.

The names are those that transformers uses for these arguments in all of its models; the sizes are the config's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hookmap.errors import HookmapError
from hookmap.loading.encoder_decoder import TOKENS, configs_in, tokens_argument, widths_of_frames
from hookmap.loading.modules import device_of

Result = TypeVar("Result")

_OTHER_IDS = 3
"""as many ids of another text, such as the one that a Q-Former reads: fewer than tokens, so that the two differ"""
_CODES = ("num_codebooks", "num_channels")
_VOCABULARIES = ("vocab_size", "codebook_vocab_size")
_CHOSEN: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def attempts(model: nn.Module, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments besides those given: none; what else `forward` knows of a text; pictures; sounds; ids of several codes.

    `given` has the ids of the text, [batch, pos].
    """
    yield {}
    tokens = tokens_argument(model)
    ids = given.get(TOKENS, given.get(tokens))
    if not isinstance(ids, Tensor):
        return
    names = _parameters(model)
    beside = {name: make(model, ids) for name, make in _BESIDE.items() if name in names}
    beside |= {name: _ones(model, ids) for name in names if name.endswith("_input_ids") and "decoder" not in name}
    beside |= dict(_demanded(model, ids))
    if beside:
        yield beside
    for seen in _pictures(model, ids, names):
        yield {**beside, **seen}
    if "input_features" in names:
        for heard in _sounds(model, ids):
            yield {**beside, "input_features": heard}
    for codes in _codes(model, given.get(tokens, ids)):
        yield {**beside, tokens: codes}


def _pictures(model: nn.Module, ids: Tensor, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """One picture for each sequence, or one of several, with its mask; or what an encoder makes of one."""
    for name, images in (("pixel_values", (None, 1)), ("image_embeds", ())) if "pixel_values" in names else ():
        for count in images:
            if (picture := pixels(model, ids, count)) is None:
                continue
            yield {name: picture}
            if count is not None and (mask := "pixel_attention_mask") in names:
                yield {name: picture, mask: torch.ones(picture.shape[:2], dtype=torch.bool, device=ids.device)}
    if "image_embeds" in names and (width := _size(model, "hidden_size", "embed_dim")):
        yield {"image_embeds": _numbers(model, (ids.shape[0], 1, width))}


def _demanded(model: nn.Module, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A vector for each argument that has no default and whose size the config says: `max_state_dim` of `state`."""
    for name, parameter in list(inspect.signature(type(model).forward).parameters.items())[1:]:
        plain = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if plain and parameter.default is parameter.empty:
            for field in (f"max_{name}_dim", f"{name}_dim", f"{name}_size"):
                if isinstance(size := getattr(getattr(model, "config", None), field, None), int):
                    yield name, _numbers(model, (ids.shape[0], size))
                    break


def _sounds(model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """Frames of sound, [batch, features, frames], as many as belong to the tokens: so many for each of them."""
    for config in _configs(model):
        for field, count in vars(config).items():
            if field.endswith(("_per_tok", "_per_token")) and isinstance(count, int) and "expert" not in field:
                for width in widths_of_frames(model):
                    yield _numbers(model, (ids.shape[0], width, count * ids.shape[1]))


def _codes(model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """Ids of several codebooks at each position, [batch, pos, codes], also with a token of text beside them."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    sizes = [n for f in _VOCABULARIES if isinstance(n := getattr(text, f, None), int)]
    for count in dict.fromkeys(n for f in _CODES if isinstance(n := getattr(text, f, None), int)):
        for codes in (count, count + 1) if sizes else ():
            yield (ids % min(sizes))[..., None].expand(*ids.shape, codes).contiguous()


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
    configs = _configs(model)
    part = next((each for each in (*configs[1:], *configs[:1]) if getattr(each, "image_size", None) is not None), None)
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


def _configs(model: nn.Module) -> list[Any]:
    """The model's config and all that are in it; none where it has none."""
    config = getattr(model, "config", None)
    return configs_in(config) if hasattr(config, "to_dict") else []


def _numbers(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The same noise for every call, in the model's precision."""
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    device = device_of(model)
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
