"""The config of a hub id or a folder, and the model that a config describes, usually without weights."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import logging
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookmap.errors import ModelError
from hookmap.loading import hub
from hookmap.loading.towers import class_of_tower
from hookmap.placeholders import is_gguf

log = logging.getLogger("hookmap")

# Settings that leave the structure alone: they differ between copies of one model.
_VOLATILE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "attn_implementation",
    "use_cache", "is_decoder", "output_attentions", "output_hidden_states", "return_dict", "architectures",
    "id2label", "label2id",
    "bos_token_id", "eos_token_id", "pad_token_id", "problem_type", "chunk_size_feed_forward", "_commit_hash",
    "auto_map", "quantization_config",
}  # fmt: skip


def load_config(source: str | Path, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The transformers config of a hub id or a local folder. Raises ModelError, with what was tried."""
    hub.check_source(source)
    try:
        if is_gguf(source) and Path(source).exists():
            file = Path(source).absolute()
            return copy.deepcopy(_of_gguf(file, file.stat().st_mtime_ns, file.stat().st_size))
        return _read(source, trust_remote_code=trust_remote_code, revision=revision)
    except Exception as error:  # a missing file, a gate, a broken file, code that is not trusted: each its own class
        raise ModelError(f"cannot load the model {str(source)!r}: {hub.explain(error, source)}") from error


@lru_cache(maxsize=2)
def _of_gguf(file: Path, changed: int, size: int) -> Any:
    """Kept, as transformers takes seconds to read it: opening a model asks for it more than once."""
    return _read(file)


def _read(source: str | Path, **options: Any) -> Any:
    from transformers import AutoConfig

    where, arguments = hub.for_transformers(source)
    with hub.quiet():
        return AutoConfig.from_pretrained(where, **options, **arguments)


def build(
    config: Any, device: str = "meta", dtype: torch.dtype = torch.bfloat16, trust_remote_code: bool = False
) -> nn.Module:
    """The language model of a config, or the model that reads pictures alone, in eager attention.

    On the meta device no weight is allocated.
    """
    maker = class_of_tower(config) or model_class(config)
    try:
        config = type(config).from_dict(config.to_dict()) if hasattr(config, "to_dict") else config
        if hasattr(config, "is_decoder") and _is_causal(maker):
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

    The class that the config names, where transformers has it and it is of this config. Else a causal language model;
    or the whole of one that reads images or sounds too, where there is no other; or an encoder-decoder; or a masked
    language model. A decoder's config that AutoModel knows only as a part of another model's (Musicgen) names its class
    itself. Raises ModelError where the config is of none.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind = type(config)
    if (named := _class_named(config)) is not None:
        return named
    if _is_whole(config):
        return transformers.AutoModelForMultimodalLM
    if found := _class_of_decoder(config):
        return found
    own_code = getattr(config, "auto_map", None) or {}
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING or {"AutoModelForCausalLM", "AutoModel"} & set(own_code):
        return transformers.AutoModelForCausalLM
    for mapping, maker in (
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.AutoModelForSeq2SeqLM),
        (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, transformers.AutoModelForSpeechSeq2Seq),
        (auto.MODEL_FOR_MASKED_LM_MAPPING, transformers.AutoModelForMaskedLM),
    ):
        if kind in mapping:
            return maker
    name = ", ".join(getattr(config, "architectures", None) or ()) or kind.__name__
    raise ModelError(
        f"{name} ({getattr(config, 'model_type', '?')}) is no language model: transformers has no class of this kind "
        "that reads token ids, causal, encoder-decoder or masked, and hookmap reads those alone. What hookmap knows "
        "of: hookmap maps list"
    )


def _class_named(config: Any) -> Any:
    """The class of transformers that the config names, where AutoModel would give another; else None."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    kind = type(config)
    if getattr(config, "auto_map", None):
        return None
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if kind in mapping and mapping[kind].__name__ in (getattr(config, "architectures", None) or ()):
            return None
    for name in getattr(config, "architectures", None) or ():
        found: Any = getattr(transformers, name, None)
        if (
            isinstance(found, type)
            and issubclass(found, transformers.PreTrainedModel)
            and getattr(found, "config_class", None) is kind
        ):
            return found
    return None


def _is_causal(maker: Any) -> bool:
    """Whether what builds the model builds a causal language model, whose config may have to say so (BERT's)."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return maker is AutoModelForCausalLM or maker.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _is_whole(config: Any) -> bool:
    """Whether it is of a model that reads images or sounds too, and of all of it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    kind = type(config)
    if kind not in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return False
    named = config.architectures or ()
    return kind not in MODEL_FOR_CAUSAL_LM_MAPPING or MODEL_FOR_MULTIMODAL_LM_MAPPING[kind].__name__ in named


def other_class(config: Any) -> tuple[tuple[str, ...], str]:
    """The classes that a config names, where the class that is built is none of them, and the class that is built."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    named = tuple(getattr(config, "architectures", None) or ())
    own_code = getattr(config, "auto_map", None)
    if own_code or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or _is_whole(config) or _class_named(config):
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


def own_settings(config: Any) -> dict[str, Any]:
    """What a config says beyond the defaults of its class, as JSON data that its class reads back as the same config.

    All that it says where there are no such defaults. The model type and the version of transformers are left out.
    """
    said, whole = _plain(config.to_diff_dict()), _structural(_plain(config.to_dict()))

    def is_whole(settings: dict[str, Any]) -> bool:
        return _structural(_plain(type(config).from_dict(settings).to_dict())) == whole

    try:
        with hub.quiet():
            found = _beyond(said, _plain(type(config)().to_dict()))
            # Most classes make lists such as layer_types of other settings.
            for name in [name for name, value in found.items() if isinstance(value, list) and name not in _VOLATILE]:
                shorter = {key: value for key, value in found.items() if key != name}
                found = shorter if is_whole(shorter) else found
            found = found if is_whole(found) else said
    except Exception:  # a class without defaults, or that cannot do without some: each raises an error of its own
        found = said
    return {key: value for key, value in found.items() if key not in ("transformers_version", "model_type")}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return data


def _beyond(said: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    differing = {key: value for key, value in said.items() if key not in usual or value != usual[key]}
    return {
        key: _beyond(value, usual[key]) if isinstance(value, dict) and isinstance(usual.get(key), dict) else value
        for key, value in differing.items()
    }


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
