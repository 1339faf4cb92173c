"""The rows of labelled texts as they come: pooled, and handed on some thousand at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from hookmap.activations import Activation, Key, Sample
from hookmap.analysis.gathering import Gathering
from hookmap.analysis.probes.streamed.targets import MAX, Targets
from hookmap.stores import sparse
from hookmap.stores.number_set import NumberSet

Tensor = torch.Tensor
TOKENS: Key = ("token_ids", None)
"""no tensor of a model: the ids of the tokens themselves, as a baseline reads them"""


class Block(NamedTuple):
    """Rows of one tensor with their labels."""

    rows: Tensor
    """[n, d], dense or sparse"""
    values: Tensor
    """float64 [sets, n]"""
    questions: Tensor
    """int64 [n]"""
    lost: int
    """rows that were left out, because they are not finite"""


class Takes(NamedTuple):
    """Who takes what is read."""

    rows: Callable[[Key, Block], None]
    """the blocks of each tensor in turn"""
    texts: Callable[[list[int]], None] = lambda numbers: None
    """then the numbers of the texts whose rows they were, all of them"""


class Buffers:
    """Rows of texts, pooled; handed on when there are enough."""

    def __init__(self, targets: Targets, tokens: int, takes: Takes, size: int) -> None:
        """`tokens`: ids are below it. `size`: rows of a block."""
        self._targets, self._tokens, self._takes, self._size = targets, tokens, takes, size
        self._kept: dict[Key, list[tuple[Tensor, list[int]]]] = {}
        self._numbers: list[int] = []
        self._count = 0

    def pooled(self, rows: Tensor, numbers: Sequence[int]) -> Tensor:
        """The rows of these texts that are read, one text after another, as they are learnt."""
        counts = torch.tensor([len(self._targets.of[number].rows) for number in numbers], device=rows.device)
        if self._targets.per == "token" or int(counts.max()) == 1:
            return rows
        owner = torch.repeat_interleave(torch.arange(len(numbers), device=rows.device), counts)
        return (_largest if self._targets.pool == MAX else _mean)(rows, owner, counts)

    def add(self, key: Key, rows: Tensor, numbers: Sequence[int]) -> None:
        """Take pooled rows."""
        self._kept.setdefault(key, []).append((rows, [*numbers]))

    def end(self, samples: Mapping[int, Sample]) -> None:
        """The rows of all tensors of these texts were taken."""
        told = self._of_tokens(samples)
        self.add(TOKENS, told, [*samples])
        self._numbers += samples
        self._count += told.shape[0]
        if self._count >= self._size:
            self.flush()

    def _of_tokens(self, samples: Mapping[int, Sample]) -> Tensor:
        """Sparse: of each text how often it has each token; of each token that it is this one."""
        rows, columns = [], []
        count = 0
        for number, sample in samples.items():
            own = self._targets.of[number]
            if self._targets.per == "token":
                columns.append(np.array([sample.token_ids[sample.row_positions[row]] for row in own.rows]))
                rows.append(count + np.arange(len(own.rows)))
                count += len(own.rows)
            else:
                last = sample.row_positions[int(own.rows[-1])] if sample.positions != "mean" else None
                columns.append(np.array(sample.token_ids[: None if last is None else last + 1]))
                rows.append(np.full(len(columns[-1]), count))
                count += 1
        at = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(columns)]))
        ones = torch.ones(at.shape[1])
        return torch.sparse_coo_tensor(at, ones, (count, self._tokens), check_invariants=True).coalesce()

    def flush(self) -> None:
        """Hand on what is held."""
        kept, self._kept, self._count = self._kept, {}, 0
        for key, held in kept.items():
            numbers = [number for _, own in held for number in own]
            targets = [self._targets.of[number] for number in numbers]
            values = torch.from_numpy(np.concatenate([each.values for each in targets], axis=1))
            questions = torch.from_numpy(np.repeat([t.question for t in targets], [t.values.shape[1] for t in targets]))
            rows = torch.cat([each for each, _ in held])
            good = (sparse.finite(rows) if rows.is_sparse else rows.isfinite().all(1)).cpu()
            lost = int((~good).sum())
            if lost:
                places = good.nonzero().flatten()
                rows = rows.index_select(0, places.to(rows.device))
                values, questions = values[:, places], questions[places]
            if len(questions):
                self._takes.rows(key, Block(rows, values.to(rows.device), questions, lost))
        numbers, self._numbers = self._numbers, []
        self._takes.texts(numbers)


class Reading(Gathering):
    """Takes activations of texts that have a target."""

    def __init__(
        self, keys: Iterable[Key], targets: Targets, buffers: Buffers, known: Callable[[int], Sample] | None
    ) -> None:
        super().__init__(keys, NumberSet(), known, lambda: None)
        self._targets, self._buffers = targets, buffers
        self._batch: list[tuple[Key, Tensor, list[int]]] = []

    def take(self, key: Key, rows: Tensor, pieces: list[Activation]) -> None:
        rows = rows if rows.is_sparse else rows.flatten(1)
        starts: dict[int, int] = {}
        place = 0
        for piece in pieces:
            starts.setdefault(piece.sample, place)
            place += len(piece.tensor)
        chosen = np.concatenate([start + self._targets.of[number].rows for number, start in starts.items()])
        rows = rows.index_select(0, torch.from_numpy(chosen).to(rows.device))
        self._batch.append((key, self._buffers.pooled(rows, [*starts]), [*starts]))

    def commit(self, samples: Mapping[int, Sample]) -> None:
        for key, rows, numbers in self._batch:
            self._buffers.add(key, rows, numbers)
        self._buffers.end(samples)
        self.forget()

    def forget(self) -> None:
        self._batch = []


def _mean(rows: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    if rows.is_sparse:
        rows = rows.coalesce()
        row, column = rows.indices()
        values = rows.values().float() / counts[owner[row]]
        at = torch.stack([owner[row], column])
        size = (len(counts), rows.shape[1])
        return torch.sparse_coo_tensor(at, values, size, check_invariants=True).coalesce()
    found = torch.zeros(len(counts), rows.shape[1], dtype=torch.float64, device=rows.device)
    return (found.index_add_(0, owner, rows.double()) / counts[:, None]).float()


def _largest(rows: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """Of sparse rows, of which most numbers are 0 and none is below: the largest of those that there are."""
    if not rows.is_sparse:
        at = owner[:, None].expand(-1, rows.shape[1])
        empty = rows.new_empty(len(counts), rows.shape[1])
        return empty.scatter_reduce(0, at, rows, "amax", include_self=False)
    rows = rows.coalesce()
    row, column = rows.indices()
    cells, place = torch.unique(owner[row] * rows.shape[1] + column, return_inverse=True)
    values = rows.values().new_empty(len(cells)).scatter_reduce(0, place, rows.values(), "amax", include_self=False)
    at = torch.stack([cells // rows.shape[1], cells % rows.shape[1]])
    size = (len(counts), rows.shape[1])
    return torch.sparse_coo_tensor(at, values, size, check_invariants=True).coalesce()
