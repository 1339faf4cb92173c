"""`hookmap.open_on_ray`: captures run by many workers into one folder, with the result of one model.

The driver loads no weights. It asks a worker for the plan, hands out the batches, and alone writes the folder's tables;
the workers write its shards. A sample is finished when the tables say so, and `resume` continues from there even where
a worker or the driver died.
"""

import contextlib
import math
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack
from uuid import uuid4

from hookmap.analysis.dictionaries.packing import to_bytes
from hookmap.analysis.kept import Kept
from hookmap.analysis.reductions.files import STATISTICS
from hookmap.analysis.reductions.run import groupings, reduce
from hookmap.analysis.reductions.statistics import Statistics
from hookmap.analysis.reductions.wanted import DEFAULT, Wanted, wanted
from hookmap.capture.estimate import Estimate, check_room
from hookmap.capture.hooked import Hooked
from hookmap.capture.interventions.documents import read_interventions
from hookmap.capture.options import CaptureOptions, EstimateOptions, Layers, Points, Progress, TemplateOptions, takes
from hookmap.capture.prepare import say_apart
from hookmap.capture.result import Capture
from hookmap.capture.run import log
from hookmap.discovery.library import given_map
from hookmap.errors import CaptureError, InterventionError, ModelError, StoreError
from hookmap.loading.chat_template import Chat, Templating
from hookmap.loading.checkpoints import load_tokenizer
from hookmap.loading.generation import check_count
from hookmap.loading.prompts import Prompt, encode, records
from hookmap.maps.document import ArchitectureMap
from hookmap.services.ray.functions import sent
from hookmap.services.ray.pool import TOGETHER, Pool, Task
from hookmap.services.ray.worker import BatchResult, CapturePlan, Reducing, RunningCapture
from hookmap.stores import open_store
from hookmap.stores.folder import FolderWriter
from hookmap.stores.memory import MemoryStore
from hookmap.stores.shard import SHARD_FOLDER
from hookmap.wording import counted

PART_BATCHES = 64
"""batches whose sums a worker sends together, at most"""


class RayModel:
    """A model held by many workers, made by `hookmap.open_on_ray`. `close` it, or use it in a `with` statement."""

    def __init__(self, source: str, workers: int, vllm: bool, opening: dict[str, Any], **cluster: Any) -> None:
        """See `open_on_ray`. `vllm`: whether vLLM runs the models."""
        self.name = source
        self.workers = workers
        self._vllm, self._opening = vllm, opening
        self._pool = Pool(source, opening, workers, vllm, **cluster)
        self._lock, self._capturing = threading.RLock(), False

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer, or the one that was given."""
        given = self._opening.get("tokenizer")
        if given is not None and not isinstance(given, str | os.PathLike):
            return given
        loads = {name: self._opening[name] for name in ("trust_remote_code", "revision") if name in self._opening}
        return load_tokenizer(os.fspath(given or self.name), **loads)

    @cached_property
    def map(self) -> ArchitectureMap:
        """Where each point is in this model."""
        with self._alone():
            plan: CapturePlan = self._pool.call("the map", "plan", [[0]], {"points": (), "max_new_tokens": 0})
        return plan.map

    @takes(TemplateOptions)
    def encode(self, prompts: Any, chat: Chat = "auto", **template: Any) -> tuple[Prompt, ...]:
        """See `HookedModel.encode`."""
        return encode(prompts, self.tokenizer, Templating(chat, **template))

    def engine(self, name: str = "auto") -> tuple[str, str]:
        """See `HookedModel.engine`."""
        return "ray", counted(self.workers, "worker") + (" with vLLM" if self._vllm else "")

    @takes(EstimateOptions)
    def estimate(
        self,
        prompts: Any,
        points: Points = "all",
        layers: Layers = "all",
        max_new_tokens: int = 64,
        **options: Unpack[EstimateOptions],
    ) -> Estimate:
        """See `HookedModel.estimate`."""
        named = _named(points, layers, max_new_tokens, options, self._opening["functions"])
        prompts = records(prompts, named.pop("prompt_column", None))
        with self._alone():
            found: Estimate = self._pool.call("the estimate", "estimate", prompts, named)
        return found

    @takes(CaptureOptions)
    def capture(
        self,
        prompts: Any,
        points: Points = "all",
        layers: Layers = "all",
        max_new_tokens: int = 64,
        **options: Unpack[CaptureOptions],
    ) -> Capture:
        """See `HookedModel.capture`; `store` is on a disk that all machines of the cluster share.

        Each sample is byte-identical to what one such machine would have written. Captures of several threads run one
        after another. Raises what `HookedModel.capture` does, and CaptureError where every worker that tries a batch
        dies, or Ray is shut down.
        """
        named = _named(points, layers, max_new_tokens, options, self._opening["functions"])
        store, resume, progress = (named.pop(name, None) for name in ("store", "resume", "progress"))
        prompts = records(prompts, named.pop("prompt_column", None))
        if named.get("before"):
            raise InterventionError(
                "before=True keeps rows on one machine only: leave it out, or hookmap.open the model."
            )
        if resume and store is None:
            raise CaptureError("resume=True needs the folder to go on with: give store=FOLDER.")
        if store is not None and points == ():
            raise StoreError("a capture folder needs at least one tensor: name points, or leave store= out.")
        if store is not None:
            with self._alone():
                return self._capture(prompts, named, Path(store).absolute(), bool(resume), progress)
        with self._alone(), tempfile.TemporaryDirectory(prefix="hookmap-") as folder:
            made = self._capture(prompts, named, Path(folder) / "capture", False, progress)
            held = MemoryStore(made.store.keys)
            made.store.write_to(held)
            return Capture(held, made.selectors, made.map, made.manifest)

    generate = Hooked.generate

    @takes(CaptureOptions, reduce)
    def reduce(
        self,
        prompts: Any,
        points: Points = "resid_post",
        layers: Layers = "all",
        reductions: str | Iterable[str] = DEFAULT,
        max_new_tokens: int = 0,
        **options: Any,
    ) -> Statistics:
        """See `HookedModel.reduce`. Each worker sums up some batches; the driver merges, and writes the folder."""
        how = {name: options.pop(name, None) for name in ("by", "edges", "direction", "store", "resume", "progress")}
        chosen = wanted(reductions, groupings(how["by"], options), how["edges"], how["direction"])
        named = _named(points, layers, max_new_tokens, options, self._opening["functions"])
        prompts = records(prompts, named.pop("prompt_column", None))
        with self._alone():
            plan: Reducing = self._pool.call("the plan", "begin", self._pool.put(prompts), named, chosen)
            say_apart(plan.apart)
            kept = Kept(STATISTICS.from_bytes(plan.statistics), STATISTICS, how["store"], bool(how["resume"]))
            results = self._pool.each(self._parts(plan, named, chosen, kept.result.samples.copy()))
            with contextlib.closing(results):
                for _, data in results:
                    kept.result.absorb(STATISTICS.from_bytes(data))
                    kept.now_and_then()
                    if how["progress"] is not None:
                        how["progress"](Progress(len(kept.result.samples), len(plan.prompts), 0, 0))
        return kept.end(len(plan.prompts))

    def _parts(self, plan: Reducing, options: dict[str, Any], chosen: Wanted, finished: Set[int]) -> Iterator[Task]:
        """The batches with samples that are not finished, several to a task: each sends its sums."""
        encoded, id = self._pool.put(plan.prompts), uuid4().hex
        left = [batch for batch in plan.batches if any(number not in finished for number in batch)]
        most = max(PART_BATCHES, self._pool.opened[0].in_flight or 0)
        size = max(1, min(most, len(left) // (4 * self.workers)))
        for start in range(0, len(left), size):
            part = left[start : start + size]
            held = frozenset(number for batch in part for number in batch if number in finished)
            yield Task(f"the part from sample {part[0][0]} on", "reduce", (id, options, chosen, encoded, part, held))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The workers serve one call at a time; other threads wait. Raises CaptureError for a call inside another."""
        with self._lock:
            if self._capturing:
                raise CaptureError(
                    "the workers are in the middle of a capture that called this, from its progress. Run it when that "
                    "capture has ended, or open the model on Ray once more."
                )
            self._capturing = True
            try:
                yield
            finally:
                self._capturing = False

    def _capture(
        self,
        prompts: Any,
        options: dict[str, Any],
        folder: Path,
        resume: bool,
        progress: Callable[[Progress], None] | None,
    ) -> Capture:
        plan: CapturePlan = self._pool.call("the plan", "plan", self._pool.put(prompts), options)
        check_room(plan.expected, folder, resume)
        say_apart(plan.apart)
        told, deaths = _Told(), len(self._pool.deaths)
        writing = FolderWriter.resume if resume else FolderWriter.create
        with contextlib.ExitStack() as ends:
            writer = ends.enter_context(writing(folder, plan.manifest))
            done = len(writer.finished)
            # Closed here, not when it is collected: until then its tasks would be taken for those of the next capture.
            results = contextlib.closing(self._pool.each(self._tasks(plan, options, folder, writer.finished)))
            for task, result in ends.enter_context(results):
                assert isinstance(result, BatchResult)
                for group in result.groups:
                    writer.adopt(group)
                told.add(result)
                done += len(task.arguments[-1])
                if progress is not None:
                    progress(Progress(done, len(plan.prompts), 0, 0))
            engine, why = self.engine()
            note = {"engine": engine, "why": why, **told.note(options.get("keep_dtype"))}
            writer.note(note | {"apart": plan.apart, "lost": self._pool.deaths[deaths:]})
        written = open_store(folder)
        return Capture(written, plan.selectors, plan.map, written.manifest)

    def _tasks(self, plan: CapturePlan, options: dict[str, Any], folder: Path, finished: Set[int]) -> Iterator[Task]:
        """The batches with samples that are not finished; each runs whole, as on one machine."""
        mark = f"{SHARD_FOLDER}/.driver-{uuid4().hex}.tmp"
        try:
            (folder / mark).touch()
        except OSError as error:
            raise StoreError(f"cannot write to {folder}: {error.strerror}. Write to another folder: -o DIR") from error
        options = {name: value for name, value in options.items() if name != "num_return_sequences"}  # are in the plan
        encoded, capture = self._pool.put(plan.prompts), RunningCapture(uuid4().hex, options, str(folder), mark)
        batches, in_flight = plan.batches, self._pool.opened[0].in_flight
        if in_flight is not None:
            numbers = [number for batch in batches for number in batch if number not in finished]
            batches = shared_out(numbers, self.workers, in_flight)
        for batch in batches:
            if left := [number for number in batch if number not in finished]:
                yield Task(f"the batch of samples {left[0]} to {left[-1]}", "run", (capture, encoded, batch, left))

    def close(self) -> None:
        """End the workers, once the captures of other threads have ended."""
        with self._lock:
            self._pool.close()

    def __enter__(self) -> "RayModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RayModel {self.name}, {self.engine()[1]}>"


class _Told:
    """What the workers say of a capture, gathered for its manifest."""

    def __init__(self) -> None:
        self._memory, self._halved, self._infinite = 0, list[str](), Counter[str]()

    def add(self, result: BatchResult) -> None:
        self._memory = max(self._memory, result.memory)
        self._halved += result.halved
        self._infinite.update(result.lost)

    def note(self, dtype: Any) -> dict[str, Any]:
        """As JSON; warns of rows that became infinite in `dtype`, the one that is kept."""
        found: dict[str, Any] = {"memory": {"peak": self._memory}, "halved": self._halved}
        if self._infinite:
            name = str(dtype).removeprefix("torch.")
            rows = ", ".join(f"{count} rows of {tensor}" for tensor, count in self._infinite.items())
            log.warning("keep_dtype=%s: finite numbers are infinite in it, in %s. Keep a wider one.", name, rows)
            found["overflow"] = {"dtype": name, "rows": dict(self._infinite)}
        return found


def open_on_ray(
    x: "str | os.PathLike[str]",
    *,
    workers: int = 1,
    engine: Literal["hooks", "vllm"] = "hooks",
    address: str | None = None,
    cpus_per_worker: float = 1,
    gpus_per_worker: float | None = None,
    map: ArchitectureMap | str | os.PathLike[str] | None = None,
    functions: Iterable[str] = (),
    **opening: Any,
) -> RayModel:
    """A model held by `workers` processes on a Ray cluster, to capture from as from one.

    x: a hub id, or a folder that every machine sees, by its absolute path. engine: what runs the model in each worker,
    "hooks" as `hookmap.open` has it, or "vllm". address: of a running cluster ("auto": of this machine's), or None for
    one of its own on this machine. cpus_per_worker: also the threads of each.
    gpus_per_worker: one unless given, where the cluster has GPUs; with several, device="auto" spreads the model over
    them (accelerate), or on vLLM tensor_parallel_size does. functions: names, "package.module:function", that workers
    may import for `hookmap.apply`.
    opening: as `hookmap.open` takes it, or `hookmap.open_on_vllm`. Raises CaptureError where Ray is missing or the
    cluster is too small.
    """
    if not isinstance(x, str | os.PathLike):
        raise ModelError(
            f"cannot send a {type(x).__name__} to workers: expected a hub id or a folder, which they load."
        )
    check_count("workers", workers)
    for name, each in (("cpus_per_worker", cpus_per_worker), ("gpus_per_worker", gpus_per_worker)):
        if each is not None and not (isinstance(each, int | float) and 0 <= each < math.inf):
            raise CaptureError(f"{name}: expected a number, at least 0, got {each!r}.")
    if engine not in ("hooks", "vllm"):
        raise CaptureError(f'engine: expected "hooks" or "vllm", got {engine!r}.')
    if engine == "vllm":
        _refuse_unserved(map, opening)
    else:
        opening["map"] = given_map(map)
    opening["functions"] = (functions,) if isinstance(functions, str) else tuple(functions)
    cluster = {"address": address, "cpus": cpus_per_worker, "gpus": gpus_per_worker}
    return RayModel(os.fspath(x), workers, engine == "vllm", opening, **cluster)


def _refuse_unserved(map: Any, opening: Mapping[str, Any]) -> None:
    """Raises CaptureError for what a worker with vLLM does not take."""
    if map is not None:
        raise CaptureError('map: engine="vllm" finds the map of vLLM\'s own modules. Leave it out.')
    if opening.get("shared"):
        raise CaptureError("shared: the workers are asked one after another. Leave it out.")
    if (engines := opening.get("data_parallel_size") or 1) != 1:
        raise CaptureError(f"data_parallel_size={engines}: each worker has one engine. Give more workers instead.")


def shared_out(numbers: Sequence[int], workers: int, in_flight: int) -> tuple[tuple[int, ...], ...]:
    """Prompts in batches for workers that run `in_flight` of them together, and have TOGETHER batches at once.

    A worker has twice as many prompts as it runs, so that one that ends is followed at once; where there are not so
    many, each has its share.
    """
    size = max(1, min(-(-2 * in_flight // TOGETHER), -(-len(numbers) // (workers * TOGETHER))))
    return tuple(tuple(numbers[start : start + size]) for start in range(0, len(numbers), size))


def _named(
    points: Points, layers: Layers, max_new_tokens: int, options: Mapping[str, Any], functions: Collection[str] = ()
) -> dict[str, Any]:
    """The arguments of `HookedModel.capture` by their names, for workers. Files are read here, on the driver.

    `functions`: names of those that workers import.
    """
    named = {"points": points, "layers": layers, "max_new_tokens": max_new_tokens, **options}
    if given := named.get("dictionaries"):
        each = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
        named["dictionaries"] = tuple(map(to_bytes, each))
    if "interventions" in named:
        named["interventions"] = sent(read_interventions(named["interventions"]), functions)
    return named
