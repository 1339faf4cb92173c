"""The queue of a model on vLLM: each request has a thread, and joins the batch that runs."""

import time
from concurrent.futures import ThreadPoolExecutor

from hookmap.loading.memory import MemoryUse
from hookmap.services.server.errors import cancelled, failed
from hookmap.services.server.job_queue import JobQueue
from hookmap.services.server.jobs import Event, Job
from hookmap.services.server.vllm_run import run_on_vllm
from hookmap.vllm.model import VllmModel


class VllmScheduler(JobQueue):
    """Runs the jobs of one model. vLLM decides which of their tokens run together."""

    def __init__(self, hm: VllmModel, queue: int) -> None:
        """`queue`: jobs that may wait; those that run are as many as vLLM runs together."""
        super().__init__(queue)
        self._hm = hm
        self._threads = ThreadPoolExecutor(self.together, thread_name_prefix="request")

    @property
    def together(self) -> int:
        """See `JobQueue`."""
        return int(self._hm.engine_of_vllm.in_flight)

    def _came(self, job: Job) -> None:
        self._threads.submit(self._run, job)

    def _stop(self) -> None:
        self._threads.shutdown()

    def _run(self, job: Job) -> None:
        start = time.perf_counter()
        self._begin(job)
        try:
            event: Event = cancelled() if job.cancelled.is_set() else run_on_vllm(self._hm, job)
        except BaseException as error:
            event = failed(error, [job.id])
        self._end(job, event, MemoryUse(), time.perf_counter() - start)
