"""Rows of a capture in random order, at the speed of the disk: what probes and sparse autoencoders are trained on.

Shards are opened in random order, each is read from front to back, and its rows go through a buffer out of which rows
are drawn at random. So the disk sees long reads, memory is flat, and every row comes exactly once in an epoch.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch.utils.data import IterableDataset, get_worker_info

from hookmap.activations import Key, Sample
from hookmap.errors import SelectionError
from hookmap.maps.points import FEATURES, PointName
from hookmap.stores.ledger import tensor_name

SHUFFLE_ROWS = 2**14
"""rows that the buffer holds"""

_Rows: TypeAlias = dict[str, Any]
"""tensors [rows, …] by name, and lists for labels"""


class _Run(NamedTuple):
    """Contiguous rows of one sample in one shard."""

    sample: int
    start: int
    """which row of the sample the first one is"""
    rows: int
    row: int | None
    """which row of the shard's tensors it is; None where the tensors that are wanted are in several shards"""


class RowSource(Protocol):
    """What a data set asks of a store."""

    @property
    def keys(self) -> tuple[Key, ...]: ...
    def key(self, point: str, layer: int | None = None) -> Key: ...
    def sample(self, number: int) -> Sample: ...
    def spans(self) -> Iterator[tuple[int, Any]]: ...
    def rows_at(self, sample: int, key: Key, rows: Sequence[int]) -> torch.Tensor: ...
    def shard_rows(self, shard: Any, key: Key, start: int, count: int) -> torch.Tensor: ...


class RowDataset(IterableDataset[_Rows]):
    """Batches of rows of some tensors: {"resid_mid.8": [batch, d], …}, and with `where` whose rows they are.

    Use it as it is, or in a DataLoader with batch_size=None; its workers share the shards, each row comes to one.
    Each pass has another order, decided by the seed and the pass's number. In workers it also depends on torch's seed,
    by which new workers tell passes apart, unless `set_epoch` says which pass it is.
    """

    def __init__(
        self,
        store: RowSource,
        keys: Sequence[Key],
        *,
        batch_size: int = 1024,
        shuffle_rows: int = SHUFFLE_ROWS,
        seed: int = 0,
        where: bool = False,
        label: str | None = None,
    ) -> None:
        """`shuffle_rows`: rows that the buffer holds; 0 leaves the order as it is on disk.

        `where`: give "sample" [batch] and "position" [batch] too; `label`: and this label of each row's sample.
        Raises SelectionError.
        """
        self._store = store
        self._keys = [store.key(*key) for key in keys]
        if not self._keys or len(set(self._keys)) != len(self._keys):
            raise SelectionError(f"rows of which tensors? Expected each once, got {list(keys)}.")
        if sparse := [tensor_name(key) for key in self._keys if PointName.of(key[0]).base == FEATURES]:
            raise SelectionError(f"{', '.join(sparse)}: sparse rows make no batches: read them, store.rows(…).")
        if batch_size < 1 or shuffle_rows < 0:
            raise SelectionError(f"expected batch_size over 0 and shuffle_rows, got {batch_size} and {shuffle_rows}.")
        self._batch_size, self._shuffle_rows, self._seed = batch_size, shuffle_rows, seed
        self._where, self._label = where, label
        self._shards = self._index()
        self._epoch = self._skip = 0
        self._told = False
        """whether `set_epoch` said where to begin"""

    @property
    def rows(self) -> int:
        """How many rows a pass gives, over all workers."""
        return sum(run.rows for runs in self._shards.values() for run in runs)

    def set_epoch(self, epoch: int, batch: int = 0) -> None:
        """Begin the next pass as pass `epoch`, 0 being the first, behind its first `batch` batches.

        So a training that was interrupted sees what an undisturbed one would have seen; with workers, where there are
        as many as before. Later passes follow. New workers know of no pass before: with a DataLoader whose workers are
        not persistent, call this before each pass; where they are, before the first.
        """
        if any(type(number) is not int or number < 0 for number in (epoch, batch)):
            raise SelectionError(f"expected epoch and batch as whole numbers from 0 on, got {epoch!r} and {batch!r}.")
        self._epoch, self._skip, self._told = epoch, batch, True

    def __iter__(self) -> Iterator[_Rows]:
        worker = get_worker_info()
        of_pass = f"{self._seed} {self._epoch}"
        if worker is not None and not self._told:  # new workers begin with the pass that the loader's process is at
            of_pass += f" {worker.seed - worker.id}"
        chance, skip = random.Random(of_pass), self._skip
        self._epoch, self._skip = self._epoch + 1, 0
        shards = sorted(self._shards)
        if self._shuffle_rows:
            chance.shuffle(shards)
        if worker is not None:
            part, skip = self._part(shards, worker.id, worker.num_workers, skip)
            shards = shards[part :: worker.num_workers]
        pieces = self._read(shards)
        if self._shuffle_rows:
            pieces = _shuffled(pieces, self._shuffle_rows, torch.Generator().manual_seed(chance.getrandbits(63)))
        yield from itertools.islice(_batches(pieces, self._batch_size), skip, None)

    def _part(self, shards: Sequence[int], worker: int, workers: int, skip: int) -> tuple[int, int]:
        """Which part of the shards a worker has, and how many batches of it were given: of `skip` over all parts.

        Parts give a batch each in turn. The loader always begins with its first worker: that one gets the part whose
        turn it is.
        """
        parts = [
            [run.rows for shard in shards[part::workers] for run in self._shards[shard]] for part in range(workers)
        ]
        batches = [-(-sum(rows) // self._batch_size) for rows in parts]
        given, turn = [0] * workers, 0
        while skip and sum(batches) > sum(given):
            if given[turn] < batches[turn]:
                given[turn], skip = given[turn] + 1, skip - 1
            turn = (turn + 1) % workers
        part = (worker + turn) % workers
        return part, given[part]

    def _index(self) -> dict[int, list[_Run]]:
        """Which samples' rows each shard has, in their order there. Some 200 bytes for each sample."""
        places = {self._store.keys.index(key) for key in self._keys}
        shards: dict[int, list[_Run]] = {}
        for sample, all_spans in self._store.spans():
            spans = [span for span in all_spans if span.rows and places & set(range(span.first, span.end))]
            ends = sorted({end for span in spans for end in (span.start, span.start + span.rows)})
            for start, end in itertools.pairwise(ends):
                held = [span for span in spans if span.start <= start and end <= span.start + span.rows]
                # Where several shards have the tensors of these rows, the first of them counts as theirs.
                row = held[0].row + start - held[0].start if len(held) == 1 else None
                shards.setdefault(held[0].shard, []).append(_Run(sample, start, end - start, row))
        for runs in shards.values():
            runs.sort(key=lambda run: (run.row is None, run.row or 0))
        return shards

    def _read(self, shards: Sequence[int]) -> Iterator[_Rows]:
        """The contiguous runs of rows in each shard."""
        for shard in shards:
            runs: list[_Run] = []
            for run in self._shards[shard]:
                if runs and (run.row is None or runs[-1].row is None or runs[-1].row + runs[-1].rows != run.row):
                    yield self._piece(shard, runs)
                    runs = []
                runs.append(run)
            if runs:
                yield self._piece(shard, runs)

    def _piece(self, shard: int, runs: Sequence[_Run]) -> _Rows:
        first, count = runs[0], sum(run.rows for run in runs)
        found: _Rows = {}
        for key in self._keys:
            if first.row is None:
                rows = self._store.rows_at(first.sample, key, range(first.start, first.start + first.rows))
            else:
                rows = self._store.shard_rows(shard, key, first.row, count)
            found[tensor_name(key)] = rows
        if self._where:
            found["sample"] = torch.cat([torch.full((run.rows,), run.sample) for run in runs])
            found["position"] = torch.tensor([position for run in runs for position in self._positions(run)])
        if self._label is not None:
            values = [self._value(run.sample, self._label) for run in runs]
            found["label"] = [value for run, value in zip(runs, values, strict=True) for _ in range(run.rows)]
        return found

    def _positions(self, run: _Run) -> Sequence[int]:
        kept = self._store.sample(run.sample).positions
        if kept == "mean":
            return [-1] * run.rows
        return (range(run.start + run.rows) if kept is None else kept)[run.start : run.start + run.rows]

    def _value(self, number: int, label: str) -> Any:
        labels = self._store.sample(number).labels or {}
        if label not in labels:
            raise SelectionError(f"sample {number} has no label {label!r}: it has {', '.join(labels) or 'none'}.")
        return labels[label]


def _shuffled(pieces: Iterator[_Rows], held_rows: int, seed: torch.Generator) -> Iterator[_Rows]:
    """Rows come in, and as many random ones of those that are held go out; at the end the rest of them."""
    filling: list[_Rows] = []
    held: _Rows | None = None
    for whole in pieces:
        # No more than fit into the place that is left, or at once.
        for piece in _split(whole, held_rows - sum(map(_count, filling)) if held is None else held_rows, held_rows):
            if held is None:
                filling.append(piece)
                if sum(map(_count, filling)) == held_rows:
                    held, filling = _join(filling), []
            else:
                yield _swap(held, piece, torch.randperm(held_rows, generator=seed)[: _count(piece)])
    if held is None and filling:
        held = _join(filling)
    if held is not None:
        yield _take(held, torch.randperm(_count(held), generator=seed))


def _split(rows: _Rows, first: int, then: int) -> Iterator[_Rows]:
    """The first so many rows, then always as many as `then`."""
    count, start, end = _count(rows), 0, first
    while start < count:
        yield {name: value[start:end] for name, value in rows.items()}
        start, end = end, end + then


def _swap(held: _Rows, piece: _Rows, places: torch.Tensor) -> _Rows:
    """Take the rows at these places of `held`, and put those of `piece` there."""
    out = _take(held, places)
    for name, value in held.items():
        if isinstance(value, torch.Tensor):
            value.index_copy_(0, places, piece[name])
        else:
            for place, one in zip(places.tolist(), piece[name], strict=True):
                value[place] = one
    return out


def _batches(pieces: Iterator[_Rows], size: int) -> Iterator[_Rows]:
    """The same rows in batches of `size`; the last has the remainder."""
    left: _Rows | None = None
    for piece in pieces:
        for part in _split(piece, size - (_count(left) if left else 0), size):
            batch = _join([left, part]) if left else part
            left = batch if _count(batch) < size else None
            if left is None:
                yield batch
    if left:
        yield left


def _join(parts: Sequence[_Rows]) -> _Rows:
    if len(parts) == 1:
        return parts[0]
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(value, torch.Tensor)
        else [one for part in parts for one in part[name]]
        for name, value in parts[0].items()
    }


def _take(rows: _Rows, places: torch.Tensor) -> _Rows:
    return {
        name: value.index_select(0, places)
        if isinstance(value, torch.Tensor)
        else [value[place] for place in places.tolist()]
        for name, value in rows.items()
    }


def _count(rows: _Rows) -> int:
    return len(next(iter(rows.values())))
