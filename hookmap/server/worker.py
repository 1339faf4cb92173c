"""One thread for each model, and a bounded queue before it: requests run one after another, in the order they came.

Rows of one request run together; requests are not put into one batch, because pads change the arithmetic in the last
bits, and then neither the text nor a captured tensor would be that of the prompt alone.
"""

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from hookmap.activations import Sample, Sink
from hookmap.engines.editing import Edit
from hookmap.errors import HookmapError
from hookmap.interventions import Intervention
from hookmap.kept import Kept, matching_tokens
from hookmap.memory_use import MemoryUse
from hookmap.model import HookedModel
from hookmap.plan import plan
from hookmap.prompts import Prompt
from hookmap.runs import device_of, vocabulary_of
from hookmap.selectors import Selector
from hookmap.server.answering import Answering, CancelledError, Gathered, Plain, Token
from hookmap.server.errors import ApiError, bad, of_exception
from hookmap.server.summaries import Summary

log = logging.getLogger("hookmap.server")


class Keeper(Protocol):
    """Where the rows of one request go."""

    selectors: tuple[Selector, ...]
    kept: Kept

    def begin(self) -> Sink:
        """The run begins: rows may come. Raises ApiError where there is no room."""

    def end(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """All rows came. Returns what the answer says of them."""

    def drop(self) -> None:
        """The run failed: forget what came."""


@dataclass(frozen=True)
class Result:
    """What came of a job."""

    samples: tuple[Sample, ...]
    """one for each row, in their order"""
    meta: dict[str, Any] | None
    """what the answer says of its activations"""


Event = list[Token] | Result | ApiError


@dataclass
class Job:
    """One request, as the model runs it."""

    id: str
    prompts: tuple[Prompt, ...]
    """one for each row"""
    together: int
    """rows that run in one batch: those of one prompt, so that there are no pads"""
    config: GenerationConfig
    max_new_tokens: int
    stop: tuple[str, ...]
    seed: int | None
    keeper: Keeper | None = None
    interventions: tuple[Intervention, ...] = ()
    top_logprobs: int | None = None
    summary: Summary | None = None
    emit: Callable[[Event], None] = field(default=lambda event: None)
    """called in the model's thread: each step's tokens, then a Result or an ApiError"""
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Runs jobs on one model."""

    def __init__(self, name: str, hm: HookedModel, queue: int) -> None:
        """`queue`: jobs that may wait."""
        self._hm = hm
        self._hooks = hm._hooks
        self._plain = Plain(hm.model, self._hooks.root)
        self._most = queue
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._ending = False
        self._seconds = 1.0
        """that a job took, lately"""
        self._thread = threading.Thread(target=self._work, name=f"model {name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that the model works on."""
        return int(self._running is not None)

    def submit(self, job: Job) -> None:
        """Take a job. Raises ApiError: 429 where too many wait, 503 where the model is being unloaded."""
        with self._changed:
            if self._ending:
                raise ApiError(503, "this model is being unloaded.", code="model_unloading")
            if len(self._waiting) >= self._most:
                seconds = max(1, round(self._seconds * len(self._waiting)))
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests wait for this model already, the most it lets wait; "
                    f"try again in {seconds} s.",
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self._waiting.append(job)
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> None:
        """Take no more jobs; those that wait are run within `timeout` seconds, and then cancelled."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                for job in (*self._waiting, *filter(None, [self._running])):
                    job.cancelled.set()
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._ending)
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            start = time.perf_counter()
            event = self._answer(job)
            self._seconds = 0.8 * self._seconds + 0.2 * (time.perf_counter() - start)
            with self._changed:
                self._running = None
            _emit(job, event)
            del job, event  # or its tensors would stay until the next one comes

    def _answer(self, job: Job) -> Event:
        """Run a job. Whatever goes wrong with it, the next one runs."""
        if job.cancelled.is_set():
            return ApiError(499, "cancelled", code="cancelled")
        memory, start = self._memory(), time.perf_counter()
        try:
            result: Event = self._run(job, memory)
        except BaseException as error:
            result = _told(error)
            if result.status >= 500:
                log.error("request %s: %s", job.id, result, exc_info=None if result.code == "out_of_memory" else error)
            # The traceback holds the tensors of the run that failed.
            error.__traceback__ = None
            error.__context__ = error.__cause__ = None
            del error
        if isinstance(result, ApiError):
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        _log(job, result, memory, time.perf_counter() - start)
        return result

    def _memory(self) -> MemoryUse:
        device = device_of(self._hooks)
        if device.type != "cuda":
            return MemoryUse()
        torch.cuda.reset_peak_memory_stats(device)
        return MemoryUse(device=device)

    def _run(self, job: Job, memory: MemoryUse) -> Result:
        keeper = job.keeper
        run = Answering(
            self._hooks if keeper or job.interventions or job.summary else self._plain,
            self._hm.tokenizer,
            keeper.selectors if keeper else (),
            job.prompts,
            keeper.kept if keeper else Kept(),
            matching_tokens(keeper.kept, self._hm.tokenizer, vocabulary_of(self._hooks)) if keeper else frozenset(),
            None,
            memory,
            max_new_tokens=job.max_new_tokens,
            config=job.config,
            stop=job.stop,
            seed=job.seed,
            tell=lambda tokens: _emit(job, tokens),
            cancelled=job.cancelled.is_set,
            top_logprobs=job.top_logprobs,
            summary=job.summary,
            readout=job.summary.reading(self._hm) if job.summary else None,
        )
        if job.interventions:
            run.edits = self._edits(job)
        try:
            sink = Gathered(keeper.begin() if keeper else None)
            for first in range(0, len(job.prompts), job.together):
                run.batch(range(first, min(first + job.together, len(job.prompts))), sink)
            return Result(tuple(sink.samples), keeper.end(sink.samples) if keeper else None)
        except BaseException:
            if keeper:
                keeper.drop()
            raise

    def _edits(self, job: Job) -> tuple[Edit, ...]:
        """What the job writes. It is planned here, because other prompts may have to run for it. Raises ApiError."""
        try:
            return plan(self._hm, job.interventions, job.prompts, job.max_new_tokens, "auto").edits
        except HookmapError as error:
            raise bad(str(error), "hookmap.interventions", type(error).__name__) from error


def _emit(job: Job, event: Event) -> None:
    try:
        job.emit(event)
    except RuntimeError:  # the event loop that waited for it is gone
        job.cancelled.set()


def _told(error: BaseException) -> ApiError:
    if isinstance(error, CancelledError):
        return ApiError(499, "cancelled", code="cancelled")
    text = str(error).partition("\n")[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return ApiError(
            503,
            "out of memory on this request; the server goes on. Ask for fewer tokens, choices or points. "
            f"({text or type(error).__name__})",
            code="out_of_memory",
            headers={"Retry-After": "1"},
        )
    return of_exception(error)


def _log(job: Job, result: Event, memory: MemoryUse, seconds: float) -> None:
    figures = ", ".join(f"{name} {value / 1e6:.1f}" for name, value in memory.figures().items())
    if isinstance(result, Result):
        new = sum(len(sample.token_ids) - sample.prompt_tokens for sample in result.samples)
        outcome = f"{new} tokens, {new / max(seconds, 1e-9):.1f} tokens/s"
    else:
        outcome = getattr(result, "code", None) or "failed"
    log.info("request %s: %s in %.2f s; memory in MB: %s", job.id, outcome, seconds, figures)
