"""The best rows of each of many features, and what stands around each: batched, on the device, mergeable."""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch

Tensor = torch.Tensor
NOTHING = float("-inf")
"""the score of a place that no row has taken"""
NO_TOKEN = -1
"""where a text has no token"""
_FEW = 2
"""times k: with more candidates for each feature, sorting all of them takes longer than choosing k"""


class Rows(NamedTuple):
    """The rows of one tensor in a batch, of whole samples."""

    samples: Tensor
    """int64 [n]"""
    positions: Tensor
    """int64 [n]"""
    tokens: Tensor
    """int32 [n, window]: those around each row; NO_TOKEN beyond the text"""
    around: Tensor
    """int64 [n, window]: the row of each of these tokens; -1 where it has none"""


class Entries(NamedTuple):
    """Candidates: one row of one feature each."""

    feature: Tensor
    score: Tensor
    value: Tensor
    sample: Tensor
    position: Tensor
    tokens: Tensor
    values: Tensor
    """[m, window]: the feature at each of the tokens around; nan where there is none"""


class Best:
    """For each feature the `k` rows of the highest score, in descending order."""

    def __init__(self, features: int, k: int, window: int, device: torch.device | None = None) -> None:
        self.tensors = {
            "score": torch.full((features, k), NOTHING, device=device),
            "value": torch.full((features, k), float("nan"), device=device),
            "sample": torch.full((features, k), -1, dtype=torch.int64, device=device),
            "position": torch.full((features, k), -1, dtype=torch.int64, device=device),
            "tokens": torch.full((features, k, window), NO_TOKEN, dtype=torch.int32, device=device),
            "values": torch.full((features, k, window), float("nan"), device=device),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The same again, of `tensors`. Raises KeyError, ValueError where they are none."""
        made = cls(0, 0, 0)
        found = {name: tensors[name] for name in made.tensors}
        shape = found["score"].shape
        if any(each.shape[:2] != shape or each.dtype != made.tensors[name].dtype for name, each in found.items()):
            raise ValueError("the tensors of the examples do not fit together")
        made.tensors = found
        return made

    @property
    def k(self) -> int:
        return self.tensors["score"].shape[1]

    def entries(self, scores: Tensor, values: Tensor, rows: Rows, columns: Tensor | None = None) -> Entries:
        """The rows that are among the best so far, at most k for each feature.

        `scores`: [n, features], NOTHING where a row is no example; `values`: [n, features], what is shown. `columns`:
        which features these are; None: all.
        """
        feature, row = self._chosen(scores, columns)
        around = rows.around[row]
        shown = values[around.clamp(min=0), feature[:, None]].float().masked_fill(around < 0, float("nan"))
        return Entries(
            feature if columns is None else columns[feature],
            scores[row, feature].float(),
            values[row, feature].float(),
            rows.samples[row],
            rows.positions[row],
            rows.tokens[row],
            shown,
        )

    def _chosen(self, scores: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
        """(which of `scores`, row) of the scores above the least one held, by feature, at most k of each."""
        if not self.k:
            nothing = torch.empty(0, dtype=torch.int64, device=scores.device)
            return nothing, nothing
        least = self.tensors["score"][:, -1]
        least = least if columns is None else least[columns]
        above = scores > least
        if int(above.sum()) > _FEW * self.k * scores.shape[1]:  # the first batches: nearly every score is above
            k = min(self.k, len(scores))
            best = scores.topk(k, dim=0)
            feature = torch.arange(scores.shape[1], device=scores.device).expand(k, -1)
            good = best.values > least
            return feature[good], best.indices[good]
        row, feature = above.nonzero(as_tuple=True)
        order = scores[row, feature].argsort(descending=True, stable=True)
        order = order[feature[order].argsort(stable=True)]
        row, feature = row[order], feature[order]
        kept = _rank(feature) < self.k
        return feature[kept], row[kept]

    def absorb(self, entries: Entries) -> None:
        """Take candidates; the best k of each feature stay, the earlier ones where scores are equal."""
        if not len(entries.feature):
            return
        order = entries.feature.argsort(stable=True)
        entries = Entries(*(each[order].to(self.tensors["score"].device) for each in entries))
        features, inverse = torch.unique_consecutive(entries.feature, return_inverse=True)
        rank = _rank(entries.feature)
        number = torch.full((len(features), int(rank.max()) + 1), -1, device=rank.device, dtype=torch.int64)
        number[inverse, rank] = torch.arange(len(rank), device=rank.device)
        missing = number < 0
        number = number.clamp(min=0)
        scores = torch.cat([self.tensors["score"][features], entries.score[number].masked_fill(missing, NOTHING)], 1)
        order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, : self.k]
        for name, held in self.tensors.items():
            both = torch.cat([held[features], getattr(entries, name)[number].to(held.dtype)], 1)
            place = order if both.ndim == 2 else order[:, :, None].expand(-1, -1, both.shape[2])
            held[features] = scores.gather(1, order) if name == "score" else both.gather(1, place)

    def merge(self, other: "Best") -> None:
        """Take the rows of another one of the same features."""
        held = other.tensors["score"] > NOTHING
        feature = held.nonzero(as_tuple=True)[0]
        self.absorb(Entries(feature, *(other.tensors[name][held] for name in Entries._fields[1:])))


def _rank(groups: Tensor) -> Tensor:
    """Which one of its group each is, 0-based; `groups` ascending."""
    _, counts = torch.unique_consecutive(groups, return_counts=True)
    first = counts.cumsum(0) - counts
    return torch.sub(torch.arange(len(groups), device=groups.device), first.repeat_interleave(counts))
