"""Plain requests through the model's own `generate`, without hooks: one alone, or several in one batch.

Each row has its own stop strings, limit and logprobs. A request is answered when its last row has ended.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria

from hookmap.capture.batches import generating, padded
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.halving import in_parts
from hookmap.capture.run import device_of, running
from hookmap.loading.generation import without_stop_strings
from hookmap.loading.memory import MemoryUse
from hookmap.loading.sampling import OwnDraws, own_generator
from hookmap.loading.stopping import Ending
from hookmap.loading.wrappers import generate_of
from hookmap.model import HookedModel
from hookmap.services.server.batch_limits import BatchLimits
from hookmap.services.server.errors import ApiError, cancelled, failed, is_out_of_memory, not_finite
from hookmap.services.server.jobs import Ended, Job, Result
from hookmap.services.server.tokens import Finite, Likely, Token, beside, told

_LOOK = 64
"""steps between looks at the memory in use"""


@dataclass(eq=False)
class Choice:
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
        """The prompt's tokens and the generated ones."""
        return (*self.job.prompts[self.number].token_ids, *self.new)

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.job.max_new_tokens - len(self.new)

    def add(self, token: int, last: bool) -> None:
        """Append a token. `last`: it ends the choice, whatever the stop strings and the limit say."""
        self.new.append(token)
        self.ended = last or self.left == 0 or self.ending.at(self.new[-self.ending.reach :])


def choices_of(job: Job, hm: HookedModel) -> list[Choice]:
    """The choices of a job, before their first token. Raises CaptureError."""
    ending, device = Ending(job.config, job.stop, hm.tokenizer), device_of(hm.hooks)
    seed = job.seed if job.config.do_sample else None
    own = [None if seed is None else own_generator(seed, number, device) for number in range(len(job.prompts))]
    return [Choice(job, number, ending, generator) for number, generator in enumerate(own)]


class SharedRun:
    """Runs plain jobs that may share batches. `ended` is called for each job as soon as it has ended."""

    def __init__(self, hm: HookedModel, jobs: Sequence[Job], memory: MemoryUse, ended: Ended) -> None:
        self._hm, self._memory, self._ended = hm, memory, ended
        self._open = {job: choices_of(job, hm) for job in jobs}
        """the choices of jobs that have not ended"""

    def run(self, limits: BatchLimits) -> None:
        """Run them all. An error ends the jobs that it concerns; the others run."""
        batches = [[self._open[job][number] for job, number in rows] for rows in limits.batches(list(self._open))]
        for batch in batches:
            in_parts(batch, self._run_part)

    def after_step(
        self, choices: Sequence[Choice], tokens: list[int], last: list[bool], wrong: list[bool], likely: Likely | None
    ) -> None:
        """Give each choice its newest token, and send it. `last`: see `Choice.add`; `wrong`: see `Finite`."""
        self._end_cancelled()
        for job in {choice.job for choice, each in zip(choices, wrong, strict=True) if each and not choice.ended}:
            self._end(job, not_finite())
        new: dict[Job, list[Token]] = {}
        for place, (choice, token) in enumerate(zip(choices, tokens, strict=True)):
            if not choice.ended:
                choice.add(token, last[place])
                told_token = told(likely, place, choice.number, token, choice.job.top_logprobs)
                new.setdefault(choice.job, []).append(told_token)
        for job, each in new.items():
            job.tell(each)
        if not all(choice.ended for choice in choices):  # the last jobs are answered when the model is free again
            self._end_complete()

    def look(self) -> None:
        """Note the memory in use."""
        self._memory.look()

    def _run_part(self, choices: Sequence[Choice]) -> Sequence[Choice]:
        """Run these choices together. Returns those to be run again in smaller parts."""
        self._end_cancelled()
        choices = [choice for choice in choices if not choice.ended]
        if not choices:
            return ()
        error = self._generate(choices)
        self._end_complete()
        if error is None:
            return ()
        choices = [choice for choice in choices if not choice.ended]
        jobs = list(dict.fromkeys(choice.job for choice in choices))
        again = is_out_of_memory(error) and len(choices) > 1
        answer = failed(error, [job.id for job in jobs], again=again)
        if again:
            return choices
        for job in jobs:
            self._end(job, answer)
        return ()

    def _generate(self, choices: Sequence[Choice]) -> BaseException | None:
        """Generate until all of them have ended. Choices that already have tokens continue after these."""
        hooks, config = self._hm.hooks, without_stop_strings(choices[0].job.config)
        config.max_new_tokens = max(choice.left for choice in choices)
        layout = BatchLayout(tuple(range(len(choices))), tuple(len(choice.tokens) for choice in choices))
        likely = Likely() if any(choice.job.top_logprobs is not None for choice in choices) else None
        inputs = padded([choice.tokens for choice in choices], layout, config.pad_token_id, device_of(hooks))
        inputs = generating(hooks.root, inputs)
        finite = Finite()
        inputs["stopping_criteria"] = [_AfterStep(self, choices, finite, likely)]
        inputs["logits_processor"] = [finite]
        if likely is not None:
            config, processors = beside(likely, config)
            inputs["logits_processor"] += processors
        inputs["logits_processor"] += choices[0].job.changes.processors(layout.width)  # they run alone
        drawing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if generators := [choice.generator for choice in choices if choice.generator is not None]:
            inputs["custom_generate"] = draws = OwnDraws(generators)
            drawing = draws.expected(hooks.runner)
        try:
            with running(hooks), drawing:
                generate_of(hooks.runner, hooks.root)(generation_config=config, **inputs)
        except BaseException as error:
            return error
        return None

    def _end_complete(self) -> None:
        """Answer the jobs whose choices have all ended."""
        for job, choices in list(self._open.items()):
            if all(choice.ended for choice in choices):
                self._end(job, Result(tuple(tuple(choice.new) for choice in choices)))

    def _end_cancelled(self) -> None:
        """End the jobs whose clients have left."""
        for job in list(self._open):
            if job.cancelled.is_set():
                self._end(job, cancelled())

    def _end(self, job: Job, event: Result | ApiError) -> None:
        for choice in self._open.pop(job):
            choice.ended = True
        self._ended(job, event)


class _AfterStep(StoppingCriteria):  # type: ignore[misc]  # transformers' base is not typed
    """`SharedRun.after_step`, as transformers calls it; says which rows have ended."""

    def __init__(self, run: SharedRun, choices: Sequence[Choice], finite: Finite, likely: Likely | None) -> None:
        self._run, self._choices, self._finite, self._likely = run, choices, finite, likely
        self._steps = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        last = self._choices[0].ending.own(input_ids)  # jobs of one batch have the same settings
        self._run.after_step(self._choices, input_ids[:, -1].tolist(), last, self._finite.wrong, self._likely)
        if self._steps % _LOOK == 0:
            self._run.look()
        self._steps += 1
        return torch.tensor([choice.ended for choice in self._choices], device=input_ids.device)
