"""One request that reads, records or changes activations: a capture whose tokens are sent as they come.

It ends when its client leaves. All other requests run in `shared_run`.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import StoppingCriteria

from hookmap.activations import Activation, Sample, Sink
from hookmap.analysis.unembedding import Unembeds
from hookmap.capture.batches import Generating
from hookmap.capture.engines.hooks import HooksEngine
from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.finiteness import why_not_finite
from hookmap.capture.interventions.edits import Editor
from hookmap.capture.own_rows import OwnRows, Place
from hookmap.capture.rows import RowSelection
from hookmap.capture.run import running
from hookmap.loading.memory import MemoryUse
from hookmap.loading.prompts import Prompt
from hookmap.loading.stopping import Finished
from hookmap.model import HookedModel
from hookmap.services.server.echo import Echo
from hookmap.services.server.editing import PARAM, in_words, planned
from hookmap.services.server.errors import NOT_FINITE, ApiError, cancelled, not_finite
from hookmap.services.server.jobs import Job, Result
from hookmap.services.server.scores import ScoreChanges
from hookmap.services.server.summaries import Summarising, Summary
from hookmap.services.server.tokens import Finite, Likely, Token, beside, told


def run_watched(hm: HookedModel, job: Job, memory: MemoryUse) -> Result:
    """Run a job alone. Raises ApiError, and whatever the model raises."""
    recorder, run = job.recorder, watched(hm, job, memory)
    try:
        sink = Gathered(recorder.begin() if recorder else None, job.reads_only)
        together = _together(hm, job)
        for first in range(0, len(job.prompts), together):
            run.batch(range(first, min(first + together, len(job.prompts))), sink)
        new = tuple(sample.token_ids[sample.prompt_tokens :] for sample in sink.samples)
        return Result(new, recorder.end(sink.samples, run.lost) if recorder else None)
    except BaseException as error:
        if recorder:
            recorder.drop()
        if isinstance(error, ApiError) and error.code == NOT_FINITE:
            raise fault(hm, job) from None
        raise


def watched(hm: HookedModel, job: Job, memory: MemoryUse) -> "WatchedRun":
    """The run of a job. The model may run on other prompts for its interventions. Raises ApiError."""
    recorder = job.recorder
    run = WatchedRun(
        hm.hooks,
        hm.tokenizer,
        recorder.selectors if recorder else (),
        job.prompts,
        recorder.selection if recorder else RowSelection(),
        recorder.matching if recorder else frozenset(),
        None,
        memory,
        max_new_tokens=job.max_new_tokens,
        config=job.config,
        stop=job.stop,
        seed=job.seed,
        tell=job.tell,
        cancelled=job.cancelled.is_set,
        top_logprobs=job.top_logprobs,
        summary=job.summary,
        unembedding=job.summary.reading(hm) if job.summary else None,
        echo=None if job.prompt_logprobs is None else Echo(job.prompt_logprobs),
        changes=job.changes,
        reads_only=job.reads_only,
    )
    if job.interventions:
        run.edits = planned(hm, job.interventions, job.prompts, job.max_new_tokens).edits
    return run


def fault(hm: HookedModel, job: Job) -> ApiError:
    """Whose fault it is that the scores of a job are no numbers: the model's own, or its interventions'."""
    with running(hm.hooks):
        own = [why_not_finite(hm.hooks, hm.map, prompt) for prompt in job.prompts[:: job.choices] if job.interventions]
    return not_finite(() if any(own) else in_words(job.interventions), PARAM)


def _together(hm: HookedModel, job: Job) -> int:
    """How many rows run together: the choices of a prompt, unless its images may not share a batch."""
    further = job.choices > 1 and job.prompts[0].inputs is not None
    return 1 if further and hm.pads.why_not(harvest=False, examples=job.prompts) is not None else job.choices


@dataclass
class WatchedRun(Generating):
    """A capture that sends each token of each row."""

    tell: Callable[[list[Token]], None] = field(default=lambda tokens: None)
    cancelled: Callable[[], bool] = field(default=lambda: False)
    top_logprobs: int | None = None
    """the number of likeliest tokens that are sent with each token; None: no logprobs"""
    summary: Summary | None = None
    unembedding: Unembeds | None = None
    """what the summary's lens applies"""
    summarising: Summarising | None = None
    """the summary of the batch that runs"""
    echo: Echo | None = None
    changes: ScoreChanges = field(default_factory=ScoreChanges)
    reads_only: bool = False
    """whether the prompt is only read: one token is generated, and neither sent nor recorded"""

    def batch(self, numbers: Sequence[int], sink: Sink) -> None:
        """See `Run.batch`; with an echo, the rows of one prompt."""
        prompt = self.prompts[numbers[0]].token_ids
        with self.echo.listening(self.engine.root, prompt) if self.echo else contextlib.nullcontext():
            super().batch(numbers, sink)

    def watching(self, observer: OwnRows, editor: Editor | None) -> contextlib.AbstractContextManager[None]:
        """See `HooksEngine.watching`."""
        assert isinstance(self.engine, HooksEngine)
        return self.engine.watching(observer, editor)

    def own_rows(self, layout: BatchLayout, sink: Sink, place: Place) -> OwnRows:
        """An observer of rows that stand in a batch with others."""
        kept: dict[str, Any] = {"keys": self._keys, "selection": self.selection, "matching": self.matching}
        found: OwnRows
        if self.summary is None:
            found = OwnRows(self.selectors, layout, sink.write, **kept)
        else:
            what = self.summary, self.unembedding, self.selectors
            found = OwnSummarising(*what, layout, sink.write, **kept)
        found.place = place
        return found

    def keep(self, observer: OwnRows, editor: Editor | None, sink: Sink, new: Sequence[Sequence[int]]) -> None:
        """Hand on the samples of such a batch, which have ended. `new`: of each row, the generated tokens."""
        counts = observer.finish(observer.layout.width + max(map(len, new)))
        self._count(observer)
        if editor is not None:
            editor.finish()
        for row, number in enumerate(observer.layout.samples):
            self._finish(sink, observer, row, self.prompts[number], list(new[row][: counts[row]]))

    def _observer(self, layout: BatchLayout, sink: Sink) -> Observer:
        found = self._watching(layout, sink)
        found.every_logit = self.echo is not None
        return found

    def _watching(self, layout: BatchLayout, sink: Sink) -> Observer:
        if self.summary is None:
            return super()._observer(layout, sink)
        kept: dict[str, Any] = {"keys": self._keys, "selection": self.selection, "matching": self.matching}
        what = self.summary, self.unembedding, self.selectors
        self.summarising = Summarising(*what, layout, sink.write, **kept)
        return self.summarising

    def _inputs(self, prompts: Sequence[Prompt], layout: BatchLayout, finished: Finished) -> dict[str, Any]:
        likely = None if self.top_logprobs is None else Likely()
        inputs = super()._inputs(prompts, layout, finished)
        inputs["stopping_criteria"] = [_AfterStep(self, finished, layout.samples, finite := Finite(), likely)]
        inputs["logits_processor"] = [finite]
        if likely is not None:
            inputs["generation_config"], processors = beside(likely, self.config)
            inputs["logits_processor"] += processors
        inputs["logits_processor"] += self.changes.processors(layout.width)
        return inputs


class OwnSummarising(OwnRows, Summarising):
    """`Summarising` of some rows of a batch."""


class Gathered:
    """A sink that remembers the samples, and passes everything on to another sink if there is one.

    `reads_only`: the samples are cut to their prompts; what was generated has no rows.
    """

    def __init__(self, sink: Sink | None = None, reads_only: bool = False) -> None:
        self.samples: list[Sample] = []
        self._sink, self._reads_only = sink, reads_only

    def write(self, activation: Activation) -> None:
        if self._sink is not None:
            self._sink.write(activation)

    def finish(self, sample: Sample) -> None:
        if self._reads_only:
            sample = replace(sample, text="", token_ids=sample.token_ids[: sample.prompt_tokens])
        self.samples.append(sample)
        if self._sink is not None:
            self._sink.finish(sample)

    def abandon(self) -> None:
        """See Sink."""


class _AfterStep(StoppingCriteria):  # type: ignore[misc]
    """After each step: ends the run whose client has left, and sends the tokens of rows that had not ended."""

    def __init__(
        self, run: WatchedRun, finished: Finished, rows: tuple[int, ...], finite: Finite, likely: Likely | None
    ) -> None:
        self._run, self._finished, self._rows, self._finite, self._likely = run, finished, rows, finite, likely
        self._ended = [False] * len(rows)
        self._looked = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        if self._run.cancelled():
            raise cancelled()
        if any(wrong and not ended for wrong, ended in zip(self._finite.wrong, self._ended, strict=True)):
            raise not_finite()
        done: torch.Tensor = self._finished(input_ids, scores, **kwargs)
        newest = enumerate(zip(self._rows, input_ids[:, -1].tolist(), strict=True))
        tokens = [told(self._likely, place, row, id, self._run.top_logprobs) for place, (row, id) in newest]
        if self._run.summarising is not None:
            figures = self._run.summarising.figures(input_ids.shape[1])
            tokens = [replace(token, figures=each) for token, each in zip(tokens, figures, strict=True)]
        if self._run.echo is not None and not self._looked:
            self._run.tell([token for row in self._rows for token in self._run.echo.tokens(row)])
        if not self._run.reads_only:
            self._run.tell([token for token, ended in zip(tokens, self._ended, strict=True) if not ended])
        self._ended = [a or b for a, b in zip(self._ended, done.tolist(), strict=True)]
        self._looked += 1
        if self._looked % 64 == 1:
            self._run.memory.look()
        return done
