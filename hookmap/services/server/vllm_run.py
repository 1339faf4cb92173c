"""One request on vLLM: a capture whose tokens are sent as they come. It ends when its client leaves."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hookmap.analysis.unembedding import Unembeds
from hookmap.capture.rows import RowSelection
from hookmap.errors import CaptureError, InterventionError, SelectionError
from hookmap.loading.memory import MemoryUse
from hookmap.services.server.editing import planned
from hookmap.services.server.errors import bad, cancelled
from hookmap.services.server.jobs import Job, Result
from hookmap.services.server.scores import ScoreChanges
from hookmap.services.server.summaries import PARAM, Figures, Summary, figures_of
from hookmap.services.server.tokens import Token
from hookmap.services.server.watched_run import Gathered
from hookmap.stores.ledger import tensor_name
from hookmap.vllm.model import VllmModel
from hookmap.vllm.run import VllmGenerating, refuse_longer


def run_on_vllm(hm: VllmModel, job: Job) -> Result:
    """Run a job beside those that run. Raises ApiError, and CaptureError where vLLM's engine fails."""
    from vllm.exceptions import VLLMValidationError

    recorder = job.recorder
    check(hm, job)
    run = ServedRun(
        hm.engine_of_vllm,  # type: ignore[arg-type]  # no engine of the hooks' kind
        hm.tokenizer,
        recorder.selectors if recorder else job.summary.selectors if job.summary else (),
        job.prompts,
        recorder.selection if recorder else RowSelection(),
        recorder.matching if recorder else frozenset(),
        None,
        MemoryUse(),
        max_new_tokens=job.max_new_tokens,
        config=job.config,
        stop=job.stop,
        seed=job.seed,
        tell=job.tell,
        cancelled=job.cancelled.is_set,
        top_logprobs=job.top_logprobs,
        summary=job.summary,
        unembedding=job.summary.reading(hm) if job.summary else None,
        prompt_logprobs=job.prompt_logprobs,
        changes=job.changes,
        reads_only=job.reads_only,
    )
    if job.interventions:
        run.edits = planned(hm, job.interventions, job.prompts, job.max_new_tokens).edits
        hm.engine_of_vllm.refuse_untapped([edit.selector.key for edit in run.edits])
    try:
        sink = Gathered(recorder.begin() if recorder else None, job.reads_only)
        run.batch(range(len(job.prompts)), sink)
        samples = sorted(sink.samples, key=lambda sample: sample.sample)
        new = tuple(sample.token_ids[sample.prompt_tokens :] for sample in samples)
        return Result(new, recorder.end(samples, run.lost) if recorder else None)
    except BaseException as error:
        if recorder:
            recorder.drop()
        if isinstance(error, InterventionError | SelectionError):  # of what was asked, which only the worker knows
            raise bad(str(error), "hookmap", type(error).__name__) from error
        if isinstance(error, CaptureError) and isinstance(error.__cause__, ValueError | VLLMValidationError):
            raise bad(str(error)) from error  # vLLM refuses the request
        raise


def check(hm: VllmModel, job: Job) -> None:
    """Raises ApiError for what vLLM does not do."""
    if job.summary is not None and job.recorder is not None:
        raise bad("summary: on vLLM, either figures or rows: give return: none beside it.", PARAM)
    if job.summary is not None and job.summary.prompt:
        raise bad("summary: on vLLM, figures are of generated tokens; leave prompt out.", f"{PARAM}.prompt")
    if job.changes.grammar is not None:
        raise bad("response_format: not on vLLM here; serve with --engine hooks.", "response_format")
    if job.changes.least and job.stop:
        raise bad("min_tokens: vLLM would look for stop strings behind them alone; leave it or stop out.", "min_tokens")
    if any(prompt.inputs is not None for prompt in job.prompts):
        raise bad("images do not run on vLLM here: serve with --engine hooks.", "messages")
    try:
        refuse_longer(job.prompts, 0 if job.reads_only else job.max_new_tokens, hm.engine_of_vllm.longest)
    except CaptureError as error:
        raise bad(str(error), "prompt", "context_length_exceeded") from error
    try:
        asks = job.recorder or job.summary
        hm.engine_of_vllm.refuse_untapped([selector.key for selector in asks.selectors] if asks else [])
    except Exception as error:
        raise bad(str(error), "hookmap.points", type(error).__name__) from error


@dataclass
class ServedRun(VllmGenerating):
    """A run that sends each token of each row."""

    tell: Callable[[list[Token]], None] = field(default=lambda tokens: None)
    cancelled: Callable[[], bool] = field(default=lambda: False)
    top_logprobs: int | None = None
    """the number of likeliest tokens that are sent with each token; None: no logprobs"""
    summary: Summary | None = None
    unembedding: Unembeds | None = None
    prompt_logprobs: int | None = None
    changes: ScoreChanges = field(default_factory=ScoreChanges)
    reads_only: bool = False
    """whether the prompt is only read: one token is generated, and neither sent nor recorded"""
    _echoed: set[int] = field(default_factory=set)
    _told: Counter[int] = field(default_factory=Counter)
    """tokens of each row that were told"""

    def parameters(self, number: int) -> Any:
        """See `VllmGenerating.parameters`. Raises ApiError for settings that vLLM refuses, as a temperature of 3."""
        from vllm.sampling_params import RequestOutputKind

        try:
            found = super().parameters(number)
        except CaptureError as error:
            raise bad(str(error)) from error
        found.output_kind = RequestOutputKind.DELTA
        found.logprobs = self.top_logprobs
        found.prompt_logprobs = self.prompt_logprobs
        found.presence_penalty, found.frequency_penalty = self.changes.presence, self.changes.frequency
        found.logit_bias = dict(self.changes.bias) or None
        found.min_tokens = self.changes.least
        if self.prompt_logprobs is not None:
            found.skip_reading_prefix_cache = True
        return found

    def stepped(self, number: int, output: Any) -> None:
        """Send what has come."""
        if self.prompt_logprobs is not None and number not in self._echoed:
            self._echoed.add(number)
            ids = self.prompts[number].token_ids
            if len(output.prompt_logprobs or ()) != len(ids):
                raise CaptureError(f"vLLM gave logprobs of {len(output.prompt_logprobs or ())} of {len(ids)} tokens.")
            read = zip(ids, output.prompt_logprobs, strict=True)
            self.tell([self._token(number, id, each, prompt=True) for id, each in read])
        if not self.reads_only:
            (one,) = output.outputs
            likely = one.logprobs or [None] * len(one.token_ids)
            tokens = [self._token(number, id, each) for id, each in zip(one.token_ids, likely, strict=True)]
            if self.summary is not None:
                tokens = [replace(token, figures=self._figures(number, output.request_id)) for token in tokens]
            self.tell(tokens)

    def _figures(self, number: int, name: str) -> Figures:
        """Those of the row that the next token was predicted from. Raises CaptureError where it is missing."""
        assert self.summary is not None
        position = len(self.prompts[number].token_ids) + self._told[number] - 1
        self._told[number] += 1
        kept = self.engine.row(name, position)
        if missing := [tensor_name(each.key) for each in self.summary.selectors if tensor_name(each.key) not in kept]:
            raise CaptureError(f"vLLM's worker has no row of token {position}: {', '.join(missing)}.")
        rows = torch.cat([kept[tensor_name(each.key)] for each in self.summary.selectors])
        rows = rows if self.unembedding else rows.flatten(1).float().norm(dim=1)
        return figures_of(self.unembedding, rows, position, self.summary)

    def going_on(self) -> None:
        """Raises ApiError where the client has left."""
        if self.cancelled():
            raise cancelled()

    def _token(self, row: int, id: int, likely: Mapping[int, Any] | None, prompt: bool = False) -> Token:
        if likely is None:
            return Token(row, id, prompt=prompt)
        count, rank = (self.prompt_logprobs, likely[id].rank) if prompt else (self.top_logprobs, None)
        return Token(row, id, likely[id].logprob, likeliest(likely, count or 0), rank, prompt=prompt)


def likeliest(likely: Mapping[int, Any], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens and their logprobs; vLLM adds the token itself where it is none of them."""
    best = sorted(likely.items(), key=lambda item: -item[1].logprob)[:count]
    return tuple((id, each.logprob) for id, each in best)
