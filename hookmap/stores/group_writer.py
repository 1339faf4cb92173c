"""Rows -> shards and groups, the samples that become finished together. Writing the tables is left to subclasses.

A folder's own writer gives shards their final names; a worker gives them names of its own, under which nothing counts,
and its group is adopted later (`FolderWriter.adopt`).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from hookmap.activations import Activation, Key, Sample
from hookmap.errors import StoreError
from hookmap.stores.buffer import Buffer
from hookmap.stores.durable_files import sync_folder
from hookmap.stores.ledger import Ledger, RowSpec
from hookmap.stores.shard import SHARD_FOLDER, ShardInfo, WrittenShard, write_shard
from hookmap.stores.table import Entry, Span, encode_group, encode_shards


@dataclass(frozen=True)
class Group:
    """Samples that become finished together, and the shards that hold their rows; shards count from 0."""

    entries: tuple[Entry, ...]
    shards: tuple[ShardInfo, ...]
    files: tuple[str, ...]
    """the shards' names"""
    specs: dict[Key, RowSpec]

    def lines(self, first: int) -> tuple[bytes, bytes]:
        """Its lines in the tables of samples and of shards, in a folder that has `first` shards before it."""
        entries = [
            Entry(entry.sample, tuple(span._replace(shard=first + span.shard) for span in entry.spans))
            for entry in self.entries
        ]
        shards = [replace(info, shard=first + info.shard) for info in self.shards]
        return encode_group(entries, first + len(shards)), encode_shards(shards)


class GroupWriter(ABC):
    """A sink that cuts rows into shards and commits each complete group."""

    def __init__(self, folder: Path, ledger: Ledger, shard_tokens: int, shard_bytes: int) -> None:
        """`folder`: of the capture."""
        self.folder = folder
        self._ledger = ledger
        self._shard_tokens, self._shard_bytes = shard_tokens, shard_bytes
        self._new: list[WrittenShard] = []
        self._forget()

    @abstractmethod
    def _name(self, shard: int) -> str:
        """File name of shard number `shard` of the group that is being written."""

    @abstractmethod
    def _commit(self, group: Group) -> None:
        """Make the samples finished and clear the group; its shards are durable already."""

    def write(self, activation: Activation) -> None:
        """Take rows. Raises CaptureError where they are not the next ones."""
        self._ledger.take(activation)
        if self._buffer.full_before(activation):
            self._cut()
        self._buffer.add(activation)
        if self._buffer.overfull:
            self._cut()

    def finish(self, sample: Sample) -> None:
        """All rows of this sample are written. It is committed when no other sample is open. Raises as `write` does."""
        self._ledger.finish(sample)
        self._pending.append(sample)
        if not self._ledger.open:
            self._commit(self._group())

    def abandon(self) -> None:
        """Forget the rows of samples that are not finished.

        Samples that are finished and wait for the others of their batch are forgotten as well.
        """
        self._ledger.abandon()
        self._ledger.finished -= {sample.sample for sample in self._pending}
        self._forget()

    def _refuse_unfinished(self) -> None:
        """Raises StoreError where a sample lacks rows, or waits for another of its group."""
        if left := sorted({*self._ledger.open, *(sample.sample for sample in self._pending)}):
            raise StoreError(f"{self.folder} cannot be closed as finished: samples {left} are not.")

    def _group(self) -> Group:
        if self._buffer:
            self._cut()
        shards = tuple(written.info(shard) for shard, written in enumerate(self._new))
        if shards:
            sync_folder(self.folder / SHARD_FOLDER)
        samples = sorted(self._pending, key=lambda sample: sample.sample)
        entries = tuple(Entry(sample, tuple(self._spans.get(sample.sample, ()))) for sample in samples)
        return Group(entries, shards, tuple(map(self._name, range(len(shards)))), dict(self._ledger.specs))

    def _cut(self) -> None:
        """Write the buffer as one shard. The rows of the one before it, and no others, may wait for their checksum."""
        if self._new:
            self._new[-1].checksum.result()
        if len(self._new) > 1:
            self._new[-2].placed.result()
        shard = len(self._new)
        self._new.append(write_shard(self.folder / SHARD_FOLDER / self._name(shard), self._buffer.blocks()))
        for sample, spans in self._buffer.spans(shard).items():
            self._spans.setdefault(sample, []).extend(spans)
        self._buffer.clear()

    def _forget(self) -> None:
        wait([written.placed for written in self._new])  # or one would get its name after all
        self._new = []
        self._pending: list[Sample] = []
        self._spans: dict[int, list[Span]] = {}
        self._buffer = Buffer(self._ledger.keys, self._shard_tokens, self._shard_bytes)


class PartWriter(GroupWriter):
    """A worker's sink: shards under names of its own in a capture's folder, groups for the folder's one writer."""

    def __init__(self, folder: Path, keys: Sequence[Key], shard_tokens: int, shard_bytes: int) -> None:
        """`folder`: of the capture, which has a writer somewhere."""
        super().__init__(folder, Ledger(tuple(keys)), shard_tokens, shard_bytes)
        self.groups: list[Group] = []
        """complete ones"""
        self._own = uuid4().hex

    def _name(self, shard: int) -> str:
        return part_name(self._own, len(self.groups), shard)

    def _commit(self, group: Group) -> None:
        self.groups.append(group)
        self._forget()


def part_name(own: str, group: int, shard: int) -> str:
    """A temporary name: what nobody adopts is removed when the folder's writer recovers or closes."""
    return f".part-{own}-{group}-{shard}.tmp"


def is_part(name: str) -> bool:
    """Whether `part_name` gives such names."""
    return re.fullmatch(r"\.part-[0-9a-f]{32}-\d+-\d+\.tmp", name) is not None
