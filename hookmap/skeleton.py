"""A model without weights: from a hub id, a folder, a config or a module to something that can run one forward pass."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookmap import hub
from hookmap.errors import DiscoveryError, ModelError

# Settings that leave the structure alone: they differ between copies of one model.
_VOLATILE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "attn_implementation",
    "use_cache", "is_decoder", "output_attentions", "output_hidden_states", "return_dict", "architectures",
    "id2label", "label2id",
    "bos_token_id", "eos_token_id", "pad_token_id", "problem_type", "chunk_size_feed_forward", "_commit_hash",
    "auto_map", "quantization_config",
}  # fmt: skip
_SEQUENCES = (7, 11, 13, 17, 19, 23, 29, 31, 37)


def load_config(source: str | Path, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The transformers config of a hub id or a local folder. Raises ModelError, with what was tried."""
    from transformers import AutoConfig

    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json: expected a folder that save_pretrained wrote.")
    arguments = {"trust_remote_code": trust_remote_code, "revision": revision, **hub.source_arguments(source)}
    try:
        return AutoConfig.from_pretrained(source, **arguments)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load the config of {str(source)!r}: {hub.explain(error, source)}\n"
            "Expected a Hugging Face model id that can be reached, or a local folder with a config.json."
        ) from error


def build(
    config: Any, device: str = "meta", dtype: torch.dtype = torch.bfloat16, trust_remote_code: bool = False
) -> nn.Module:
    """The causal language model of a config, in eager attention; on the meta device no weight is allocated."""
    from transformers import AutoModelForCausalLM

    config = type(config).from_dict(config.to_dict()) if hasattr(config, "to_dict") else config
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    try:
        with torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise ModelError(
            f"transformers cannot build {type(config).__name__}: {type(error).__name__}: {error}"
        ) from error
    return model.eval()


def unwrap(source: Any) -> nn.Module:
    """The torch module inside an nnsight model, or the module itself."""
    inner = getattr(source, "_module", None)
    if isinstance(inner, nn.Module) and type(source).__module__.startswith("nnsight"):
        return inner
    if isinstance(source, nn.Module):
        return source
    raise DiscoveryError(
        f"cannot discover a {type(source).__name__}: expected a hub id, a local folder, a transformers config, "
        "a torch module or an nnsight model."
    )


def sequence_length(config: Any) -> int:
    """An odd length that divides no size in the config, so that the axis of positions can be told by its length."""
    sizes = set(_numbers(config.to_dict() if hasattr(config, "to_dict") else {}))
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


def inputs(device: Any, seq: int) -> dict[str, Any]:
    """What a forward pass is given: one sequence of ones, nothing masked, no cache."""
    ids = torch.ones((1, seq), dtype=torch.long, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and with the eager attention implementation, and afterwards as it was."""
    training = {module: module.training for module in model.modules()}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    attention = {key: getattr(c, "_attn_implementation", None) for key, c in configs.items()}
    model.eval()
    for config in configs.values():
        if getattr(config, "_attn_implementation", None) is not None:
            config._attn_implementation = "eager"
    try:
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
