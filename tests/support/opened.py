"""The families' models as hookmap opens them."""

from functools import cache

import pytest
from support import plain_hooks
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.model import HookedModel

_QUICK = ("gpt2", "gemma2", "falcon_7b", "mixtral", "mamba")
EACH_FAMILY = [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in plain_hooks.FAMILIES]
"""for `parametrize`: the quick tests run a few of them, of different structures"""
_ALIKE = ("qwen2", "mistral", "gemma", "gemma3", "phi", "qwen3_moe")
"""built as another family is, but for a bias, a norm or a number of heads: discovery and captures have them all"""
EACH_STRUCTURE = [
    pytest.param(name, marks=(pytest.mark.slow, pytest.mark.many)) if name in _ALIKE else param
    for name, param in zip(plain_hooks.FAMILIES, EACH_FAMILY, strict=True)
]
"""for tests of what is done with a map, and so is the same wherever the map says the same"""
RAGGED = [[5, 17, 3, 60, 22, 9], [11, 2, 33], [48, 7, 7, 90, 1, 2, 3, 4, 81]]
"""prompts of different lengths, as token ids"""


@cache
def opened(family: str) -> HookedModel:
    """The family's model, opened once in each test process. A test that changes a model opens its own."""
    return hookmap.open(plain_hooks.build(family), tokenizer=tiny_tokenizer())
