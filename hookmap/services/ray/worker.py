"""What a worker does: it holds a model, plans a capture, runs batches into a shared folder. Knows no Ray."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hookmap.capture.estimate import Estimate
from hookmap.capture.prepare import Prepared
from hookmap.errors import StoreError
from hookmap.loading.memory import used
from hookmap.loading.prompts import Prompt
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.selectors import Selector
from hookmap.model import HookedModel, open
from hookmap.stores.before import Lacking
from hookmap.stores.groups import Group, PartWriter
from hookmap.stores.manifest import Manifest, versions


@dataclass(frozen=True)
class Opened:
    """A worker whose model is loaded."""

    machine: str
    versions: Mapping[str, str]
    """of the libraries that decide what the numbers are"""


@dataclass(frozen=True)
class Plan:
    """A capture as every worker will see it."""

    prompts: tuple[Prompt, ...]
    selectors: tuple[Selector, ...]
    groups: tuple[tuple[int, ...], ...]
    manifest: Manifest
    map: ArchitectureMap
    expected: Estimate
    apart: str | None
    """why prompts of different lengths run apart, where they do"""


@dataclass(frozen=True)
class Job:
    """A capture that runs: what each call of a worker brings along."""

    key: str
    """another one for each capture"""
    options: Mapping[str, Any]
    """of `HookedModel.capture`, besides the prompts"""
    folder: str
    mark: str
    """a file in the folder's shards: whoever sees it sees the driver's disk"""


@dataclass(frozen=True)
class Ran:
    """What came of one batch."""

    groups: tuple[Group, ...]
    halved: tuple[str, ...]
    memory: int
    """bytes of the worker's process at its highest"""
    lost: Mapping[str, int] = field(default_factory=dict)
    """of each tensor, rows that became infinite in the dtype that is kept"""


class Worker:
    """One model, and the capture that it works on."""

    def __init__(self, source: str, opening: Mapping[str, Any]) -> None:
        """`source`: a hub id or a folder; `opening`: what `hookmap.open` takes besides. Loads nothing yet."""
        self._source, self._opening = source, opening
        self._model: HookedModel | None = None
        self._key = ""
        self._prepared: Prepared | None = None

    def open(self) -> Opened:
        """Load the model. Raises what `hookmap.open` does."""
        self._model = open(self._source, **self._opening)
        return Opened(socket.gethostname(), versions())

    def plan(self, prompts: Any, options: Mapping[str, Any]) -> Plan:
        """Decide a capture; runs no batch of it. Raises what `HookedModel.capture` does."""
        prepared = self._hooked.prepare(prompts, **options)
        run = prepared.run
        return Plan(
            tuple(run.prompts),
            run.selectors,
            prepared.groups,
            prepared.manifest,
            prepared.map,
            prepared.expected,
            prepared.apart,
        )

    def estimate(self, prompts: Any, options: Mapping[str, Any]) -> Estimate:
        """See `HookedModel.estimate`."""
        return self._hooked.estimate(prompts, **options)

    def run(self, job: Job, prompts: Sequence[Prompt], numbers: Sequence[int], wanted: Sequence[int]) -> Ran:
        """Run these prompts together; the rows of those `wanted` come to the job's folder.

        Raises as `plan` does, and StoreError.
        """
        folder = Path(job.folder)
        if not (folder / job.mark).exists():
            raise StoreError(
                f"{folder} is not the capture's folder on {socket.gethostname()}: a worker writes its shards there "
                "itself. Write to a disk that all machines share: -o DIR"
            )
        if self._prepared is None or self._key != job.key:
            self._prepared, self._key = self._hooked.prepare(tuple(prompts), **job.options), job.key
        run, manifest = self._prepared.run, self._prepared.manifest
        writer = PartWriter(folder, manifest.keys, manifest.shard_tokens, manifest.shard_bytes)
        told, lost = len(run.halved), run.lost.copy()
        run.together(numbers, Lacking(writer, {*numbers} - {*wanted}))
        run.memory.look()
        memory = max(run.memory.peak, used())
        return Ran(tuple(writer.groups), tuple(run.halved[told:]), memory, dict(run.lost - lost))

    @property
    def _hooked(self) -> HookedModel:
        if self._model is None:
            self.open()
        assert self._model is not None
        return self._model
