"""Plain requests through the model's own `generate`, with no hook set: one alone, or several that waited, in one batch.

Each row keeps its own stop strings, limit and logprobs, and its request is answered when its last row has ended.
"""

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria

from hookmap.capture.batches import generating, padded
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.run import device_of, running
from hookmap.loading.memory import MemoryUse
from hookmap.loading.sampling import OwnDraws, own_generator
from hookmap.loading.stopping import Ending
from hookmap.loading.wrappers import generate_of
from hookmap.model import HookedModel
from hookmap.services.server.errors import ApiError, cancelled, failed, is_out_of_memory
from hookmap.services.server.jobs import Event, Job, Result
from hookmap.services.server.tokens import Likely, Token, beside, told

log = logging.getLogger("hookmap.server")

Ended = Callable[[Job, Event], None]
"""takes a job and its last event, as soon as there is one"""


@dataclass(frozen=True)
class Room:
    """Who may share a batch."""

    rows: int
    tokens: int
    """of a batch and its pads, with all that may be generated"""
    columns: int | None = None
    """of a batch: the model's positions, because rows that have ended are led on; None: no limit is known"""
    padded: int = 0
    """columns up to which prompts of different lengths may share one"""

    def beside(self, first: Job, waiting: Iterable[Job]) -> list[Job]:
        """The jobs among those that wait that run together with the first one, in their order."""
        found = [first]
        for job in waiting:
            if first.shares is not None and job.shares == first.shares:
                prompts = [prompt for each in (*found, job) for prompt in each.prompts]
                if self._holds([len(prompt.token_ids) for prompt in prompts], (*found, job)):
                    found.append(job)
        return found[1:]

    def batches(self, rows: Sequence["Row"]) -> Iterator[list["Row"]]:
        """The rows of one prompt run together whatever their number, those of several prompts where they may."""
        batch: list[Row] = []
        for _, group in itertools.groupby(rows, lambda row: (id(row.job), row.number // row.job.together)):
            same = list(group)
            every = [*batch, *same]
            holds = self._holds([len(row.tokens) for row in every], [row.job for row in every])
            if batch and (same[0].job.shares is None or not holds):
                yield batch
                every = same
            batch = every
        yield batch

    def _holds(self, lengths: Sequence[int], jobs: Iterable[Job]) -> bool:
        columns = max(lengths) + max(job.max_new_tokens for job in jobs)
        if len(lengths) > self.rows or (columns > self.padded and len(set(lengths)) > 1):
            return False
        return len(lengths) * columns <= self.tokens and (self.columns is None or columns <= self.columns)


@dataclass(eq=False)
class Row:
    """One choice of one request, as it grows."""

    job: Job
    number: int
    ending: Ending
    generator: torch.Generator | None = None
    """what it draws from; None: torch's own"""
    new: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt's, and those that came."""
        return (*self.job.prompts[self.number].token_ids, *self.new)

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.job.max_new_tokens - len(self.new)

    def add(self, token: int, last: bool = False) -> None:
        """The next one, which may be known to be the last."""
        self.new.append(token)
        self.ended = last or self.left == 0 or self.ending.at(self.new[-self.ending.reach :])


class Together:
    """Runs jobs that may share batches."""

    def __init__(self, hm: HookedModel, jobs: Sequence[Job], memory: MemoryUse, ended: Ended) -> None:
        self._hm, self._memory, self._ended = hm, memory, ended
        self._rows: dict[Job, list[Row]] = {job: list(self._rows_of(job)) for job in jobs}
        """of jobs that have not ended"""

    def run(self, room: Room) -> None:
        """Run them all; whatever goes wrong is told to those whom it concerns."""
        every = [row for rows in self._rows.values() for row in rows]
        for batch in room.batches(every):
            self._batch(batch)

    def end_complete(self) -> None:
        """Answer the jobs whose rows have all ended."""
        for job, rows in list(self._rows.items()):
            if all(row.ended for row in rows):
                self._end(job, Result(tuple(tuple(row.new) for row in rows)))

    def end_cancelled(self) -> None:
        """Let go the jobs that nobody waits for."""
        for job in list(self._rows):
            if job.cancelled.is_set():
                self._end(job, cancelled())

    def _rows_of(self, job: Job) -> Iterator[Row]:
        ending, device = Ending(job.config, job.stop, self._hm.tokenizer), device_of(self._hm.hooks)
        seed = job.seed if job.config.do_sample else None
        for number in range(len(job.prompts)):
            yield Row(job, number, ending, None if seed is None else own_generator(seed, number, device))

    def _batch(self, rows: Sequence[Row]) -> None:
        self.end_cancelled()
        rows = [row for row in rows if not row.ended]
        if not rows:
            return
        error = self._generate(rows)
        self.end_complete()
        if error is None:
            return
        left = [row for row in rows if not row.ended]
        halves = is_out_of_memory(error) and len(left) > 1
        answer = failed(error, [job.id for job in dict.fromkeys(row.job for row in left)], again=halves)
        if halves:
            self._batch(left[: len(left) // 2])
            self._batch(left[len(left) // 2 :])
            return
        for job in dict.fromkeys(row.job for row in left):
            self._end(job, answer)

    def _generate(self, rows: Sequence[Row]) -> BaseException | None:
        """Until all rows have ended; rows that came some way before go on from there."""
        job, hooks = rows[0].job, self._hm.hooks
        device = device_of(hooks)
        layout = BatchLayout(tuple(range(len(rows))), tuple(len(row.tokens) for row in rows))
        config = copy.copy(job.config)
        config.max_new_tokens = max(row.left for row in rows)
        likely = Likely() if any(row.job.top_logprobs is not None for row in rows) else None
        inputs = padded([row.tokens for row in rows], layout, config.pad_token_id, device)
        inputs = generating(hooks.root, inputs, config, self._hm.tokenizer)
        inputs["stopping_criteria"] = [_Step(self, rows, likely)]
        if likely is not None:
            config, inputs["logits_processor"] = beside(likely, config)
        drawing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if generators := [row.generator for row in rows if row.generator is not None]:
            inputs["custom_generate"] = draws = OwnDraws(generators)
            drawing = draws.expected(hooks.runner)
        try:
            with running(hooks), drawing:
                generate_of(hooks.runner, hooks.root)(generation_config=config, **inputs)
        except BaseException as error:
            return error
        return None

    def look(self) -> None:
        """At the memory in use."""
        self._memory.look()

    def _end(self, job: Job, event: Result | ApiError) -> None:
        for row in self._rows.pop(job):
            row.ended = True
        self._ended(job, event)


class _Step(StoppingCriteria):  # type: ignore[misc]  # transformers' base is not typed
    """After each step: gives every row its token, and says which rows have ended."""

    def __init__(self, run: Together, rows: Sequence[Row], likely: Likely | None = None) -> None:
        self._run, self._rows, self._likely = run, rows, likely
        self._steps = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        self._run.end_cancelled()
        came: dict[Job, list[Token]] = {}
        last = self._rows[0].ending.own(input_ids).tolist()  # rows of unlike settings do not run together
        for place, (row, id) in enumerate(zip(self._rows, input_ids[:, -1].tolist(), strict=True)):
            if not row.ended:
                row.add(id, last[place])
                came.setdefault(row.job, []).append(told(self._likely, place, row.number, id, row.job.top_logprobs))
        for job, tokens in came.items():
            job.tell(tokens)
        ended = [row.ended for row in self._rows]
        if not all(ended):  # those who end with the batch are answered when the model is free again
            self._run.end_complete()
        if self._steps % 64 == 0:
            self._run.look()
        self._steps += 1
        return torch.tensor(ended, device=input_ids.device)
