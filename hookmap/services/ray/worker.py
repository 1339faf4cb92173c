"""A worker: it holds a model, plans a capture, and runs batches into a shared folder. It does not know Ray."""

import socket
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hookmap.analysis.dictionaries.packing import from_bytes
from hookmap.analysis.reductions.files import STATISTICS
from hookmap.analysis.reductions.run import begun, into
from hookmap.analysis.reductions.wanted import Wanted
from hookmap.capture.estimate import Estimate
from hookmap.capture.prepare import Prepared
from hookmap.errors import StoreError
from hookmap.loading.memory import used
from hookmap.loading.prompts import Prompt
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.selectors import Selector
from hookmap.model import HookedModel, open
from hookmap.services.ray.functions import taken
from hookmap.stores.before_interventions import Lacking
from hookmap.stores.group_writer import Group, PartWriter
from hookmap.stores.manifest import Manifest, versions


@dataclass(frozen=True)
class Opened:
    """What a worker says when its model is loaded."""

    machine: str
    versions: Mapping[str, str]
    """of the libraries that the numbers depend on"""
    in_flight: int | None = None
    """prompts that its vLLM runs together, whichever they are; None where the plan's batches are what runs together"""


@dataclass(frozen=True)
class CapturePlan:
    """A capture as a worker has planned it: the driver hands out its batches."""

    prompts: tuple[Prompt, ...]
    selectors: tuple[Selector, ...]
    batches: tuple[tuple[int, ...], ...]
    """numbers of the prompts that run together"""
    manifest: Manifest
    map: ArchitectureMap
    expected: Estimate
    apart: str | None
    """why prompts of different lengths run in different batches, where they do"""


@dataclass(frozen=True)
class RunningCapture:
    """The capture that a batch belongs to, sent with every batch."""

    id: str
    """unique to the capture: a worker prepares each capture once"""
    options: Mapping[str, Any]
    """the arguments of `HookedModel.capture` besides the prompts"""
    folder: str
    mark: str
    """a file in the folder: a worker that finds it sees the driver's disk"""

    def check_folder(self) -> None:
        """Raises StoreError where the folder is not on a disk that the driver sees, too."""
        if not (Path(self.folder) / self.mark).exists():
            raise StoreError(
                f"{self.folder} is not the capture's folder on {socket.gethostname()}: a worker writes its shards "
                "there itself. Write to a disk that all machines share: -o DIR"
            )

    def writer(self, manifest: Manifest) -> PartWriter:
        """What writes a worker's shards to the folder."""
        return PartWriter(Path(self.folder), manifest.keys, manifest.shard_tokens, manifest.shard_bytes)


@dataclass(frozen=True)
class BatchResult:
    """What a worker says when a batch has run."""

    groups: tuple[Group, ...]
    """the samples that were written, for the folder's tables"""
    halved: tuple[str, ...]
    """what was done about memory that ran out, in words"""
    memory: int
    """the peak of the worker's process, in bytes"""
    lost: Mapping[str, int] = field(default_factory=dict)
    """by tensor, the number of rows that became infinite in the dtype that is kept"""


@dataclass(frozen=True)
class Reducing:
    """Statistics as a worker has planned them: the driver hands out the batches, and merges."""

    prompts: tuple[Prompt, ...]
    batches: tuple[tuple[int, ...], ...]
    statistics: bytes
    """of nothing yet, as the content of a file"""
    apart: str | None


class Worker:
    """One model, and the capture that it has prepared last."""

    def __init__(self, source: str, opening: Mapping[str, Any]) -> None:
        """`source`: a hub id or a folder. `opening`: the other arguments of `hookmap.open`, and `functions`: the names
        of those that interventions may be. Loads nothing yet."""
        self._source, self._opening = source, dict(opening)
        self._functions: Sequence[str] = self._opening.pop("functions", ())
        self._model: HookedModel | None = None
        self._prepared: tuple[str, Prepared] | None = None
        """the capture's id, and the capture"""

    def call(self, method: str, *arguments: Any) -> Any:
        """Run the method of this name."""
        return getattr(self, method)(*arguments)

    def open(self) -> Opened:
        """Load the model. Raises what `hookmap.open` does."""
        self._model = open(self._source, **self._opening)
        return Opened(socket.gethostname(), versions())

    def plan(self, prompts: Any, options: Mapping[str, Any]) -> CapturePlan:
        """Validate and plan a capture without running it. Raises what `HookedModel.capture` does."""
        prepared = self._prepare(prompts, options)
        run, rows = prepared.run, {*prepared.manifest.keys}
        return CapturePlan(
            tuple(run.prompts),
            tuple(each for each in run.selectors if each.key in rows),
            prepared.groups,
            prepared.manifest,
            prepared.map,
            prepared.expected,
            prepared.apart,
        )

    def estimate(self, prompts: Any, options: Mapping[str, Any]) -> Estimate:
        """See `HookedModel.estimate`."""
        return self._hooked.estimate(prompts, **options)

    def run(
        self, capture: RunningCapture, prompts: Sequence[Prompt], batch: Sequence[int], wanted: Sequence[int]
    ) -> BatchResult:
        """Run the prompts of a batch together, and write the rows of those `wanted` to the capture's folder.

        `prompts`: all of the capture; `batch` and `wanted` are numbers among them. Raises what `plan` does, and
        StoreError where the folder is not on a shared disk.
        """
        capture.check_folder()
        prepared = self.prepared(capture.id, capture.options, prompts)
        run, writer = prepared.run, capture.writer(prepared.manifest)
        told, lost = len(run.halved), run.lost.copy()
        run.together(batch, Lacking(prepared.of_rows(writer), {*batch} - {*wanted}))
        run.memory.look()
        memory = max(run.memory.peak, used())
        return BatchResult(tuple(writer.groups), tuple(run.halved[told:]), memory, dict(run.lost - lost))

    def begin(self, prompts: Any, options: Mapping[str, Any], reducing: Wanted) -> Reducing:
        """Validate and plan statistics without summing up. Raises what `HookedModel.reduce` does."""
        prepared = self._prepare(prompts, options)
        data = STATISTICS.to_bytes(begun(prepared, reducing))
        return Reducing(tuple(prepared.run.prompts), prepared.groups, data, prepared.apart)

    def reduce(
        self,
        id: str,
        options: Mapping[str, Any],
        reducing: Wanted,
        prompts: Sequence[Prompt],
        batches: Sequence[Sequence[int]],
        finished: Set[int],
    ) -> bytes:
        """The sums of some batches, as the content of a file; those of `finished` samples are left out."""
        prepared = replace(self.prepared(id, options, prompts), groups=tuple(map(tuple, batches)))
        statistics = begun(prepared, reducing)
        into(prepared, statistics, finished=finished)
        return STATISTICS.to_bytes(statistics)

    def prepared(self, id: str, options: Mapping[str, Any], prompts: Sequence[Prompt]) -> Prepared:
        """The capture of this id, which is prepared once. Raises what `plan` does."""
        if self._prepared is None or self._prepared[0] != id:
            self._prepared = id, self._prepare(tuple(prompts), options)
        return self._prepared[1]

    def _prepare(self, prompts: Any, options: Mapping[str, Any]) -> Prepared:
        """A capture that is planned; its dictionaries come as bytes, and functions by name."""
        packed, edits = options.get("dictionaries") or (), options.get("interventions") or ()
        more: dict[str, Any] = {"dictionaries": tuple(map(from_bytes, packed))} if packed else {}
        more |= {"interventions": taken(edits, self._functions)} if edits else {}
        return self._hooked.prepare(prompts, **{**options, **more})

    @property
    def _hooked(self) -> HookedModel:
        if self._model is None:
            self.open()
        assert self._model is not None
        return self._model
