"""A model and its tokenizer, from a hub id or a local folder; one copy of the weights."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookmap import hub
from hookmap.errors import ModelError, TokenizerError

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
_GIVE_ONE = "Give one: hookmap.open(model, tokenizer=...), as a tokenizer, a folder or a hub id."


def load_config(source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The config of `source`. Raises ModelError with what was tried."""
    from transformers import AutoConfig

    _check_folder(source)
    try:
        with _quiet():
            return AutoConfig.from_pretrained(
                source, trust_remote_code=trust_remote_code, revision=revision, **hub.source_arguments(source)
            )
    except Exception as error:  # a missing file, a gate, a broken file, code that is not trusted: each its own class
        raise ModelError(f"cannot load the model {str(source)!r}: {hub.explain(error, source)}") from error


def load_model(
    source: str | Path,
    *,
    dtype: Any = "auto",
    device: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """The causal language model of `source`, in evaluation mode.

    `dtype`: "auto" is the checkpoint's own. `device`: None is a GPU where there is one, else the CPU; "auto" spreads
    over all. Raises ModelError with what was tried.
    """
    from transformers import AutoModelForCausalLM

    _check_folder(source)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with _quiet():
            model: nn.Module = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                device_map=device,
                trust_remote_code=trust_remote_code,
                revision=revision,
                **hub.source_arguments(source),
            )
    except Exception as error:  # as above
        raise ModelError(f"cannot load the model {str(source)!r}: {hub.explain(error, source)}") from error
    return model.eval()


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of `source`. Raises TokenizerError with what was tried."""
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise TokenizerError(f"{folder} holds no tokenizer (tokenizer.json or the like). {_GIVE_ONE}")
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                source, trust_remote_code=trust_remote_code, revision=revision, **hub.source_arguments(source)
            )
    except Exception as error:  # as above: missing files, missing libraries, a gate
        raise TokenizerError(
            f"cannot load the tokenizer of {str(source)!r}: {hub.explain(error, source)}\n{_GIVE_ONE}"
        ) from error


def _check_folder(source: str | Path) -> None:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise ModelError(
                f"{folder} is no model folder: expected a config.json in it, found {inside}. "
                "Give a folder that save_pretrained wrote."
            )
    elif folder.is_file():
        raise ModelError(f"{folder} is a file: expected a model folder or a hub id. A map file goes to map=.")
    elif not hub.is_hub_id(source):
        raise ModelError(f"there is no folder {source}. Give a folder that save_pretrained wrote, or a hub id.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The hub's client logs each retry; the error that follows says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
