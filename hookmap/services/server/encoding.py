"""Texts become tokens off the event loop. Long ones keep no short one waiting; what never fits is not read."""

import asyncio
import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

from hookmap.services.server.errors import bad

LONG = 50_000
"""characters from which on a text is read by a second copy of the tokenizer"""
_T = TypeVar("_T")


class Encoding:
    """The tokenizer of one model: tokenizers are not made for several threads at once."""

    def __init__(self, tokenizer: Any, context: int | None) -> None:
        """`context`: the most tokens of a prompt; None: no limit is known."""
        self._tokenizer, self._context = tokenizer, context
        self._short, self._long = asyncio.Lock(), asyncio.Lock()

    async def run(self, characters: int, work: Callable[[Any], _T], field: str) -> _T:
        """What `work` makes of the tokenizer, in a thread. `characters`: of the text, which is in this field.

        Raises ApiError for too many.
        """
        self.check(characters, field)
        if characters < LONG or self._tokenizer is None:
            async with self._short:
                return await asyncio.to_thread(work, self._tokenizer)
        async with self._long:
            return await asyncio.to_thread(lambda: work(self._second))

    def check(self, characters: int, field: str) -> None:
        """Raises ApiError where no tokens that fit into the model have so many characters."""
        if self._context is None or self._tokenizer is None or characters <= self._context:
            return
        if characters > (most := self._context * self._longest):
            raise bad(
                f"This model's maximum context length is {self._context} tokens, which have at most {most} characters. "
                f"However, your prompt has {characters}. Shorten it.",
                field,
                "context_length_exceeded",
            )

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._tokenizer.get_vocab()))

    @cached_property
    def _second(self) -> Any:
        return copy.deepcopy(self._tokenizer)
