"""A capture as it is asked for: read and checked, before an engine is chosen. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hookmap.capture.batches import Batches, batches, generation_batches, harvest_batches
from hookmap.capture.options import BATCH_SIZE
from hookmap.capture.rows import RowSelection
from hookmap.loading.chat_template import Templating
from hookmap.loading.prompts import Prompt
from hookmap.maps.selectors import Selector


@dataclass(frozen=True)
class Request:
    """What runs, and what is stored of it."""

    prompts: tuple[Prompt, ...]
    templating: Templating
    """how the prompts went through the chat template"""
    selectors: tuple[Selector, ...]
    selection: RowSelection
    max_new_tokens: int
    """0: a harvest, one forward pass over the prompts"""
    batch_size: int | None
    batch_tokens: int

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(prompt.token_ids) for prompt in self.prompts]

    @property
    def read_after(self) -> int:
        """Generated tokens that the model reads, at most: all but the last one."""
        return max(0, self.max_new_tokens - 1)

    @property
    def batch_settings(self) -> dict[str, Any]:
        """What a manifest says of the batches."""
        if self.max_new_tokens:
            return {"batch_size": self.batch_size or BATCH_SIZE}
        return {"batch_tokens": self.batch_tokens, "batch_size": self.batch_size}

    def batches(self, why_no_pads: Callable[[], str | None]) -> Batches:
        """Which prompts run together. `why_no_pads`: asked only where a batch would have pads."""
        if self.max_new_tokens:
            size = self.batch_size or BATCH_SIZE
            return batches(self.lengths, lambda pads: generation_batches(self.lengths, size, pads), why_no_pads)
        return batches(
            self.lengths,
            lambda pads: harvest_batches(self.lengths, self.batch_tokens, self.batch_size, pads),
            why_no_pads,
        )
