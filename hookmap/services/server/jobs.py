"""What the scheduler is given, and what it gives back."""

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
from hookmap.services.server.scores import ScoreChanges
from hookmap.services.server.summaries import Summary
from hookmap.services.server.tokens import Token


class Recorder(Protocol):
    """Records the activations of one request."""

    selectors: tuple[Selector, ...]
    selection: RowSelection
    matching: frozenset[int]
    """token ids whose rows are kept because of their text"""

    def begin(self) -> Sink:
        """The sink for the rows, when the run begins. Raises ApiError where there is no room."""

    def end(self, samples: Sequence[Sample], lost: Mapping[str, int]) -> dict[str, Any]:
        """Finish when all rows have come. Returns what the answer says of them. `lost`: see `Run.lost`."""

    def drop(self) -> None:
        """Forget the rows of a run that failed."""


@dataclass(frozen=True)
class Result:
    """How a job ended, where it did not fail."""

    new: tuple[tuple[int, ...], ...]
    """the generated tokens of each row, end of sequence included"""
    meta: dict[str, Any] | None = None
    """what the answer says of recorded activations"""


Event = list[Token] | Result | ApiError


class Queue(Protocol):
    """What runs the jobs of one model."""

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""

    @property
    def running(self) -> int:
        """Jobs that the model works on."""

    def submit(self, job: "Job") -> None:
        """Queue a job. Raises ApiError: 429 where the queue is full, 503 where the model is being unloaded."""

    def close(self, timeout: float | None = None) -> None:
        """Take no more jobs; those that wait may run for `timeout` seconds, and are cancelled then."""


Ended = Callable[["Job", Event], None]
"""called with a job and its last event"""


@dataclass(eq=False)
class Job:
    """One request, as the model runs it."""

    id: str
    prompts: tuple[Prompt, ...]
    """one for each row"""
    choices: int
    """rows of each prompt; they always run together, without pads"""
    config: GenerationConfig
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int | None
    recorder: Recorder | None = None
    interventions: tuple[Intervention, ...] = ()
    changes: ScoreChanges = field(default_factory=ScoreChanges)
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    """the number of likeliest tokens that are sent with each token of the prompt; None: no logprobs of the prompt"""
    summary: Summary | None = None
    reads_only: bool = False
    """whether the prompt is only read: one token is generated, because a run must, and neither sent nor recorded"""
    joins: bool = False
    """whether it joins the batch that runs; the scheduler decides"""
    emit: Callable[[Event], None] = field(default=lambda event: None)
    """called in the scheduler's thread: with the tokens of each step, then with a Result or an ApiError"""
    cancelled: threading.Event = field(default_factory=threading.Event)

    def tell(self, event: Event) -> None:
        """Hand an event to the route that waits for it."""
        try:
            self.emit(event)
        except RuntimeError:  # its event loop is gone
            self.cancelled.set()

    @property
    def echo(self) -> bool:
        """Whether the prompts' own logprobs are sent."""
        return self.prompt_logprobs is not None

    @property
    def plain(self) -> bool:
        """Whether it generates only, from text: reads, records and changes no activation."""
        further = any(prompt.inputs is not None for prompt in self.prompts)
        return not (self.recorder or self.interventions or self.summary or self.echo or self.reads_only or further)

    @cached_property
    def shares(self) -> dict[str, Any] | None:
        """Settings that jobs of one batch have in common. None: it runs alone.

        A seed promises the same draws again, and a recorded tensor is that of the prompt alone: pads would change both
        in the last bits.
        """
        if not self.plain or self.seed is not None or self.changes:
            return None
        return gen.of_one_row(self.config)
