"""A model that does not run any more says so, and says why."""

from pathlib import Path

import pytest
from support.on_vllm import SETTINGS

import hookmap
from hookmap.errors import CaptureError


def test_a_model_that_was_closed_is_refused_and_so_are_those_that_vllm_ends_with_it(checkpoint: Path) -> None:
    first, second = (hookmap.open_on_vllm(checkpoint, eager=True, **SETTINGS) for _ in range(2))
    assert [model.capture([[1, 2]], "resid_post", max_new_tokens=1).texts for model in (first, second)]
    second.close()
    second.close()
    with pytest.raises(CaptureError, match=r"it was closed\. Open it again"):
        second.capture([[1, 2]], "resid_post", max_new_tokens=1)
    with pytest.raises(CaptureError, match=r"vLLM ended it with another one in this process\. Open it again"):
        first.capture([[1, 2]], "resid_post", max_new_tokens=1)
