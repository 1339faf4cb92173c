"""A model without weights: from a hub id, a folder, a config or a module to something that can run one forward pass."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookmap.errors import DiscoveryError, ModelError
from hookmap.loading import hub

log = logging.getLogger("hookmap")

# Settings that leave the structure alone: they differ between copies of one model.
_VOLATILE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "attn_implementation",
    "use_cache", "is_decoder", "output_attentions", "output_hidden_states", "return_dict", "architectures",
    "id2label", "label2id",
    "bos_token_id", "eos_token_id", "pad_token_id", "problem_type", "chunk_size_feed_forward", "_commit_hash",
    "auto_map", "quantization_config",
}  # fmt: skip
_SEQUENCES = (13, 11, 17, 19, 23, 29, 31, 37, 7)


def load_config(source: str | Path, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The transformers config of a hub id or a local folder. Raises ModelError, with what was tried."""
    from transformers import AutoConfig

    hub.check_source(source)
    arguments = {"trust_remote_code": trust_remote_code, "revision": revision, **hub.source_arguments(source)}
    try:
        with hub.quiet():
            return AutoConfig.from_pretrained(source, **arguments)
    except Exception as error:  # a missing file, a gate, a broken file, code that is not trusted: each its own class
        raise ModelError(f"cannot load the model {str(source)!r}: {hub.explain(error, source)}") from error


def build(
    config: Any, device: str = "meta", dtype: torch.dtype = torch.bfloat16, trust_remote_code: bool = False
) -> nn.Module:
    """The language model of a config, in eager attention; on the meta device no weight is allocated."""
    maker = model_class(config)
    try:
        config = type(config).from_dict(config.to_dict()) if hasattr(config, "to_dict") else config
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        with torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if hasattr(maker, "from_config"):
                settings = {"trust_remote_code": trust_remote_code}
                model: nn.Module = maker.from_config(config, attn_implementation="eager", dtype=dtype, **settings)
            else:
                model = maker._from_config(config, attn_implementation="eager", dtype=dtype)
    except Exception as error:
        said = str(error).partition("\nModel type should be one of")[0]  # what follows lists some 200 configs
        raise ModelError(
            f"transformers cannot build {type(config).__name__}: {type(error).__name__}: {said}"
        ) from error
    return model.eval()


def model_class(config: Any) -> Any:
    """The class of transformers that builds and loads the language model of a config.

    A causal language model; or the whole of one that reads images or sounds too, where there is no other, or where
    the config says that the checkpoint is of the whole. A decoder's config that AutoModel knows only as a part of
    another model's (Musicgen) names its class itself. Raises ModelError where the config is of neither, or where it
    names a class that reads text otherwise: an encoder-decoder, or one that sees both sides of a masked token.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = type(config)
    if _is_whole(config):
        return AutoModelForMultimodalLM
    if found := _class_of_decoder(config):
        return found
    own_code = getattr(config, "auto_map", None) or {}
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and not {"AutoModelForCausalLM", "AutoModel"} & set(own_code):
        reads = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "no causal language model"
        name = ", ".join(getattr(config, "architectures", None) or ()) or kind.__name__
        raise ModelError(
            f"{name} ({getattr(config, 'model_type', '?')}) is {reads}: transformers has no causal language model of "
            "this kind, and hookmap reads those alone. Give one, such as AutoModelForCausalLM loads; what hookmap "
            "knows of: hookmap maps list"
        )
    _refuse_another_reading(config)
    return AutoModelForCausalLM


def _is_whole(config: Any) -> bool:
    """Whether it is of a model that reads images or sounds too, and of all of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    kind = type(config)
    if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return False
    named = config.architectures or ()
    return kind not in MODEL_FOR_CAUSAL_LM_MAPPING or MODEL_FOR_MULTIMODAL_LM_MAPPING[kind].__name__ in named


def _refuse_another_reading(config: Any) -> None:
    from transformers.models.auto import modeling_auto as auto

    named, built = other_class(config)
    names = {
        "an encoder-decoder": (
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        ),
        "a masked language model, which sees the tokens on both sides": (
            auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
            auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
        ),
    }
    for reading, mappings in names.items():
        if any(name in mapping.values() for name in named for mapping in mappings):
            raise ModelError(
                f"the config is of {', '.join(named)}, {reading}; hookmap would build {built}, another model. If that "
                f"one is meant, load it yourself: hookmap.open({built}.from_pretrained(...)); of a config, set "
                f'config.architectures = ["{built}"]'
            )


def other_class(config: Any) -> tuple[tuple[str, ...], str]:
    """The classes that a config says its checkpoint is of, and the one that is built, where that is none of them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    named = tuple(getattr(config, "architectures", None) or ())
    own_code = getattr(config, "auto_map", None)
    if own_code or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or _is_whole(config):
        return (), ""
    built: str = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    return ((), built) if built in named else (named, built)


def say_another_class(config: Any, source: Any) -> None:
    """A line in the log where the class that is built is none that the config names."""
    named, built = other_class(config)
    if named:
        log.warning("%s is of %s; hookmap reads it as %s.", source or "the config", ", ".join(named), built)


def _class_of_decoder(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    where = type(config).__module__
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or not where.startswith("transformers.models."):
        return None
    modeling = importlib.import_module(where.replace(".configuration_", ".modeling_"))
    found = (vars(modeling).get(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return next((each for each in found if each is not None and each.config_class is type(config)), None)


def unwrap(source: Any) -> nn.Module:
    """The torch module inside an nnsight model or `torch.compile`'s wrapper, which answers to its paths, or itself."""
    inner = getattr(source, "_module", None)
    if isinstance(inner, nn.Module) and type(source).__module__.startswith("nnsight"):
        source = inner
    if isinstance(source, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise DiscoveryError(
            f"a {type(source).__name__} runs copies of its model, which no hook of its own reaches: give its .module."
        )
    if isinstance(source, nn.Module):
        compiled = source._modules.get("_orig_mod")
        return source if compiled is None else compiled
    raise DiscoveryError(
        f"cannot discover a {type(source).__name__}: expected a hub id, a local folder, a transformers config, "
        "a torch module or an nnsight model."
    )


def architecture_of(model: nn.Module) -> str:
    """The class of the transformers model, also inside a wrapper (PEFT); of a module that holds none, its own."""
    from transformers import PreTrainedModel

    return type(next((each for each in model.modules() if isinstance(each, PreTrainedModel)), model)).__name__


def sequence_length(config: Any, model: nn.Module | None = None) -> int:
    """An odd length that divides no size in the config, so that the axis of positions can be told by its length.

    Where there is a model, it divides no size of a weight either: a module need not have a config.
    """
    sizes = set(_numbers(config.to_dict() if hasattr(config, "to_dict") else {}))
    sizes |= {size for weight in (model.parameters() if model is not None else ()) for size in weight.shape}
    limit = getattr(config, "max_position_embeddings", None) or 10**9
    fits = [n for n in _SEQUENCES if n <= limit] or [_SEQUENCES[0]]
    unequal = [n for n in fits if n not in sizes]
    return next((n for n in unequal if all(size % n for size in sizes if size)), (unequal or fits)[0])


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, (list, tuple)) and len(value) < 64:
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int):
        yield value


def rows_per_sequence(config: Any) -> int:
    """Rows of ids that make one sequence: several where a model of audio reads a row for each codebook (Musicgen)."""
    return int(getattr(config, "num_codebooks", None) or 1)


def inputs(device: Any, seq: int, rows: int = 1) -> dict[str, Any]:
    """What a forward pass is given: one sequence of ones, nothing masked, no cache."""
    ids = torch.ones((rows, seq), dtype=torch.long, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def accepted(model: nn.Module, given: Iterable[str]) -> dict[str, str]:
    """Which of the inputs `forward` takes, and by which name: the ids go to its first parameter if none is theirs."""
    # Of the class: nnsight, accelerate and torch.compile put functions of their own on the object.
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    others = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {name: name for name in given if others or name in named}
    if "input_ids" not in named and named:
        names["input_ids"] = named[0]
    return names


def device_of(model: nn.Module) -> torch.device:
    """Where a forward pass computes. Weights that accelerate keeps elsewhere until needed say nothing of it."""
    for module in model.modules():
        device = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, not compiled, with the eager attention implementation, and afterwards as it was."""
    training = {module: module.training for module in model.modules()}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    attention = {key: getattr(c, "_attn_implementation", None) for key, c in configs.items()}
    model.eval()
    for config in configs.values():
        if getattr(config, "_attn_implementation", None) is not None:
            config._attn_implementation = "eager"
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for key, config in configs.items():
            if attention[key] is not None:
                config._attn_implementation = attention[key]


def config_hash(config: dict[str, Any]) -> str:
    """sha256 of what in a config decides the structure, as `config.to_dict()` gives it."""
    text = json.dumps(_structural(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _structural(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _structural(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _VOLATILE and value is not None
    }
