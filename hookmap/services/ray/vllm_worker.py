"""A worker whose model vLLM runs: the batches that it is given share vLLM's own, and each is told when it has ended.

One thread has the engine, as vLLM asks for it; the threads in which Ray calls the worker wait for it.
"""

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from hookmap.activations import Activation, Sample
from hookmap.capture.prepare import Prepared
from hookmap.loading.memory import used
from hookmap.loading.prompts import Prompt
from hookmap.services.ray.worker import BatchResult, Opened, RunningCapture, Worker
from hookmap.stores.group_writer import PartWriter
from hookmap.stores.manifest import versions
from hookmap.vllm.model import open_on_vllm

log = logging.getLogger("hookmap")

LOOK = 1.0
"""seconds between two looks whether the driver still waits for a capture"""


@dataclass(eq=False)
class Batch:
    """Prompts that were given together, and become finished together."""

    capture: RunningCapture
    prompts: Sequence[Prompt]
    """all of the capture"""
    numbers: Sequence[int]
    ended: Future[BatchResult] = field(default_factory=Future)


class VllmWorker(Worker):
    """One model on vLLM. Several threads may call it."""

    def __init__(self, source: str, opening: Mapping[str, Any]) -> None:
        """`opening`: the other arguments of `hookmap.open_on_vllm`. Loads nothing yet."""
        super().__init__(source, opening)
        self._thread = ThreadPoolExecutor(1, "vLLM")
        self._coming = deque[Batch]()

    def call(self, method: str, *arguments: Any) -> Any:
        """Run the method of this name when the engine is free; a batch, beside those that run."""
        if method != "run":
            return self._thread.submit(self._alone, super().call, method, *arguments).result()
        capture, prompts, _, wanted = arguments
        coming = Batch(capture, prompts, wanted)
        self._coming.append(coming)
        self._thread.submit(self._serve)
        return coming.ended.result()

    def open(self) -> Opened:
        """Load the model. Raises what `hookmap.open_on_vllm` does."""
        # In processes of its own, vLLM binds threads to cores: to the same ones in each of several workers.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # rows of an engine here cross no other process
        self._model = model = open_on_vllm(self._source, functions=self._functions, **self._opening)
        engine = model.engine_of_vllm
        return Opened(socket.gethostname(), {**versions(), "vllm": engine.version}, engine.in_flight)

    def _alone(self, called: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return called(*arguments)
        except Exception:
            self._end_where_dead()
            raise

    def _serve(self) -> None:
        """Run the batches that have come, and those that come meanwhile."""
        while self._coming:
            first = self._coming[0]
            try:
                first.capture.check_folder()
                prepared = self.prepared(first.capture.id, first.capture.options, first.prompts)
            except BaseException as error:
                self._end_where_dead()
                self._coming.popleft().ended.set_exception(error)
                continue
            serving = Serving(prepared, first.capture, self._coming)
            try:
                serving.run()
            except BaseException as error:
                self._end_where_dead()
                serving.fail(error)

    def _end_where_dead(self) -> None:
        """End this process where vLLM's engine, or one of its ranks, has died: the driver replaces it."""
        if self._model is None:
            return
        try:
            self._model.engine_of_vllm.call("hookmap_drop", [])  # type: ignore[attr-defined]
        except Exception:
            log.exception("vLLM's engine has died, and this worker with it")
            os._exit(1)


class Serving:
    """The batches of one capture, as they run. It is the sink of their rows."""

    def __init__(self, prepared: Prepared, capture: RunningCapture, coming: "deque[Batch]") -> None:
        self._prepared, self._capture, self._coming = prepared, capture, coming
        self._told = prepared.run.lost.copy()
        self._looked = time.monotonic()
        self._waiting = deque[int]()
        self._batches: dict[int, Batch] = {}
        """by the numbers of their prompts"""
        self._writers: dict[int, PartWriter] = {}
        self._samples: dict[Batch, list[Sample]] = {}

    def run(self) -> None:
        """Run the batches that have come for this capture, and those that come before the last one has ended.

        Raises what a run does, and StoreError where the driver has left the folder meanwhile.
        """
        run = self._prepared.run
        run.going_on = self._go_on  # type: ignore[attr-defined]  # called after each step
        self._join()
        while self._waiting:
            run.batch(self._waiting, self._prepared.of_rows(self))

    def fail(self, error: BaseException) -> None:
        """The batches that run have failed."""
        for batch in self._samples:
            batch.ended.set_exception(error)

    def _go_on(self) -> None:
        if time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            self._capture.check_folder()
        self._join()

    def _join(self) -> None:
        while self._coming and self._coming[0].capture.id == self._capture.id:
            batch = self._coming.popleft()
            self._samples[batch] = []
            writer = self._capture.writer(self._prepared.manifest)
            self._batches |= dict.fromkeys(batch.numbers, batch)
            self._writers |= dict.fromkeys(batch.numbers, writer)
            self._waiting.extend(batch.numbers)

    def write(self, activation: Activation) -> None:
        """See `Sink`."""
        self._writers[activation.sample].write(activation)

    def finish(self, sample: Sample) -> None:
        """See `Sink`. The samples of a batch become one group, when the last one has its rows."""
        batch, writer = self._batches[sample.sample], self._writers[sample.sample]
        samples = self._samples[batch]
        samples.append(sample)
        if len(samples) < len(batch.numbers):
            return
        for each in samples:
            writer.finish(each)
            del self._batches[each.sample], self._writers[each.sample]
        del self._samples[batch]
        batch.ended.set_result(self._result(writer))

    def abandon(self) -> None:
        """See `Sink`."""
        for writer in self._writers.values():
            writer.abandon()

    def _result(self, writer: PartWriter) -> BatchResult:
        run = self._prepared.run
        lost, self._told = run.lost - self._told, run.lost.copy()
        run.memory.look()
        return BatchResult(tuple(writer.groups), (), max(run.memory.peak, used()), dict(lost))
