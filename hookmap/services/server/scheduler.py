"""One thread for each model, and a bounded queue before it: first come, first served.

A request that records or changes activations, or draws with a seed, runs alone: in a batch with others, pads would
change the last bits of its arithmetic. Plain requests that wait together may share a batch (`batch_limits`).
"""

import logging
import threading
import time
from collections import deque
from functools import partial

import torch

from hookmap.capture.run import device_of
from hookmap.loading.memory import MemoryUse
from hookmap.model import HookedModel
from hookmap.services.server.batch_limits import BatchLimits
from hookmap.services.server.errors import ApiError, cancelled, failed, unloading
from hookmap.services.server.jobs import Event, Job, Result
from hookmap.services.server.shared_run import SharedRun
from hookmap.services.server.watched_run import run_watched

log = logging.getLogger("hookmap.server")


class Scheduler:
    """Runs the jobs of one model. Whatever goes wrong with one, the next ones run."""

    def __init__(self, name: str, hm: HookedModel, queue: int, limits: BatchLimits) -> None:
        """`queue`: jobs that may wait. `limits`: which of them run together."""
        self._hm, self._queue, self._limits = hm, queue, limits
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._cut_off = False
        """whether jobs were cancelled because the model is unloaded, not because a client left"""
        self._seconds = 1.0
        """the duration of recent jobs, a moving average"""
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
        """Queue a job. Raises ApiError: 429 where the queue is full, 503 where the model is being unloaded."""
        with self._changed:
            if self._closing:
                raise unloading()
            if len(self._waiting) >= self._queue:
                raise queue_full(len(self._waiting), self._seconds)
            self._waiting.append(job)
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> None:
        """Take no more jobs; those that wait may run for `timeout` seconds, and are cancelled then."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                self._cut_off = True
                for job in (*self._waiting, *self._running):
                    job.cancelled.set()
            self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            start = time.perf_counter()
            self._run(jobs)
            self._seconds = 0.8 * self._seconds + 0.2 * (time.perf_counter() - start) / len(jobs)
            del jobs  # or their tensors would stay in memory until the next ones come

    def _next(self) -> list[Job]:
        """Wait for a job, and take it with those that may share its batch. []: the thread ends."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._closing)
            if not self._waiting:
                return []
            first = self._waiting.popleft()
            jobs = [first, *self._limits.companions(first, self._waiting)]
            for job in jobs[1:]:
                self._waiting.remove(job)
            self._running = list(jobs)
            return jobs

    def _run(self, jobs: list[Job]) -> None:
        """Run jobs, and tell each its last event."""
        memory = _memory_use(device_of(self._hm.hooks))
        ended = partial(self._ended, memory, time.perf_counter(), len(jobs))
        try:
            if jobs[0].plain:
                SharedRun(self._hm, jobs, memory, ended).run(self._limits)
            else:
                (job,) = jobs
                ended(job, cancelled() if job.cancelled.is_set() else run_watched(self._hm, job, memory))
        except BaseException as error:
            left = list(self._running)
            event = failed(error, [job.id for job in left])
            for job in left:
                ended(job, event)

    def _ended(self, memory: MemoryUse, start: float, together: int, job: Job, event: Event) -> None:
        if self._cut_off:
            event = unloading_for_cancelled(event)
        log_end(job, event, memory, time.perf_counter() - start, together)
        with self._changed:
            self._running.remove(job)
        job.tell(event)


def _memory_use(device: torch.device) -> MemoryUse:
    if device.type != "cuda":
        return MemoryUse()
    torch.cuda.reset_peak_memory_stats(device)
    return MemoryUse(device=device)


def queue_full(waiting: int, each: float) -> ApiError:
    """The error for a request that finds so many waiting, of `each` seconds."""
    seconds = max(1, round(each * waiting))
    return ApiError(
        429,
        f"{waiting} requests wait for this model already, the most it lets wait; try again in {seconds} s.",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def unloading_for_cancelled(event: Event) -> Event:
    """What a job is told that ended because the model is unloaded, and not because its client left."""
    return unloading() if isinstance(event, ApiError) and event.code == "cancelled" else event


def log_end(job: Job, event: Event, memory: MemoryUse, seconds: float, together: int = 1) -> None:
    """Log how a request ended. `together`: requests of its batch."""
    figures = ", ".join(f"{name} {value / 1e6:.1f}" for name, value in memory.figures().items())
    if isinstance(event, Result):
        new = sum(map(len, event.new))
        outcome = f"{new} tokens, {new / max(seconds, 1e-9):.1f} tokens/s"
    else:
        outcome = getattr(event, "code", None) or "failed"
    beside = f", in a batch of {together} requests" if together > 1 else ""
    log.info("request %s: %s in %.2f s%s; memory in MB: %s", job.id, outcome, seconds, beside, figures)
