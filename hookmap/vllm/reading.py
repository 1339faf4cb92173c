"""The tokenizer that vLLM looks for stop strings with: the one that the model here has."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any


@contextmanager
def same_tokenizer(given: Any, found: Any, config: Any) -> Iterator[dict[str, Any]]:
    """vLLM's settings, while it starts, of the tokenizer that was given: a folder, a hub id or a loaded one.

    `found`: what the model here reads text with; None where there is none, and vLLM is to start without one, too.
    `config`: the model's, which vLLM looks for beside a tokenizer.
    """
    if found is None or not hasattr(found, "save_pretrained"):
        yield {"skip_tokenizer_init": True}
    elif given is None:
        yield {}
    elif isinstance(given, str | os.PathLike):
        yield {"tokenizer": os.fspath(given)}
    else:
        with TemporaryDirectory(prefix="hookmap-") as folder:
            given.save_pretrained(folder)
            config.save_pretrained(folder)
            yield {"tokenizer": folder}
