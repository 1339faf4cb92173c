"""Workers on Ray. A task goes to an idle worker; a worker that dies is replaced, and its tasks run again."""

import contextlib
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from hookmap.errors import CaptureError, HookmapError
from hookmap.extras import needed
from hookmap.services.ray.vllm_worker import VllmWorker
from hookmap.services.ray.worker import Opened, Worker

log = logging.getLogger("hookmap")

ATTEMPTS = 3
"""workers that may die of one task, or before they have loaded the model"""
REACHED = 10.0
"""seconds in which a cluster's port has to answer"""
TOGETHER = 8
"""tasks that a worker with vLLM has at once: their requests share its batches"""
WAITING = 30.0
"""seconds without news after which the log says what is waited for"""


@dataclass
class Task:
    """One call of a worker's method."""

    name: str
    """for messages"""
    method: str
    arguments: tuple[Any, ...]
    """large ones as a reference in a list: Ray does not resolve it, `_Actor` does"""
    deaths: list[str] = field(default_factory=list)
    """why each worker that had it died"""


class Pool:
    """A fixed number of workers, each with a model. For one thread at a time."""

    def __init__(
        self,
        source: str,
        opening: Mapping[str, Any],
        workers: int,
        vllm: bool = False,
        address: str | None = None,
        cpus: float = 1,
        gpus: float | None = None,
    ) -> None:
        """`vllm`: whether vLLM runs the models; `cpus`, `gpus`: of each worker.

        Raises CaptureError where Ray is missing or the cluster is too small.
        """
        self._ray, self._own_cluster = connected(address, workers, cpus)
        ranks = [int(opening.get(f"{kind}_parallel_size") or 1) for kind in ("tensor", "pipeline")] if vllm else [1]
        gpus = float(prod(ranks) * bool(self._ray.cluster_resources().get("GPU"))) if gpus is None else gpus
        self._check_room(workers, cpus, gpus)
        self._at_once = TOGETHER if vllm else 1
        self._actor = self._ray.remote(_Actor).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD", max_concurrency=self._at_once
        )
        self._actor_arguments = (VllmWorker if vllm else Worker, source, dict(opening), os.getcwd())
        self.deaths: list[str] = []
        """why workers died"""
        self.opened: list[Opened] = []
        self._failed_starts = 0
        self._workers: list[Any] = []
        """the workers that have loaded the model"""
        self._starting: dict[Any, Any] = {}
        self._running: dict[Any, tuple[Any, Task | None]] = {}
        """by reference: the worker, and its task; None where nobody waits for the task any more"""
        for _ in range(workers):
            self._start()

    def put(self, value: Any) -> list[Any]:
        """A reference that each worker fetches once. Raises CaptureError where no worker is left."""
        self._check_left()
        return [self._ask(self._ray.put, value)]

    def call(self, name: str, method: str, *arguments: Any) -> Any:
        """Run one task. Raises what it raises."""
        [(_, found)] = self.each([Task(name, method, arguments)])
        return found

    def each(self, tasks: Iterable[Task]) -> Generator[tuple[Task, Any], None, None]:
        """Run the tasks as workers become idle; yields each with its result as it ends. Raises what a task raises."""
        try:
            yield from self._each(iter(tasks))
        finally:  # nobody waits for what still runs
            self._running = {reference: (actor, None) for reference, (actor, _) in self._running.items()}

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        self._take_errors()
        for actor in [*self._workers, *self._starting.values()]:
            self._kill(actor)
        self._workers, self._starting, self._running = [], {}, {}
        if self._own_cluster:
            self._ray.shutdown()

    def _take_errors(self) -> None:
        """Of tasks that nobody waits for: Ray prints those that are never asked for."""
        with contextlib.suppress(Exception):  # Ray may be gone
            done, _ = self._ask(self._ray.wait, [*self._running], num_returns=len(self._running), timeout=0)
            for reference in done:
                with contextlib.suppress(Exception):
                    self._ask(self._ray.get, reference)

    def _each(self, coming: Iterator[Task]) -> Iterator[tuple[Task, Any]]:
        again = deque[Task]()
        while True:
            while (actor := self._idle()) and (task := again.popleft() if again else next(coming, None)):
                self._running[self._ask(actor.call.remote, task.method, *task.arguments)] = (actor, task)
            busy = any(task for _, task in self._running.values())
            if not busy and (self._idle() or not (again or _more(coming, again))):
                return
            self._check_left()
            done, _ = self._ask(self._ray.wait, [*self._running, *self._starting], timeout=WAITING)
            if not done:
                self._say_what_is_waited_for()
            for reference in done:
                if reference in self._starting:
                    self._started(reference)
                else:
                    yield from self._ended(reference, again)

    def _ended(self, reference: Any, again: "deque[Task]") -> Iterator[tuple[Task, Any]]:
        """The task of this call and its result. A task whose worker died comes to `again`. Raises what it raised."""
        actor, task = self._running.pop(reference)
        try:
            found = self._result(reference)
        except _WorkerDied as died:
            if any(each is actor for each in self._workers):  # once for all of its tasks
                self._replace(actor, str(died))
            if task is not None:
                task.deaths.append(str(died))
                if len(task.deaths) == ATTEMPTS:
                    raise _given_up(task) from None
                again.append(task)
            return
        except HookmapError:
            if task is not None:
                raise
            return
        if task is not None:
            yield task, found

    def _idle(self) -> Any:
        """The worker with the fewest tasks; None where each has as many as it takes."""
        tasks = Counter(id(actor) for actor, _ in self._running.values())
        fewest = min(self._workers, key=lambda actor: tasks[id(actor)], default=None)
        return None if fewest is None or tasks[id(fewest)] >= self._at_once else fewest

    def _ask(self, ask: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call Ray. Raises CaptureError where it is gone: it was shut down, here or on another thread."""
        why = ""
        try:
            if self._ray.is_initialized():  # else Ray would start a cluster without these workers
                return ask(*arguments, **options)
        except Exception as error:
            if isinstance(error, self._ray.exceptions.RayError) and self._ray.is_initialized():
                raise
            why = f" ({type(error).__name__}: {_first_line(error)})"
        raise CaptureError(
            f"Ray was shut down while its workers were needed, or its cluster is gone{why}. Open the model on Ray "
            "again; a capture in a folder goes on with resume=True."
        )

    def _start(self) -> None:
        actor = self._ask(self._actor.remote, *self._actor_arguments)
        self._starting[self._ask(actor.call.remote, "open")] = actor

    def _started(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            opened = self._result(reference)
        except _WorkerDied as died:
            self._failed_starts += 1
            if self._failed_starts == ATTEMPTS:
                raise CaptureError(
                    f"{ATTEMPTS} workers died before they had loaded the model; the last: {died}"
                ) from None
            self._replace(actor, str(died))
            return
        self._failed_starts = 0
        self.opened.append(opened)
        self._check_alike(opened)
        self._workers.append(actor)

    def _replace(self, actor: Any, why: str) -> None:
        log.warning("a worker died and is replaced: %s", why)
        self.deaths.append(why)
        self._workers = [each for each in self._workers if each is not actor]
        self._kill(actor)
        self._start()

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):  # it may be dead, and Ray may be gone
            self._ask(self._ray.kill, actor)

    def _result(self, reference: Any) -> Any:
        """The result of a call. Raises what the task raised, and _WorkerDied."""
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._ask(self._ray.get, reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, HookmapError):
                raise type(cause)(*cause.args) from None
            raise CaptureError(f"a worker failed: {type(cause).__name__}: {cause}") from error
        except RayError as error:
            raise _WorkerDied(_first_line(error)) from None

    def _check_left(self) -> None:
        """Raises CaptureError where no worker is left: waiting for one would never end."""
        if not (self._workers or self._starting):
            raise CaptureError("no worker is left: they were closed, or could not start. Open the model on Ray again.")

    def _check_room(self, workers: int, cpus: float, gpus: float) -> None:
        there = self._ray.cluster_resources()
        short = [
            f"{workers} workers of {each:g} {name}s need {workers * each:g}, the cluster has {there.get(name, 0):g}"
            for name, each in (("CPU", cpus), ("GPU", gpus))
            if workers * each > there.get(name, 0)
        ]
        if short:
            raise CaptureError(
                f"{'; '.join(short)}. Give fewer --workers, or less to each: --cpus-per-worker, --gpus-per-worker."
            )

    def _check_alike(self, opened: Opened) -> None:
        first = self.opened[0]
        names = sorted({*first.versions, *opened.versions})
        if other := [n for n in names if first.versions.get(n) != opened.versions.get(n)]:
            lines = [f"{n} {opened.versions.get(n)} on {opened.machine}, {first.versions.get(n)} before" for n in other]
            raise CaptureError(f"workers must have the same versions: {'; '.join(lines)}.")

    def _say_what_is_waited_for(self) -> None:
        if self._starting and not self._running:
            there = self._ray.available_resources()
            free = f"{there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs"
            log.warning("waiting for %d workers to start; free on the cluster: %s", len(self._starting), free)


class _WorkerDied(Exception):
    """A worker, or a result that it held, is gone."""


class _Actor:
    """A worker, as Ray calls it; one with vLLM, in several threads."""

    def __init__(self, kind: type[Worker], source: str, opening: Mapping[str, Any], folder: str) -> None:
        """`folder`: the driver's working directory, for relative paths; a machine without it stays in its own."""
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._worker = kind(source, opening)
        self._fetched: tuple[Any, Any] = (None, None)

    def call(self, method: str, *arguments: Any) -> Any:
        return self._worker.call(method, *(self._value(argument) for argument in arguments))

    def _value(self, argument: Any) -> Any:
        """The value of a reference in a list; the last one is kept."""
        import ray

        if not (isinstance(argument, list) and len(argument) == 1 and isinstance(argument[0], ray.ObjectRef)):
            return argument
        fetched = self._fetched
        if fetched[0] != argument[0]:
            fetched = self._fetched = (argument[0], ray.get(argument[0]))
        return fetched[1]


def connected(address: str | None, workers: int, cpus: float) -> tuple[Any, bool]:
    """Ray, connected to the cluster of this process, of `address`, or a new one; and whether it connected now."""
    ray = needed("ray", 'captures on Ray need it: pip install "hookmap[scale]"')
    new = not ray.is_initialized()
    if new:
        check_listens(address)
        own = {"num_cpus": max(workers * cpus, os.cpu_count() or 1)} if address is None else {}
        try:
            ray.init(
                address=address or "local",
                logging_level="ERROR",
                log_to_driver=False,
                include_dashboard=False if address is None else None,
                namespace="hookmap",
                **own,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise CaptureError(
                f"cannot reach a Ray cluster at {address or 'this machine'}: {_first_line(error)}"
            ) from error
    return ray, new


def check_listens(address: str | None) -> None:
    """Raises CaptureError where nothing listens at the address: Ray would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACHED).close()
    except (OSError, OverflowError) as error:
        raise CaptureError(f"cannot reach a Ray cluster at {address}: {_first_line(error)}") from error


def _more(coming: Iterator[Task], again: "deque[Task]") -> bool:
    """Whether there is another task; it is put into `again`."""
    task = next(coming, None)
    if task is not None:
        again.append(task)
    return task is not None


def _given_up(task: Task) -> CaptureError:
    reasons = "\n".join(f"  - {why}" for why in task.deaths)
    return CaptureError(
        f"{task.name} ended {ATTEMPTS} workers, and is not tried again:\n{reasons}\n"
        "If memory ran out, give a smaller --batch-size, or fewer --workers on a machine."
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
