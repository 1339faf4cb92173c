"""A sink that keeps the best rows of each feature, and draws some at random."""

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from hookmap.activations import Activation, Key, Sample
from hookmap.analysis.examples.best import NO_TOKEN, NOTHING, Best, Entries, Rows
from hookmap.analysis.examples.result import Examples, TensorExamples
from hookmap.analysis.gathering import Gathering
from hookmap.capture.estimate import in_words
from hookmap.errors import CaptureError
from hookmap.loading.memory import available
from hookmap.stores import sparse
from hookmap.stores.ledger import tensor_name

log = logging.getLogger("hookmap")


class _Part(NamedTuple):
    """What a batch gives for some features of a tensor."""

    key: Key
    columns: torch.Tensor | None
    """which; None: all"""
    top: Entries
    random: Entries
    positive: torch.Tensor
    """tokens at which each is above 0"""


class Collector(Gathering):
    """Takes activations into `Examples`. Every row of a sample must come."""

    def __init__(
        self,
        examples: Examples,
        known: Callable[[int], Sample] | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """`known`, `after`: as of `Gathering`."""
        super().__init__(examples.keys, examples.samples, known, after)
        self.examples = examples
        self._pending: list[_Part] = []
        self._counted: list[tuple[Key, int, int]] = []
        """tensor, tokens that were looked at, rows that are not finite"""
        self._rows: tuple[object, Rows | None, torch.Tensor] = (None, None, torch.empty(0))

    def take(self, key: Key, rows: torch.Tensor, pieces: list[Activation]) -> None:
        if not len(rows):
            return
        settings, values = self.examples.settings, self.examples.features.of(rows, key)
        if key not in self.examples.tensors:
            self.examples.tensors[key] = self._nothing(key, values)
        held, (where, drawn) = self.examples.tensors[key], self._rows_of(pieces, rows.device)
        finite = sparse.finite(values) if values.is_sparse else values.isfinite().all(1)
        counts = finite & (where.positions >= settings.skip)
        for columns, part in sparse.by_columns(values) if values.is_sparse else ((None, values),):
            positive = (part > 0) & counts[:, None]
            meant = positive if settings.positive else counts[:, None]
            top = held.top.entries(torch.where(meant, part, NOTHING), part, where, columns)
            draws = drawn[:, None].expand(-1, part.shape[1])
            random = held.random.entries(torch.where(meant, draws, NOTHING), part, where, columns)
            self._pending.append(_Part(key, columns, top, random, positive.sum(0)))
        self._counted.append((key, int(counts.sum()), int((~finite).sum())))

    def commit(self, samples: Mapping[int, Sample]) -> None:
        for key, columns, top, random, positive in self._pending:
            held = self.examples.tensors[key]
            held.top.absorb(top)
            held.random.absorb(random)
            if columns is None:
                held.positive += positive
            else:
                held.positive[columns] += positive
        for key, tokens, lost in self._counted:
            held = self.examples.tensors[key]
            held.tokens += tokens
            if lost and not any(each.not_finite for each in self.examples.tensors.values()):
                log.warning("%s has rows that are not finite: they are no examples.", tensor_name(key))
            held.not_finite += lost
        self.examples.samples.update(samples)
        self.forget()

    def forget(self) -> None:
        self._pending, self._counted = [], []

    def _nothing(self, key: Key, values: torch.Tensor) -> TensorExamples:
        """Raises CaptureError where the examples of all tensors would not fit into memory."""
        settings, features = self.examples.settings, values.shape[1]
        needs = features * (settings.k + settings.random) * (24 + 8 * settings.window) * len(self.examples.keys)
        if not self.examples.tensors and 2 * needs > (free := available()):
            raise CaptureError(
                f"examples of {features} features of {tensor_name(key)} and tensors like it are {in_words(2 * needs)}, "
                f"and {in_words(free)} are free: name fewer features, layers or examples (k, random), or less context."
            )
        top, random = (Best(features, k, settings.window, values.device) for k in (settings.k, settings.random))
        return TensorExamples(top, random, torch.zeros(features, dtype=torch.int64, device=values.device))

    def _rows_of(self, pieces: list[Activation], device: torch.device) -> tuple[Rows, torch.Tensor]:
        """Where these rows are, and the number that each one draws. The tensors of one batch have the same rows."""
        same = (device, tuple((piece.sample, piece.start, len(piece.tensor)) for piece in pieces))
        if self._rows[0] == same and self._rows[1] is not None:
            return self._rows[1], self._rows[2]
        spans: dict[int, int] = {}
        for piece in pieces:
            spans[piece.sample] = spans.get(piece.sample, 0) + len(piece.tensor)
        found, drawn, first = list[Rows](), list[torch.Tensor](), 0
        for number, count in spans.items():
            found.append(self._of_sample(number, count, first))
            seed = (self.examples.settings.seed * 1_000_003 + number) % 2**63
            drawn.append(torch.rand(count, generator=torch.Generator().manual_seed(seed)))
            first += count
        joined = Rows(*(torch.cat(each).to(device) for each in zip(*found, strict=True)))
        self._rows = (same, joined, torch.cat(drawn).to(device))
        return joined, self._rows[2]

    def _of_sample(self, number: int, count: int, first: int) -> Rows:
        """The rows of one sample, the first of which is row `first` of the batch."""
        settings, sample = self.examples.settings, self.sample(number)
        positions = torch.arange(count)
        around = positions[:, None] + torch.arange(-settings.before, settings.after + 1)
        inside = (around >= 0) & (around < count)
        tokens = torch.tensor(sample.token_ids[:count], dtype=torch.int32)
        shown = tokens[around.clamp(0, count - 1)].masked_fill(~inside, NO_TOKEN)
        return Rows(torch.full((count,), number), positions, shown, (around + first).masked_fill(~inside, -1))
