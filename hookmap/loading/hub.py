"""Whether the Hugging Face hub can be reached, and what its errors mean. Nothing is downloaded here.

Without a network transformers retries each file for some 20 seconds before it says so; one look-up of the host first
answers at once, and sends transformers to its cache.
"""

import logging
import os
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hookmap.demo import bundled
from hookmap.errors import ModelError
from hookmap.placeholders import is_gguf, pointers, pointers_told

_NO_NETWORK = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}


def for_transformers(source: str | Path) -> tuple[str | Path, dict[str, Any]]:
    """What `from_pretrained` is given for `source`: a folder or a hub id, and arguments.

    With them it does not wait for an unreachable hub, and reads a GGUF file: a local one, or `owner/name/FILE.gguf`.
    """
    source = bundled(source)
    offline = {"local_files_only": True} if Path(source).exists() or not reachable() else {}
    if not is_gguf(source):
        return source, offline
    if Path(source).exists():
        return Path(source).parent, {"gguf_file": Path(source).name, **offline}
    owner, name, file = str(source).split("/", 2)
    return f"{owner}/{name}", {"gguf_file": file, **offline}


@lru_cache(maxsize=1)
def reachable() -> bool:
    """Whether the hub's host resolves, or a proxy is set, and offline mode is off; checked once."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies().get(address.scheme):
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` can only mean a repository, `name` or `owner/name`, or a GGUF file in one, `owner/name/FILE`.

    No folder or file of that name is there.
    """
    text = str(source)
    parts = text.count("/") + 1
    fits = parts >= 3 if is_gguf(text) else parts <= 2
    return fits and not text.startswith((".", "~", os.sep)) and not Path(text).exists()


def check_source(source: str | Path) -> None:
    """Raises ModelError where `source` can be neither a model folder nor a hub id."""
    folder = Path(bundled(source))
    if folder.is_dir():
        if names := pointers(folder, ("config.json", "generation_config.json", "*.index.json")):
            raise ModelError(f"cannot load the model {str(source)!r}: {pointers_told(folder, names)}")
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                raise ModelError(
                    f"{folder} holds a PEFT adapter, and no model. Load both, and give the module: "
                    f'hookmap.open(peft.AutoPeftModelForCausalLM.from_pretrained("{folder}"), tokenizer=...)'
                )
            if files := sorted(folder.glob("*.gguf")):
                found = ", ".join(file.name for file in files[:8]) + (", …" if len(files) > 8 else "")
                raise ModelError(f"{folder} holds GGUF files ({found}) and no config.json. Give one file: {files[0]}")
            inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise ModelError(
                f"{folder} is no model folder: expected a config.json in it, found {inside}. "
                "Give a folder that save_pretrained wrote."
            )
    elif is_gguf(source):
        if not folder.is_file() and not is_hub_id(source):
            raise ModelError(f"there is no file {source}. Give a GGUF file, or one on the hub: owner/name/FILE.gguf")
        if folder.is_file() and folder.suffix != ".gguf":
            raise ModelError(
                f"{folder} is a GGUF file, and transformers reads those only under names that end in .gguf. "
                f"Give it one: ln -s {folder.resolve()} {folder.name}.gguf"
            )
    elif folder.is_file():  # transformers would take any JSON with a model_type, such as a map, for a config
        raise ModelError(f"{folder} is a file: expected a model folder or a hub id. A map: hookmap show {folder}")
    elif not is_hub_id(source):
        raise ModelError(
            f"there is no folder {source}. Give a folder that save_pretrained wrote, or a hub id; "
            "the bundled demo model is hookmap/demo/model."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """The hub's client logs each retry; the error that follows says it once."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def explain(error: BaseException, source: str | Path) -> str:
    """One sentence: why `source` could not be loaded, and what to type next."""
    names = {type(cause).__name__ for cause in _causes(error)}
    text = str(source)
    said = " ".join(str(cause) for cause in _causes(error))
    if "trust_remote_code=True" in said:
        return (
            "it brings modelling code of its own, which is run only if you say that you trust it. "
            "Read that code, then type: --trust-remote-code (in Python: trust_remote_code=True)"
        )
    if "Weights only load failed" in said:
        return (
            "its weights are a pickle that holds more than tensors, and unpickling that would run whatever code is in "
            "it. It is not loaded. Give a folder with safetensors files, as save_pretrained writes them."
        )
    if is_gguf(source) and "gguf" in said.lower() and "ImportError" in names:
        return 'reading GGUF files needs the gguf package: pip install "hookmap[gguf]"'
    if Path(source).is_dir() and (lacking := pointers(Path(source))):
        return pointers_told(Path(source), lacking)
    if not is_hub_id(source):
        return f"{_first_line(error).rstrip(' .')}. Give a folder that save_pretrained wrote, or a hub id."
    if "GatedRepoError" in names:
        return f"the repository is gated: ask for access at https://huggingface.co/{text}, then type: hf auth login"
    if names & {"RepositoryNotFoundError", "RevisionNotFoundError"}:
        return f"the hub has no such repository or revision (or it is private: type: hf auth login).{_inside(source)}"
    if names & _NO_NETWORK or not reachable():
        return (
            "the hub cannot be reached and the local cache does not hold it. "
            f"With a network, type: hf download {text}   Then it works offline; or give a local folder."
            f"{_inside(source)}"
        )
    return _first_line(error)


def _inside(source: str | Path) -> str:
    """For `runs/modle`, which may be a misspelt folder: what `runs` holds, if it exists."""
    folder = Path(source).parent
    if folder == Path() or not folder.is_dir():
        return ""
    found = sorted(each.name for each in folder.iterdir() if each.is_dir())
    return f" The folder {folder} is here, and in it {', '.join(found[:8]) or 'no folder'}."


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
