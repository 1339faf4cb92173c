"""Runs the requests of a model: most join a batch that runs, those that cannot run one after another beside it.

Two threads, which share the model: hooks of one ignore the passes of the other. Where requests of a model join nothing,
or a batch has one row, there is one thread: plain requests that wait together then share a batch (`batch_limits`).
"""

import threading
import time
from collections.abc import Sequence
from functools import partial

import torch

from hookmap.capture.run import device_of
from hookmap.loading.memory import MemoryUse
from hookmap.model import HookedModel
from hookmap.services.server.batch_limits import BatchLimits
from hookmap.services.server.errors import cancelled, failed
from hookmap.services.server.job_queue import JobQueue
from hookmap.services.server.jobs import Event, Job
from hookmap.services.server.joining import why_alone
from hookmap.services.server.passing import in_passing
from hookmap.services.server.running_batch import RunningBatch
from hookmap.services.server.shared_run import SharedRun
from hookmap.services.server.watched_run import run_watched


class Scheduler(JobQueue):
    """Whatever goes wrong with one job, the next ones run."""

    def __init__(self, name: str, hm: HookedModel, queue: int, limits: BatchLimits, joins: bool = False) -> None:
        """`limits`: what a batch may hold. `joins`: whether requests join a batch that runs."""
        super().__init__(queue)
        self._hm, self._limits, self._joins = hm, limits, joins
        work = [self._run_others, *([self._run_joined] if joins else [])]
        self._threads = [threading.Thread(target=each, name=f"model {name}", daemon=True) for each in work]
        for thread in self._threads:
            thread.start()

    @property
    def together(self) -> int:
        """See `JobQueue`."""
        return self._limits.rows if self._joins else 1

    def submit(self, job: Job) -> None:
        """See `Queue`."""
        job.joins = self._joins and self._limits.takes(job) and why_alone(job, self._hm) is None
        super().submit(job)

    def _stop(self) -> None:
        for thread in self._threads:
            thread.join()

    # The batch that runs

    def _run_joined(self) -> None:
        begun = dict[Job, tuple[float, MemoryUse]]()

        def ended(job: Job, event: Event, together: int) -> None:
            start, memory = begun.pop(job)
            self._end(job, event, memory, time.perf_counter() - start, together)

        batch = RunningBatch(self._hm, self._limits, ended)
        try:
            while self._waits(batch):
                try:
                    while (job := self._joining(batch)) is not None:
                        memory = _memory_use(device_of(self._hm.hooks))
                        begun[job] = time.perf_counter(), memory
                        self._begin(job)
                        batch.begin(job, memory)
                    batch.step()
                except BaseException as error:  # nothing of one request ends this thread
                    batch.fail(error)
        finally:
            batch.close()

    def _waits(self, batch: RunningBatch) -> bool:
        """Wait for work. False: there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: not batch.idle or self._closing or any(job.joins for job in self._waiting))
            return not batch.idle or any(job.joins for job in self._waiting)

    def _joining(self, batch: RunningBatch) -> Job | None:
        """The first job that waits to join, where there is room for it."""
        with self._changed:
            first = next((job for job in self._waiting if job.joins), None)
        return first if first is not None and batch.has_room(first) else None

    # All others

    def _run_others(self) -> None:
        while jobs := self._next():
            in_passing(partial(self._run, jobs))
            del jobs  # or their tensors would stay in memory until the next ones come

    def _next(self) -> list[Job]:
        """Wait for a job, and take it with those that may share its batch. []: the thread ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or any(not job.joins for job in self._waiting))
            waiting = [job for job in self._waiting if not job.joins]
            if not waiting:
                return []
            jobs = [waiting[0], *self._limits.companions(waiting[0], waiting[1:])]
            self._begin(*jobs)
            return jobs

    def _run(self, jobs: Sequence[Job]) -> None:
        """Run jobs, and tell each its last event."""
        left, memory, start = list(jobs), _memory_use(device_of(self._hm.hooks)), time.perf_counter()

        def ended(job: Job, event: Event) -> None:
            left.remove(job)
            self._end(job, event, memory, time.perf_counter() - start, len(jobs))

        try:
            if jobs[0].plain:
                SharedRun(self._hm, jobs, memory, ended).run(self._limits)
            else:
                (job,) = jobs
                ended(job, cancelled() if job.cancelled.is_set() else run_watched(self._hm, job, memory))
        except BaseException as error:
            event = failed(error, [job.id for job in left])
            for job in list(left):
                ended(job, event)


def _memory_use(device: torch.device) -> MemoryUse:
    if device.type != "cuda":
        return MemoryUse()
    torch.cuda.reset_peak_memory_stats(device)
    return MemoryUse(device=device)
