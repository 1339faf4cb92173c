"""What the schedulers have in common: who waits, who runs, and how a queue is closed."""

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque

from hookmap.loading.memory import MemoryUse
from hookmap.services.server.errors import ApiError, unloading
from hookmap.services.server.jobs import Event, Job, Result

log = logging.getLogger("hookmap.server")


class JobQueue(ABC):
    """The jobs of one model, first come, first served. See `Queue`."""

    def __init__(self, queue: int) -> None:
        """`queue`: jobs that may wait."""
        self._queue = queue
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._cut_off = False
        """whether jobs were cancelled because the model is unloaded, not because a client left"""
        self._seconds = 1.0
        """the duration of recent jobs, a moving average"""

    @property
    def waiting(self) -> int:
        """See `Queue`."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """See `Queue`."""
        return len(self._running)

    @property
    @abstractmethod
    def together(self) -> int:
        """Jobs that run at once."""

    def submit(self, job: Job) -> None:
        """See `Queue`."""
        with self._changed:
            if self._closing:
                raise unloading()
            if len(self._waiting) >= self._queue:
                raise queue_full(len(self._waiting), self._seconds / self.together)
            self._waiting.append(job)
            self._came(job)
            self._changed.notify_all()

    def _came(self, job: Job) -> None:  # noqa: B027 - a thread that looks for jobs itself need not be told
        """A job waits. Called with the lock held."""

    def close(self, timeout: float | None = None) -> None:
        """See `Queue`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and not self._running, timeout)
            if self._waiting or self._running:
                self._cut_off = True
                for job in (*self._waiting, *self._running):
                    job.cancelled.set()
        self._stop()

    @abstractmethod
    def _stop(self) -> None:
        """Return when the threads have ended. No more jobs come."""

    def _begin(self, *jobs: Job) -> None:
        """These jobs wait no more: they run."""
        with self._changed:
            for job in jobs:
                self._waiting.remove(job)
                self._running.append(job)

    def _end(self, job: Job, event: Event, memory: MemoryUse, seconds: float, together: int = 1) -> None:
        """A job has ended with this event. `together`: see `log_end`."""
        if self._cut_off:
            event = unloading_for_cancelled(event)
        log_end(job, event, memory, seconds, together)
        with self._changed:
            self._seconds = 0.8 * self._seconds + 0.2 * seconds
            self._running.remove(job)
            self._changed.notify_all()
        job.tell(event)


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
