"""A capture as it is asked for: read and checked, before an engine is chosen. Pure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from hookmap.capture.batches import Batches, batches, generation_batches, harvest_batches
from hookmap.capture.options import BATCH_SIZE
from hookmap.capture.rows import RowSelection
from hookmap.errors import CaptureError
from hookmap.loading.chat_template import Templating
from hookmap.loading.further_inputs import signature
from hookmap.loading.generation import check_count
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

    def drawn(self, count: Any, do_sample: bool) -> "Request":
        """Each prompt so many times, as samples behind each other; ids get the number of the draw. Raises CaptureError.

        `do_sample`: whether their texts differ.
        """
        check_count("num_return_sequences", count)
        if count == 1:
            return self
        if not do_sample or not self.max_new_tokens:
            raise CaptureError(
                f"num_return_sequences={count} needs do_sample=True and new tokens: otherwise all are the same."
            )
        prompts = tuple(
            prompt if prompt.id is None else replace(prompt, id=f"{prompt.id}.{draw}")
            for prompt in self.prompts
            for draw in range(count)
        )
        return replace(self, prompts=prompts)

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

    def batches(
        self, why_no_pads: Callable[[], str | None], why_not_joined: Callable[[Sequence[Prompt]], str | None]
    ) -> Batches:
        """Which prompts run together: only those whose further inputs have the same names.

        `why_no_pads`: asked only where a batch would have pads. `why_not_joined`: why these prompts, whose further
        inputs have the same names, must run alone; asked only where several would share a batch.
        """
        found: list[tuple[int, ...]] = []
        reasons: list[str] = []
        for numbers in self._alike():
            further = self.prompts[numbers[0]].inputs is not None
            lengths = [self.prompts[number].size for number in numbers]
            groups, why = batches(lengths, partial(self._made, lengths), why_no_pads)
            if further and why is None and any(len(group) > 1 for group in groups):
                why = why_not_joined([self.prompts[number] for number in numbers])
            if further and why is not None:
                groups = tuple((place,) for place in range(len(numbers)))
            found += [tuple(numbers[place] for place in group) for group in groups]
            reasons += [] if why is None else [why]
        return tuple(found), "; ".join(dict.fromkeys(reasons)) or None

    def _alike(self) -> list[list[int]]:
        """The numbers of prompts whose further inputs have the same names, and the same sizes where they must."""
        found: dict[tuple[frozenset[str], tuple[int, ...]], list[int]] = {}
        for number, prompt in enumerate(self.prompts):
            alike = () if prompt.inputs is None else prompt.inputs.alike
            found.setdefault((signature(prompt.inputs), alike), []).append(number)
        return list(found.values())

    def _made(self, lengths: Sequence[int], pads: bool) -> Iterator[tuple[int, ...]]:
        if self.max_new_tokens:
            return generation_batches(lengths, self.batch_size or BATCH_SIZE, pads)
        return harvest_batches(lengths, self.batch_tokens, self.batch_size, pads)
