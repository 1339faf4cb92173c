"""Writes a capture folder that is none before it is complete: for who keeps all of a capture, or nothing.

The tables and the manifest are written at the end, so that nothing waits for the disk before. A capture that goes on
after a kill is written by FolderWriter.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from hookmap.activations import Activation, Sample
from hookmap.errors import StoreError
from hookmap.stores.closing import Closing
from hookmap.stores.durable_files import write_durably
from hookmap.stores.group_writer import Group, GroupWriter
from hookmap.stores.ledger import Ledger
from hookmap.stores.manifest import Counts, Manifest, write_manifest
from hookmap.stores.number_set import NumberSet
from hookmap.stores.shard import SHARD_FOLDER, shard_name
from hookmap.stores.table import SAMPLES, SHARDS
from hookmap.stores.write_access import cannot_write, refuse_used


class WholeWriter(GroupWriter, Closing):
    """A sink that writes a capture folder. Use it in a `with` statement; what an exception leaves is no capture."""

    def __init__(self, path: "str | os.PathLike[str]", manifest: Manifest) -> None:
        """Begin a capture in a folder that is new or empty. Raises StoreError."""
        folder = Path(path)
        refuse_used(folder)
        self.manifest = manifest
        self._counts = Counts()
        self._tables = {SAMPLES: bytearray(), SHARDS: bytearray()}
        self._closed = False
        super().__init__(folder, Ledger(manifest.keys), manifest.shard_tokens, manifest.shard_bytes)
        with self._writing():
            (folder / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)

    @property
    def finished(self) -> Set[int]:
        """Numbers of the samples that have all their rows."""
        return NumberSet(sorted(self._ledger.finished))

    def write(self, activation: Activation) -> None:
        """Take rows. Raises CaptureError where they are not the next ones, StoreError where the disk refuses them."""
        self._refuse_closed()
        with self._writing():
            super().write(activation)

    def finish(self, sample: Sample) -> None:
        """All rows of this sample are written. Raises as `write` does."""
        self._refuse_closed()
        with self._writing():
            super().finish(sample)

    def abandon(self) -> None:
        """Forget the rows of samples that are not finished, on disk too. Raises StoreError."""
        self._refuse_closed()
        shards = len(self._new)
        super().abandon()
        with self._writing():
            for shard in range(shards):
                (self.folder / SHARD_FOLDER / self._name(shard)).unlink(missing_ok=True)

    def note(self, run: Mapping[str, Any]) -> None:
        """See FolderWriter's `note`."""
        self.manifest = self.manifest.model_copy(update={"runs": (*self.manifest.runs, dict(run))})

    def close(self, finished: bool) -> None:
        """With `finished`, make the folder a capture. Raises StoreError, also where a sample is not finished."""
        if self._closed:
            return
        if finished:
            self._refuse_unfinished()
        self._closed = True
        if not finished:
            return
        sums = {name: hashlib.sha256(table).hexdigest() for name, table in self._tables.items()}
        told = {"finished": True, "counts": self._counts, "sha256": sums}
        self.manifest = self.manifest.with_specs(self._ledger.specs).model_copy(update=told)
        with self._writing():
            for name, table in self._tables.items():
                write_durably(self.folder / name, table)
            write_manifest(self.folder, self.manifest)  # last: a folder without one is no capture

    def _name(self, shard: int) -> str:
        return shard_name(self._counts.shards + shard)

    def _commit(self, group: Group) -> None:
        samples, shards = group.lines(self._counts.shards)
        self._tables[SAMPLES] += samples
        self._tables[SHARDS] += shards
        self._counts = Counts(
            samples=self._counts.samples + len(group.entries),
            rows=self._counts.rows + sum(entry.sample.rows for entry in group.entries),
            shards=self._counts.shards + len(group.shards),
            bytes=self._counts.bytes + sum(info.bytes for info in group.shards),
        )
        self._forget()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the disk into a StoreError. After it no more rows are taken."""
        try:
            yield
        except OSError as error:
            self._closed = True
            raise cannot_write(self.folder, error, kept=0) from error

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StoreError(f"{self.folder} is closed, or the disk refused a write to it.")
