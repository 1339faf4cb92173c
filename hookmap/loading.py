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
_GIVE_ONE = "Give one: --tokenizer MODEL, a folder or a hub id (in Python: hookmap.open(model, tokenizer=...))."


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
    over all. Raises ModelError with what was tried, and where the checkpoint lacks weights of the model: transformers
    would make them up at random.
    """
    from transformers import AutoModelForCausalLM

    _check_folder(source)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with _quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                source,
                output_loading_info=True,
                dtype=dtype,
                device_map=device,
                trust_remote_code=trust_remote_code,
                revision=revision,
                **hub.source_arguments(source),
            )
    except Exception as error:  # as above
        raise ModelError(f"cannot load the model {str(source)!r}: {hub.explain(error, source)}") from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{source} holds no weights for {len(missing)} parameters of {type(model).__name__}: "
            f"{', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}. They would be random numbers. "
            "Give a whole checkpoint; or, if it is meant, load the model yourself: hookmap.open(module, tokenizer=...)"
        )
    loaded: nn.Module = model.eval()
    return loaded


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
