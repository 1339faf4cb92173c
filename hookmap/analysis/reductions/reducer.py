"""A sink that sums rows up instead of keeping them."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hookmap.activations import Activation, Key, Sample
from hookmap.analysis.gathering import Gathering
from hookmap.analysis.reductions.accumulators import Batch
from hookmap.analysis.reductions.statistics import ALL, Statistics, Sums, TensorSums, absorb
from hookmap.analysis.reductions.wanted import KINDS, LABEL, POSITION, SINK
from hookmap.capture.estimate import in_words
from hookmap.errors import CaptureError
from hookmap.loading.memory import available
from hookmap.stores import sparse
from hookmap.stores.interface import position_of
from hookmap.stores.ledger import tensor_name

log = logging.getLogger("hookmap")

OTHER, TEXT = "other", "text"


class _Groups(NamedTuple):
    """Which groups of one grouping some rows belong to."""

    slots: torch.Tensor
    """[groups]: their numbers in the statistics"""
    member: torch.Tensor
    """[rows]: which of `slots`"""


class _Broken(NamedTuple):
    """Rows that are not finite."""

    key: Key
    rows: int
    sample: int
    position: int | None
    """of the first"""


class Reducer(Gathering):
    """Takes activations into `Statistics`."""

    def __init__(
        self,
        statistics: Statistics,
        known: Callable[[int], Sample] | None = None,
        after: Callable[[], None] = lambda: None,
        most: Mapping[str, int] | None = None,
    ) -> None:
        """`known`, `after`: as of `Gathering`. `most`: groups of each grouping that may come; where their sums would
        not fit into memory, the first batch raises CaptureError.
        """
        super().__init__(statistics.keys, statistics.samples, known, after)
        self.statistics = statistics
        self._rows: dict[Key, tuple[int, ...]] = {}
        self._pending: list[tuple[Key, str, Sums, torch.Tensor]] = []
        self._broken: list[_Broken] = []
        self._grouped: tuple[Any, dict[str, _Groups]] = (None, {})
        self._most, self._needed = dict(most or {}), dict[tuple[Key, str], int]()

    def take(self, key: Key, rows: torch.Tensor, pieces: list[Activation]) -> None:
        """Sum up the rows of a batch; sparse ones a few at a time."""
        if not rows.is_sparse:
            self._sum(key, rows, pieces)
            return
        for piece in pieces:
            for first, dense in sparse.pieces(piece.tensor):
                self._sum(key, dense, [replace(piece, start=piece.start + first, tensor=dense)])

    def _sum(self, key: Key, rows: torch.Tensor, pieces: list[Activation]) -> None:
        self._rows.setdefault(key, tuple(rows.shape[1:]))
        if not len(rows):
            return
        groups = dict(self._groups_of(pieces, rows.device))
        flat = rows.flatten(1)
        flat = flat.cpu() if flat.device.type == "mps" else flat  # which has no float64
        if not bool(flat.sum(dtype=torch.float64 if flat.dtype == torch.float64 else torch.float32).isfinite()):
            flat, groups = self._without_broken(key, pieces, flat, groups)
            if not len(flat):
                return
        wanted = self.statistics.wanted
        text = groups.pop(TEXT).member.to(flat.device)
        views = {view: wanted.of_rows(view, flat, key[1], text) for view, _ in wanted.accumulators}
        for by, (slots, member) in groups.items():
            batches = {view: Batch(each, len(slots), member.to(each.device)) for view, each in views.items()}
            sums = {
                (view, kind): KINDS[kind].of(batches[view], parameter)
                for (view, kind), parameter in wanted.accumulators.items()
            }
            self._check_room(key, by, sums, len(slots))
            self._pending.append((key, by, sums, slots))

    def commit(self, samples: Mapping[int, Sample]) -> None:
        statistics = self.statistics
        for key, row in self._rows.items():
            statistics.tensors.setdefault(key, TensorSums(row, {by: {} for by in statistics.groupings}))
        for key, by, sums, slots in self._pending:
            absorb(statistics.tensors[key].sums[by], sums, slots)
        for broken in self._broken:
            self._count(broken)
        statistics.samples.update(samples)
        self.forget()

    def forget(self) -> None:
        self._pending, self._broken = [], []

    def _count(self, broken: _Broken) -> None:
        if not any(each.not_finite for each in self.statistics.tensors.values()):
            at = "" if broken.position is None else f", position {broken.position}"
            where = f"from sample {broken.sample}{at} on"
            log.warning("%s has rows that are not finite, %s: they are left out.", tensor_name(broken.key), where)
        held = self.statistics.tensors[broken.key]
        held.not_finite += broken.rows
        held.first_not_finite = held.first_not_finite or (broken.sample, broken.position)

    def _check_room(self, key: Key, by: str, sums: Sums, groups: int) -> None:
        """Raises CaptureError where the sums of all groups that may come are more than the memory."""
        if by not in self._most or (key, by) in self._needed:
            return
        one = sum(value.nbytes for each in sums.values() for value in each.state().values()) // groups
        self._needed[key, by] = one * self._most[by]
        if (needs := sum(self._needed.values())) > (free := available()):
            raise CaptureError(
                f"statistics by {by} of up to {self._most[by]} groups hold {in_words(needs)} and more in memory, and "
                f"{in_words(free)} are free. Choose fewer points or layers, or leave out covariance, quantiles or {by}."
            )

    def _without_broken(
        self, key: Key, pieces: list[Activation], rows: torch.Tensor, groups: dict[str, _Groups]
    ) -> tuple[torch.Tensor, dict[str, _Groups]]:
        """The rows that are finite, and their groups."""
        good = rows.isfinite().all(1)
        if bool(good.all()):  # their sum alone was beyond the numbers
            return rows, groups
        first = int((~good).nonzero()[0])
        for piece in pieces:
            if first < len(piece.tensor):
                position = position_of(self.sample(piece.sample), piece.start + first)
                self._broken.append(_Broken(key, int((~good).sum()), piece.sample, position))
                break
            first -= len(piece.tensor)
        kept = {}
        for by, (slots, member) in groups.items():
            left, inverse = torch.unique(member[good.to(member.device)], return_inverse=True)
            kept[by] = _Groups(slots[left.to(slots.device)], inverse)
        return rows[good], kept

    def _groups_of(self, pieces: list[Activation], device: torch.device) -> dict[str, _Groups]:
        """The groups of these rows. The tensors of one batch have the same rows, so it is computed once for them."""
        same = (device, tuple((piece.sample, piece.start, len(piece.tensor)) for piece in pieces))
        if self._grouped[0] != same:
            found = {by: self._grouped_by(by, pieces, device) for by in self.statistics.groupings}
            found[TEXT] = _by_text(pieces, device)
            self._grouped = (same, found)
        return self._grouped[1]

    def _grouped_by(self, by: str, pieces: list[Activation], device: torch.device) -> _Groups:
        slots = []
        for piece in pieces:
            rows = range(piece.start, piece.start + len(piece.tensor))
            slots += [self.statistics.slot(by, value) for value in _values(by, self.sample(piece.sample), rows)]
        found, member = torch.unique(torch.tensor(slots, dtype=torch.long), return_inverse=True)
        return _Groups(found, member.to(device))


def _by_text(pieces: list[Activation], device: torch.device) -> _Groups:
    """The text of each row: which of the batch."""
    numbers = torch.tensor([piece.sample for piece in pieces for _ in range(len(piece.tensor))])
    found, member = torch.unique(numbers, return_inverse=True)
    return _Groups(found, member.to(device))


def _values(by: str, sample: Sample, rows: range) -> list[Any]:
    """The group of each of these rows of a sample."""
    if by == ALL:
        return [None] * len(rows)
    if by.startswith(LABEL):
        return [(sample.labels or {}).get(by.removeprefix(LABEL))] * len(rows)
    positions = [sample.row_positions[row] for row in rows]
    if by == SINK:
        return [SINK if position == 0 else OTHER for position in positions]
    if by == POSITION:
        return positions
    return [sample.token_ids[position] for position in positions]
