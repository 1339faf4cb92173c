"""Encoder-decoders: which argument holds the decoder's tokens, and what an encoder can be given where no prompt is.

The decoder is what hookmap maps: its tokens are the rows. The encoder's input is one more argument of the model.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hookmap.errors import ModelError
from hookmap.loading.modules import model_inside

TOKENS, DECODER_TOKENS = "input_ids", "decoder_input_ids"
_FEATURES = ("num_mel_bins", "feature_projection_input_dim", "n_mels", "input_feat_per_channel", "hidden_size")
"""fields of a config that say how many numbers an encoder of sounds reads of each frame"""
_FRAMES, _SAMPLES = 64, 4000
_PATCHES, _PLACE = "flattened_patches", 2
"""patches with their row and their column, whole numbers, in front of their own"""
_taken: weakref.WeakKeyDictionary[nn.Module, tuple[int, ...]] = weakref.WeakKeyDictionary()
"""model -> the shape that its encoder takes, once it took one"""


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's decoder reads tokens of its own, beside what its encoder reads."""
    inside = model_inside(model)
    if inside is None or not getattr(inside.config, "is_encoder_decoder", False):
        return False
    return DECODER_TOKENS in inspect.signature(type(inside).forward).parameters


def tokens_argument(model: nn.Module) -> str:
    """The argument of the model that holds the tokens whose rows a map is of."""
    return DECODER_TOKENS if is_encoder_decoder(model) else TOKENS


def encoder_argument(model: nn.Module) -> str:
    """The argument that an encoder-decoder's encoder reads: `input_ids`, `input_features`, `pixel_values`, …"""
    inside = model_inside(model)
    parameters = list(inspect.signature(type(inside).forward).parameters)
    mains = (getattr(part, "main_input_name", None) for part in (inside.get_encoder(), inside))
    return next((str(main) for main in mains if main in parameters), parameters[1])


def start_token(model: nn.Module) -> int:
    """The token that the decoder begins with. Raises ModelError where the model names none."""
    inside = model_inside(model)
    text = inside.config.get_text_config(decoder=True)
    for each in (getattr(inside, "generation_config", None), inside.config, text):
        for name in ("decoder_start_token_id", "bos_token_id"):
            found = getattr(each, name, None)
            if isinstance(found, list):
                found = found[0] if found else None
            if found is not None:
                return int(found)
    raise ModelError(
        f"{type(inside).__name__} names no token that its decoder begins with: set "
        "model.generation_config.decoder_start_token_id, or give decoder_token_ids with each prompt."
    )


def with_source(model: nn.Module, inputs: dict[str, Any], draw: torch.Generator | None = None) -> dict[str, Any]:
    """The arguments of a pass over `inputs["input_ids"]`; an encoder-decoder's encoder is given something to read.

    For passes that have no prompt: the tokens are the decoder's then. `draw`: what it reads is random; else all ones.
    """
    if not is_encoder_decoder(model) or DECODER_TOKENS in inputs:
        return inputs
    ids = inputs[TOKENS]
    given = {name: value for name, value in inputs.items() if name not in (TOKENS, "attention_mask")}
    return {DECODER_TOKENS: ids, **given, **source(model, len(ids), ids.shape[1], ids.device, draw)}


def source(
    model: nn.Module, rows: int, tokens: int, device: torch.device, draw: torch.Generator | None = None
) -> dict[str, Any]:
    """Something for an encoder to read, another number of positions than `tokens`.

    Raises ModelError where it reads what hookmap cannot make.
    """
    name = encoder_argument(model)
    if name == TOKENS:
        size = encoder_vocabulary(model)
        ids = torch.ones((rows, tokens + 2), dtype=torch.long)
        if draw is not None:
            ids = torch.randint(min(5, size - 1), size, ids.shape, generator=draw)
        return {TOKENS: ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    tried: list[str] = []
    inside = model_inside(model)
    for shape in (_taken[inside],) if inside in _taken else _shapes(model, name):
        values = torch.ones((rows, *shape)) if draw is None else torch.randn((rows, *shape), generator=draw)
        if name == _PATCHES:
            values[..., :_PLACE] = 1
        parameter = next(model.parameters())
        given = {name: values.to(device=device, dtype=parameter.dtype)}
        if inside in _taken or (said := _refusal(model, given)) is None:
            _taken[inside] = shape
            return given
        tried.append(f"{list(shape)}: {said}")
    said = (
        f"the encoder of {type(inside).__name__} reads {name}, of which hookmap could make none that it "
        f"takes: {'; '.join(tried) or 'no shape follows from its config'}"
    )
    # Without data, an encoder may fail for that reason alone: a narrow copy has data.
    raise RuntimeError(said) if device.type == "meta" else ModelError(said)


def encoder_vocabulary(model: nn.Module) -> int:
    """How many token ids the encoder of an encoder-decoder knows."""
    inside = model_inside(model)
    encoder = inside.get_encoder()
    tables = (module for module in encoder.modules() if isinstance(module, nn.Embedding))
    embedding = _embedding(encoder) or next(tables, None) or inside.get_input_embeddings()
    return len(next(embedding.parameters()))


def embedding_of_tokens(model: nn.Module) -> Any:
    """The embedding of the tokens whose rows a map is of: an encoder-decoder's decoder may have its own."""
    own = decoder_embedding(model) if is_encoder_decoder(model) else None
    return model_inside(model).get_input_embeddings() if own is None else own


def decoder_embedding(model: nn.Module) -> nn.Module | None:
    """The embedding that an encoder-decoder's decoder itself names."""
    return _embedding(model_inside(model).get_decoder())


def _embedding(part: Any) -> nn.Module | None:
    """A part's input embedding; None where it names none with weights."""
    try:
        found = part.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(getattr(found, "weight", None), torch.Tensor) else None


def _refusal(model: nn.Module, given: dict[str, Any]) -> str | None:
    """What the encoder says of an input that it does not take; None where it takes it."""
    try:
        with torch.no_grad():
            model_inside(model).get_encoder()(**given)
    except Exception as error:  # the model's own code
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return None


def widths_of_frames(model: nn.Module) -> list[int]:
    """How many numbers an encoder of sounds may read of each frame, as the fields of the configs say."""
    configs = configs_in(model_inside(model).config)
    sizes = (getattr(each, field, None) for field in _FEATURES for each in configs)
    return list(dict.fromkeys(size for size in sizes if isinstance(size, int)))


def _shapes(model: nn.Module, name: str) -> Iterator[tuple[int, ...]]:
    """Shapes that an encoder of sounds or of images may read, without the batch."""
    configs = configs_in(model_inside(model).config)
    if name == "pixel_values":
        for config in configs:
            size = getattr(config, "image_size", None)
            if size is not None:
                yield (getattr(config, "num_channels", 3), *(size if isinstance(size, (list, tuple)) else (size, size)))
    elif name == _PATCHES:
        yield from ((_FRAMES, _PLACE + n) for each in configs if (n := getattr(each, "patch_embed_hidden_size", None)))
    elif name == "input_features":
        frames = [n for each in configs if (n := getattr(each, "max_source_positions", None))]
        for width in widths_of_frames(model):
            yield from ((width, 2 * most) for most in frames if most <= 1500)
            yield (_FRAMES, width)
            yield (width, _FRAMES)
    elif name in ("input_values", "inputs"):
        yield (_SAMPLES,)
        yield (4 * _SAMPLES,)


def configs_in(config: Any) -> list[Any]:
    """A config and all that are in it."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return [config, *(each for part in inner for each in configs_in(part))]
