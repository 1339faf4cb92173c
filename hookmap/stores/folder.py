"""Writes a capture folder: streaming, memory flat in the number of tokens, safe against a kill at any moment.

A sample is finished when its line, with all lines of its group, is in samples.jsonl. Shards are written first, then
the table of shards, then the group, and each is durable before the next begins. What a kill leaves after the last
whole group (temporary files, shards, lines) belongs to no finished sample. `resume` removes it, and continues exactly
where an undisturbed run stood when that group was written.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from hookmap.activations import Activation, Sample
from hookmap.errors import StoreError
from hookmap.stores.closing import Closing
from hookmap.stores.durable_files import AppendedFile, is_temporary, sync_folder, temporary
from hookmap.stores.group_writer import Group, GroupWriter, is_part
from hookmap.stores.interface import Store
from hookmap.stores.ledger import Ledger
from hookmap.stores.manifest import MANIFEST, Counts, Manifest, read_manifest, write_manifest
from hookmap.stores.number_set import NumberSet
from hookmap.stores.shard import SHARD_FOLDER, is_shard, sha256_of, shard_name
from hookmap.stores.table import SAMPLES, SHARDS, altered_line, read_shards
from hookmap.stores.table_index import Committed, scan
from hookmap.stores.write_access import cannot_write, lock, refuse_used


class FolderWriter(GroupWriter, Closing):
    """A sink that writes a capture folder. Make one with `create` or `resume`; use it in a `with` statement.

    Samples that are open together (a batch) are committed together, when the last of them is finished.
    Leaving the `with` statement closes the capture as finished; leaving it by an exception keeps every committed
    sample and leaves the capture unfinished.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Not for callers: `create` and `resume` say what the folder may hold."""
        self.manifest = manifest
        self._committed = Committed()
        self._usable, self._closed = True, False
        super().__init__(folder, Ledger(manifest.keys, manifest.specs), manifest.shard_tokens, manifest.shard_bytes)
        with contextlib.ExitStack() as opened:
            self._samples = opened.enter_context(contextlib.closing(AppendedFile(folder / SAMPLES)))
            lock(self._samples, folder)
            self._shards = opened.enter_context(contextlib.closing(AppendedFile(folder / SHARDS)))
            self._recover()
            self._files = opened.pop_all()
        self._ledger.finished.update(self._committed.numbers)

    @classmethod
    def create(cls, path: "str | os.PathLike[str]", manifest: Manifest) -> "FolderWriter":
        """Begin a capture in a folder that is new or empty. Raises StoreError."""
        folder = Path(path)
        refuse_used(folder)
        try:
            (folder / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
            for name in (SAMPLES, SHARDS):
                (folder / name).touch()
            write_manifest(folder, manifest)  # last: a folder without one is no capture
            return cls(folder, manifest)
        except OSError as error:
            raise cannot_write(folder, error, kept=0) from error

    @classmethod
    def resume(cls, path: "str | os.PathLike[str]", manifest: Manifest) -> "FolderWriter":
        """Go on with the capture in a folder, after a kill or to add samples. Raises StoreError.

        `manifest` is that of the run, as for `create`: it is held against the folder's, and every difference is named.
        Samples in `finished` need not be done again; all others have to be, from their first row on.
        """
        folder = Path(path)
        found = read_manifest(folder)
        if number := altered_line(folder / SAMPLES, scan(folder / SAMPLES).size):
            raise StoreError(
                f"{folder / SAMPLES}, line {number} is not as it was written: going on would make it a sample. "
                f"Keep what is sound, and go on with that: hookmap store repair {folder} -o NEW"
            )
        if lines := found.differences(manifest):
            differences = "\n".join(f"  - {line}" for line in lines)
            raise StoreError(
                f"{folder} is a capture of another run and cannot be resumed by this one:\n{differences}\n"
                "Run with the capture's own model and settings, or write to another folder: -o DIR"
            )
        versions = found.versions if manifest.versions[-1] in found.versions else (*found.versions, *manifest.versions)
        resumed = found.model_copy(update={"finished": False, "sha256": None, "versions": versions})
        try:
            writer = cls(folder, resumed)
        except OSError as error:
            raise cannot_write(folder, error, found.counts.samples) from error
        with writer._writing():
            writer.manifest = resumed = resumed.model_copy(update={"counts": writer._counts()})
            if resumed != found:
                write_manifest(folder, resumed)
        return writer

    @property
    def finished(self) -> Set[int]:
        """Numbers of the samples that are committed: a resumed run leaves them out."""
        return NumberSet(self._committed.numbers)

    def write(self, activation: Activation) -> None:
        """Take rows. Raises CaptureError where they are not the next ones, StoreError where the disk refuses them."""
        self._refuse_closed()
        super().write(activation)

    def finish(self, sample: Sample) -> None:
        """All rows of this sample are written. It is committed when no other sample is open. Raises as `write` does."""
        self._refuse_closed()
        super().finish(sample)

    def adopt(self, group: Group) -> None:
        """Make finished what a worker's PartWriter wrote in this folder. Raises as `write` does."""
        self._refuse_closed()
        if strange := [name for name in group.files if not is_part(name)]:
            raise StoreError(f"{strange[0]!r} is no part of a capture: expected a name that PartWriter gives.")
        self._ledger.adopt(group.specs, [entry.sample.sample for entry in group.entries])
        shards = self.folder / SHARD_FOLDER
        with self._writing():
            for place, name in enumerate(group.files):
                os.replace(shards / name, shards / self._name(place))
            sync_folder(shards)
            self._commit(group)

    def abandon(self) -> None:
        """Forget the rows of samples that are not finished, on disk too. Raises StoreError.

        Samples that are finished and wait for the others of their batch are forgotten as well.
        """
        self._refuse_closed()
        with self._writing():
            super().abandon()
            self._recover()

    def note(self, run: Mapping[str, Any]) -> None:
        """Add the writing run's note, plain JSON data, to the manifest, which keeps one for each run."""
        self.manifest = self.manifest.model_copy(update={"runs": (*self.manifest.runs, dict(run))})

    def close(self, finished: bool) -> None:
        """End the writing. `finished`: whether the capture has all it should have. Raises StoreError.

        Samples that are not committed are dropped; with `finished` there must be none.
        """
        if self._closed:
            return
        if finished:
            self._refuse_unfinished()
        self._closed = True
        try:
            self._recover()
            manifest = self.manifest.model_copy(update={"finished": finished, "counts": self._counts()})
            if finished:
                sums = {name: sha256_of(self.folder / name) for name in (SAMPLES, SHARDS)}
                manifest = manifest.model_copy(update={"sha256": sums})
            write_manifest(self.folder, manifest)
            self.manifest = manifest
        except OSError as error:
            raise cannot_write(self.folder, error, len(self._committed.numbers)) from error
        finally:
            self._files.close()  # gives up the lock

    def _name(self, shard: int) -> str:
        return shard_name(self._committed.shards + shard)

    def _cut(self) -> None:
        with self._writing():
            super()._cut()

    def _group(self) -> Group:
        with self._writing():
            return super()._group()

    def _commit(self, group: Group) -> None:
        """Make the samples of the group finished: its shards are there, under their final names."""
        samples, shards = group.lines(self._committed.shards)
        with self._writing():
            if self.manifest.specs != self._ledger.specs:
                self.manifest = self.manifest.with_specs(self._ledger.specs)
                write_manifest(self.folder, self.manifest)
            if shards:
                self._shards.append(shards)
            self._samples.append(samples)
            self._committed = scan(self.folder / SAMPLES, self._committed)
            self._forget()

    def _recover(self) -> None:
        """Go back to the last complete group on disk: after an interrupt, memory may not know it yet."""
        self._forget()
        self._committed = scan(self.folder / SAMPLES)
        self._samples.cut(self._committed.size)
        end, sizes = 0, {}
        for info, end in read_shards(self.folder / SHARDS, self._committed.shards):  # noqa: B007 - the last is used
            sizes[shard_name(info.shard)] = info.bytes
        self._shards.cut(end)
        found = {}
        with os.scandir(self.folder / SHARD_FOLDER) as files:
            for file in files:
                if file.name in sizes:
                    found[file.name] = file.stat().st_size
                elif is_temporary(file.name) or is_shard(file.name):
                    with contextlib.suppress(FileNotFoundError):  # a worker that nobody waits for has just renamed it
                        os.unlink(file)
        sync_folder(self.folder / SHARD_FOLDER)
        temporary(self.folder / MANIFEST).unlink(missing_ok=True)
        if wrong := [name for name, size in sizes.items() if found.get(name) != size]:
            raise StoreError(
                f"{self.folder} is damaged: {len(wrong)} shards of finished samples are missing or cut short, "
                f"the first is {wrong[0]}.\nSee every problem: hookmap inspect {self.folder} --verify"
            )

    def _counts(self) -> Counts:
        committed = self._committed
        size = sum(info.bytes for info, _ in read_shards(self.folder / SHARDS, committed.shards))
        return Counts(samples=len(committed.numbers), rows=committed.rows, shards=committed.shards, bytes=size)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the disk into a StoreError. After it, or an interrupt inside, no more rows are taken."""
        usable, self._usable = self._usable, False
        try:
            yield
            self._usable = usable
        except OSError as error:
            with contextlib.suppress(StoreError):
                self.close(finished=False)
            raise cannot_write(self.folder, error, len(self._committed.numbers)) from error

    def _refuse_closed(self) -> None:
        if self._closed or not self._usable:
            raise StoreError(f"{self.folder} is closed, or a write to it was interrupted: resume it to write more.")


def write_store(store: Store, path: "str | os.PathLike[str]", manifest: Manifest) -> None:
    """Write a whole store (a capture in memory) to a new folder, sample by sample. Raises StoreError."""
    with FolderWriter.create(path, manifest) as writer:
        store.write_to(writer)
