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
from hookmap.stores.before_interventions import Lacking
from hookmap.stores.group_writer import Group, PartWriter
from hookmap.stores.manifest import Manifest, versions


@dataclass(frozen=True)
class Opened:
    """What a worker says when its model is loaded."""

    machine: str
    versions: Mapping[str, str]
    """of the libraries that the numbers depend on"""


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
        """`source`: a hub id or a folder. `opening`: the other arguments of `hookmap.open`. Loads nothing yet."""
        self._source, self._opening = source, opening
        self._model: HookedModel | None = None
        self._prepared: tuple[str, Prepared] | None = None
        """the capture's id, and the capture"""

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
        folder = Path(capture.folder)
        if not (folder / capture.mark).exists():
            raise StoreError(
                f"{folder} is not the capture's folder on {socket.gethostname()}: a worker writes its shards there "
                "itself. Write to a disk that all machines share: -o DIR"
            )
        if self._prepared is None or self._prepared[0] != capture.id:
            self._prepared = capture.id, self._prepare(tuple(prompts), capture.options)
        run, manifest = self._prepared[1].run, self._prepared[1].manifest
        writer = PartWriter(folder, manifest.keys, manifest.shard_tokens, manifest.shard_bytes)
        told, lost = len(run.halved), run.lost.copy()
        run.together(batch, Lacking(self._prepared[1].of_rows(writer), {*batch} - {*wanted}))
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
        if self._prepared is None or self._prepared[0] != id:
            self._prepared = id, self._prepare(tuple(prompts), options)
        prepared = replace(self._prepared[1], groups=tuple(map(tuple, batches)))
        statistics = begun(prepared, reducing)
        into(prepared, statistics, finished=finished)
        return STATISTICS.to_bytes(statistics)

    def _prepare(self, prompts: Any, options: Mapping[str, Any]) -> Prepared:
        """A capture that is planned; its dictionaries come as bytes."""
        packed = options.get("dictionaries") or ()
        more = {"dictionaries": tuple(map(from_bytes, packed))} if packed else {}
        return self._hooked.prepare(prompts, **{**options, **more})

    @property
    def _hooked(self) -> HookedModel:
        if self._model is None:
            self.open()
        assert self._model is not None
        return self._model
