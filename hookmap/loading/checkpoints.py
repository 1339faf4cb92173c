"""A model and its tokenizer, from a hub id or a local folder; one copy of the weights."""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookmap.errors import ModelError, TokenizerError
from hookmap.loading import configs, hub
from hookmap.loading.config_fields import with_fields
from hookmap.placeholders import is_gguf, pointers, pointers_told

log = logging.getLogger("hookmap")

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
_TOKENIZER_TEXTS = (*_TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "chat_template*")
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""how accelerate may spread a model over all devices"""
_GIVE_ONE = "Give one: --tokenizer MODEL, a folder or a hub id (in Python: hookmap.open(model, tokenizer=...))."


def load_model(
    source: str | Path,
    *,
    dtype: Any = "auto",
    device: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The language model of `source`, whole where it reads images or sounds as well, in evaluation mode.

    `dtype`: "auto" is the checkpoint's own. `device`: None is a GPU where there is one, else the CPU; "auto" spreads
    over all. `config`: fields that are set over its config.json's. Raises ModelError with what was tried, and where
    the checkpoint lacks weights of the model: transformers would make them up at random.
    """
    settings = with_fields(configs.load_config(source, trust_remote_code, revision), config)
    maker = configs.model_class(settings)
    configs.say_another_class(settings, source)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    where, arguments = hub.for_transformers(source)
    if "gguf_file" in arguments:
        arguments |= _dequantised(source)
    try:
        with hub.quiet():
            model, found = maker.from_pretrained(
                where,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with the sizes
                dtype=dtype,
                device_map=device,
                trust_remote_code=trust_remote_code,
                revision=revision,
                **({"config": settings} if config or "gguf_file" in arguments else {}),
                **arguments,
            )
    except Exception as error:  # as above
        raise ModelError(f"cannot load the model {str(source)!r}: {hub.explain(error, source)}") from error
    if wrong := sorted(found["mismatched_keys"]):
        said = [f"{name} is {list(there)}, expected {list(expected)}" for name, there, expected in wrong[:4]]
        raise ModelError(
            f"{source}: {len(wrong)} weights are of other sizes than its config.json says: {'; '.join(said)}"
            f"{'; …' if len(wrong) > 4 else ''}. Give the config.json that belongs to the weights."
        )
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{source} holds no weights for {len(missing)} parameters of {type(model).__name__}: "
            f"{', '.join(missing[:4])}{', …' if len(missing) > 4 else ''}. They would be random numbers. "
            "Give a whole checkpoint; or, if it is meant, load the model yourself: hookmap.open(module, tokenizer=...)"
        )
    if unused := sorted(found["unexpected_keys"]):
        log.warning(
            "%s: %s has no place for %d of the weights, which are left out: %s%s. That is so for parts that another "
            "task needs; if they are of the blocks, config.json is another model's, and every tensor is wrong.",
            source, type(model).__name__, len(unused), ", ".join(unused[:4]), ", …" if len(unused) > 4 else "",
        )  # fmt: skip
    if "gguf_file" in arguments:
        model.config._name_or_path = str(source)  # transformers writes the folder that the file is in
    loaded: nn.Module = model.eval()
    return loaded


def _dequantised(source: str | Path) -> dict[str, Any]:
    """Arguments with which transformers unpacks the weights of a GGUF file: hooks see plain modules then."""
    import transformers

    log.warning("%s: the weights of a GGUF file are dequantised; it takes the memory of the whole model.", source)
    packed = getattr(transformers, "GgufConfig", None)  # before it came, transformers always unpacked them
    return {} if packed is None else {"quantization_config": packed(dequantize=True)}


def _check_device(device: Any) -> None:
    """A device that is not here is no fault of the model's files, which is how the error of loading them reads."""
    if isinstance(device, dict) or device in _SPREAD:
        return
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each of torch's back ends raises its own
        said = str(error).partition("\n")[0].rstrip(".")
        raise ModelError(
            f"cannot use the device {str(device)!r}: {said}. {torch.cuda.device_count()} CUDA devices are here. "
            "Give cpu, cuda:0, auto, or nothing: a GPU where there is one. hookmap doctor lists them."
        ) from error


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer of `source`. Raises TokenizerError with what was tried."""
    from transformers import AutoTokenizer

    folder = Path(source)
    if is_gguf(folder) and folder.is_file() and _holds_tokenizer(folder.parent):
        source = folder = folder.parent  # the tokenizer that the model came with; transformers would mix the two
    where, arguments = hub.for_transformers(source)
    if folder.is_dir() and not _holds_tokenizer(folder):
        raise TokenizerError(f"{folder} holds no tokenizer (tokenizer.json or the like). {_GIVE_ONE}")
    names = pointers(folder, _TOKENIZER_TEXTS) if folder.is_dir() else []
    if "tokenizer.json" not in names and (folder / "tokenizer.json").is_file():  # beside it, no *.model is read
        names = [name for name in names if not name.endswith(".model")]
    if names:  # some would be read as if they were the file
        raise TokenizerError(f"cannot load the tokenizer of {str(source)!r}: {pointers_told(folder, names)}")
    try:
        with hub.quiet():
            return AutoTokenizer.from_pretrained(
                where, trust_remote_code=trust_remote_code, revision=revision, **arguments
            )
    except Exception as error:  # as above: missing files, missing libraries, a gate
        raise TokenizerError(
            f"cannot load the tokenizer of {str(source)!r}: {hub.explain(error, source)}\n{_GIVE_ONE}"
        ) from error


def _holds_tokenizer(folder: Path) -> bool:
    return any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))


def load_processor(source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """What makes a model's inputs of texts and images. Raises TokenizerError with what was tried."""
    if find_spec("PIL") is None:
        raise TokenizerError('images need Pillow: pip install "hookmap[vision]"')
    from transformers import AutoProcessor

    where, arguments = hub.for_transformers(source)
    try:
        with hub.quiet():
            found = AutoProcessor.from_pretrained(
                where, trust_remote_code=trust_remote_code, revision=revision, **arguments
            )
    except Exception as error:  # as above
        said = " ".join(str(error).split())
        if "torchvision" in said.lower() and find_spec("torchvision") is None:
            raise TokenizerError(
                f"cannot load the processor of {str(source)!r}: it needs torchvision, which is not installed. Install "
                "the one of your torch: pip install torchvision"
            ) from error
        raise TokenizerError(
            f"cannot load the processor of {str(source)!r}: {hub.explain(error, source)}\n"
            "Give one: hookmap.open(model, processor=...)"
        ) from error
    if getattr(found, "image_processor", None) is None:
        raise TokenizerError(
            f"{source} holds no processor of images: the model reads text only, or its processor is elsewhere. "
            "Give text alone; or hookmap.open(model, processor=...)"
        )
    return found
