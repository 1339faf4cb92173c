"""What the model's thread is given, and what it gives back."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from transformers import GenerationConfig

from hookmap.activations import Sample, Sink
from hookmap.capture.interventions.documents import Intervention
from hookmap.capture.rows import RowSelection
from hookmap.loading import generation as gen
from hookmap.loading.prompts import Prompt
from hookmap.maps.selectors import Selector
from hookmap.services.server.errors import ApiError
from hookmap.services.server.summaries import Summary
from hookmap.services.server.tokens import Token


class Keeper(Protocol):
    """Where the rows of one request go."""

    selectors: tuple[Selector, ...]
    selection: RowSelection
    matching: frozenset[int]
    """the tokens that are kept for their text"""

    def begin(self) -> Sink:
        """The run begins: rows may come. Raises ApiError where there is no room."""

    def end(self, samples: Sequence[Sample], lost: Mapping[str, int]) -> dict[str, Any]:
        """All rows came. Returns what the answer says of them. `lost`: see `Run.lost`."""

    def drop(self) -> None:
        """The run failed: forget what came."""


@dataclass(frozen=True)
class Result:
    """What came of a job."""

    new: tuple[tuple[int, ...], ...]
    """the tokens of each row, end of sequence included"""
    meta: dict[str, Any] | None = None
    """what the answer says of its activations"""


Event = list[Token] | Result | ApiError


@dataclass(eq=False)
class Job:
    """One request, as the model runs it."""

    id: str
    prompts: tuple[Prompt, ...]
    """one for each row"""
    together: int
    """rows of one prompt: they always run together, without pads"""
    config: GenerationConfig
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int | None
    keeper: Keeper | None = None
    interventions: tuple[Intervention, ...] = ()
    top_logprobs: int | None = None
    summary: Summary | None = None
    echo: bool = False
    """whether the logprobs of the prompts are told"""
    reads_only: bool = False
    """one token is generated, because a run does, and nothing is told of it"""
    emit: Callable[[Event], None] = field(default=lambda event: None)
    """called in the model's thread: each step's tokens, then a Result or an ApiError"""
    cancelled: threading.Event = field(default_factory=threading.Event)

    def tell(self, event: Event) -> None:
        """Hand an event to who waits for it."""
        try:
            self.emit(event)
        except RuntimeError:  # the event loop that waited for it is gone
            self.cancelled.set()

    @property
    def plain(self) -> bool:
        """Whether it reads, keeps and changes nothing."""
        return not (self.keeper or self.interventions or self.summary or self.echo or self.reads_only)

    @cached_property
    def shares(self) -> dict[str, Any] | None:
        """Settings that it has in common with every job that it may share a batch with. None: it runs alone.

        A seed says what is drawn for these rows, and a captured tensor is that of the prompt alone.
        """
        if not self.plain or self.seed is not None:
            return None
        return gen.of_one_row(self.config)
