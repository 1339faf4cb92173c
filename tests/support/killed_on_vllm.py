"""What a capture on vLLM leaves whose engine is killed."""

from pathlib import Path
from typing import Any

import pytest
from support.on_vllm import POINTS, Plain, held_against

import hookmap
from hookmap.errors import CaptureError


def held_against_until_it_dies(plain: Plain, model: Any, asked: Any, folder: Path, max_new_tokens: int) -> None:
    """A capture whose engine is killed in its middle is an error; what was finished before is whole, and right."""
    with pytest.raises(CaptureError, match="vLLM's engine has died"):
        model.capture(asked, POINTS, max_new_tokens=max_new_tokens, store=folder)
    store = hookmap.open_store(folder)
    assert not store.manifest.finished and 1 <= len(store) < len(asked)
    assert list(store.verify()) == []
    held_against(plain, store)
