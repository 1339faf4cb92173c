"""One thread for each model, and a bounded queue before it: whoever came first runs first.

Requests that keep activations, change them, or draw with a seed run alone: in a batch with others pads change the
arithmetic in the last bits. Plain ones that wait together may share a batch (`batch`).
"""

import logging
import threading
import time
from collections import deque
from functools import partial

import torch

from hookmap.capture.rows import RowSelection
from hookmap.capture.run import device_of
from hookmap.loading.memory import MemoryUse
from hookmap.model import HookedModel
from hookmap.services.server.echo import Echo
from hookmap.services.server.editing import planned
from hookmap.services.server.errors import ApiError, cancelled, failed, unloading
from hookmap.services.server.jobs import Event, Job, Result
from hookmap.services.server.shared_run import Room, Together
from hookmap.services.server.watched_run import Answering, Gathered

log = logging.getLogger("hookmap.server")


class Worker:
    """Runs jobs on one model."""

    def __init__(self, name: str, hm: HookedModel, queue: int, room: Room) -> None:
        """`queue`: jobs that may wait. `room`: which of them run together."""
        self._hm = hm
        self._most = queue
        self._room = room
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._ending = False
        self._cut = False
        """whether what still ran at the end was cancelled, by nobody who waited for it"""
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
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Take a job. Raises ApiError: 429 where too many wait, 503 where the model is being unloaded."""
        with self._changed:
            if self._ending:
                raise unloading()
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
                self._cut = True
                for job in (*self._waiting, *self._running):
                    job.cancelled.set()
            self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            start = time.perf_counter()
            self._answer(jobs)
            self._seconds = 0.8 * self._seconds + 0.2 * (time.perf_counter() - start) / len(jobs)
            del jobs  # or their tensors would stay until the next ones come

    def _next(self) -> list[Job]:
        """Waits for a job, and takes those that may run beside it. None: the thread ends."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._ending)
            if not self._waiting:
                return []
            first = self._waiting.popleft()
            jobs = [first, *self._room.beside(first, self._waiting)]
            for job in jobs[1:]:
                self._waiting.remove(job)
            self._running = list(jobs)
            return jobs

    def _answer(self, jobs: list[Job]) -> None:
        """Run jobs. Whatever goes wrong with them, the next ones run."""
        memory = self._memory()
        ended = partial(self._ended, memory, time.perf_counter(), len(jobs))
        try:
            if jobs[0].plain:
                Together(self._hm, jobs, memory, ended).run(self._room)
            else:
                (job,) = jobs
                ended(job, cancelled() if job.cancelled.is_set() else self._run(job, memory))
        except BaseException as error:
            left = list(self._running)
            event = failed(error, [job.id for job in left])
            for job in left:
                ended(job, event)

    def _ended(self, memory: MemoryUse, start: float, together: int, job: Job, event: Event) -> None:
        if self._cut and isinstance(event, ApiError) and event.code == "cancelled":
            event = unloading()
        _log(job, event, memory, time.perf_counter() - start, together)
        with self._changed:
            self._running.remove(job)
        job.tell(event)

    def _memory(self) -> MemoryUse:
        device = device_of(self._hm.hooks)
        if device.type != "cuda":
            return MemoryUse()
        torch.cuda.reset_peak_memory_stats(device)
        return MemoryUse(device=device)

    def _run(self, job: Job, memory: MemoryUse) -> Result:
        keeper = job.keeper
        run = Answering(
            self._hm.hooks,
            self._hm.tokenizer,
            keeper.selectors if keeper else (),
            job.prompts,
            keeper.selection if keeper else RowSelection(),
            keeper.matching if keeper else frozenset(),
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
            unembedding=job.summary.reading(self._hm) if job.summary else None,
            echo=Echo(job.top_logprobs or 0) if job.echo else None,
            reads_only=job.reads_only,
        )
        if job.interventions:
            # Here, because other prompts may have to run for it.
            run.edits = planned(self._hm, job.interventions, job.prompts, job.max_new_tokens).edits
        try:
            sink = Gathered(keeper.begin() if keeper else None, job.reads_only)
            for first in range(0, len(job.prompts), job.together):
                run.batch(range(first, min(first + job.together, len(job.prompts))), sink)
            new = tuple(sample.token_ids[sample.prompt_tokens :] for sample in sink.samples)
            return Result(new, keeper.end(sink.samples, run.lost) if keeper else None)
        except BaseException:
            if keeper:
                keeper.drop()
            raise


def _log(job: Job, event: Event, memory: MemoryUse, seconds: float, together: int) -> None:
    figures = ", ".join(f"{name} {value / 1e6:.1f}" for name, value in memory.figures().items())
    if isinstance(event, Result):
        new = sum(map(len, event.new))
        outcome = f"{new} tokens, {new / max(seconds, 1e-9):.1f} tokens/s"
    else:
        outcome = getattr(event, "code", None) or "failed"
    beside = f", in a batch of {together} requests" if together > 1 else ""
    log.info("request %s: %s in %.2f s%s; memory in MB: %s", job.id, outcome, seconds, beside, figures)
