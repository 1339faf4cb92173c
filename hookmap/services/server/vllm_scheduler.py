"""The queue of a model on vLLM: each request has a thread, and joins the batch that runs."""

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from hookmap.loading.memory import MemoryUse
from hookmap.services.server.errors import cancelled, failed, unloading
from hookmap.services.server.jobs import Event, Job
from hookmap.services.server.scheduler import log_end, queue_full, unloading_for_cancelled
from hookmap.services.server.vllm_run import run_on_vllm
from hookmap.vllm.model import VllmModel


class VllmScheduler:
    """Runs the jobs of one model. See `Queue`. vLLM decides which of their tokens run together."""

    def __init__(self, hm: VllmModel, queue: int) -> None:
        """`queue`: jobs that may wait; those that run are as many as vLLM runs together."""
        self._hm, self._queue = hm, queue
        self._threads = ThreadPoolExecutor(hm.engine_of_vllm.in_flight, thread_name_prefix="request")
        self._waiting, self._running = list[Job](), list[Job]()
        self._changed = threading.Condition()
        self._closing = False
        self._cut_off = False
        self._seconds = deque([1.0], maxlen=16)
        """of recent jobs"""

    @property
    def waiting(self) -> int:
        """See `Queue`."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """See `Queue`."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """See `Queue`."""
        with self._changed:
            if self._closing:
                raise unloading()
            if len(self._waiting) >= self._queue:
                together = self._hm.engine_of_vllm.in_flight
                raise queue_full(len(self._waiting), sum(self._seconds) / len(self._seconds) / together)
            self._waiting.append(job)
            self._threads.submit(self._run, job)

    def close(self, timeout: float | None = None) -> None:
        """See `Queue`."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._waiting and not self._running, timeout)
            self._cut_off = True
            for job in (*self._waiting, *self._running):
                job.cancelled.set()
        self._threads.shutdown()

    def _run(self, job: Job) -> None:
        start = time.perf_counter()
        with self._changed:
            self._waiting.remove(job)
            self._running.append(job)
        try:
            event: Event = cancelled() if job.cancelled.is_set() else run_on_vllm(self._hm, job)
        except BaseException as error:
            event = failed(error, [job.id])
        if self._cut_off:
            event = unloading_for_cancelled(event)
        seconds = time.perf_counter() - start
        log_end(job, event, MemoryUse(), seconds)
        with self._changed:
            self._seconds.append(seconds)
            self._running.remove(job)
            self._changed.notify_all()
        job.tell(event)
