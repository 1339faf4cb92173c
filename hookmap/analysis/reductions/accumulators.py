"""What is summed up of rows, for each group of them: float64, on the device of the rows, and mergeable.

An accumulator of one batch is made by `of`; `absorb` takes it into one of many batches. The order and the cut of the
batches change nothing but the rounding in float64. (Chan et al. 1983 and Pébay 2008 for the moments.)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

Tensor = torch.Tensor
_CACHED = 2**17
"""float64 numbers that a processor holds near: 1 MB"""


@dataclass(frozen=True)
class Batch:
    """Rows of one tensor, all finite, and the group that each belongs to."""

    rows: Tensor
    """[n, d], in the dtype that they come in"""
    groups: int
    member: Tensor
    """int64 [n]: the group of each row, from 0 on; each group has a row"""

    @property
    def wide(self) -> Tensor:
        """The rows in float64."""
        return self.rows.double()

    def sums(self, of: Callable[[Tensor], list[Tensor]], about: Tensor | None = None) -> list[Tensor]:
        """The sums over the rows of each group, float64 [groups, d] each, of what `of` gives for some rows [n, d].

        about: [groups, d], subtracted first. On a processor a few rows at a time are float64, so that they stay in its
        cache.
        """
        rows, whole = self.rows, self.rows.device.type != "cpu"
        size = max(1, len(rows) if whole else _CACHED // max(1, rows.shape[1]))
        found: list[Tensor] = []
        for part, member in zip(torch.split(rows, size), torch.split(self.member, size), strict=True):
            wide = part.double()
            if about is not None:
                wide = wide - (about if self.groups == 1 else about.index_select(0, member))
            for place, values in enumerate(of(wide)):
                if place == len(found):
                    found.append(values.new_zeros(self.groups, values.shape[1]))
                if self.groups == 1:
                    found[place] += values.sum(0)
                else:
                    found[place].index_add_(0, member, values)
        return found

    def counts(self) -> Tensor:
        """Rows of each group, float64 [groups]."""
        return torch.bincount(self.member, minlength=self.groups).double()


class Accumulator(ABC):
    """One kind of sums, for any number of groups. A subclass says how a batch is summed up and how two are merged."""

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def of(cls, batch: Batch, parameter: Any) -> Self:
        """The sums of a batch. `parameter`: what this kind needs to know, such as edges of bins."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """How many groups there is room for; some may have no rows."""

    @abstractmethod
    def absorb(self, other: Self, slots: Tensor) -> None:
        """Take another's group i into this one's group slots[i]. The slots differ; missing groups are made."""

    @abstractmethod
    def take(self, groups: range) -> Self:
        """A copy of these groups."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors that a file can hold."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The same again. Raises KeyError, ValueError, IndexError where the tensors are no state."""

    def collapsed(self) -> Self:
        """All groups as one."""
        found = self.take(range(self.groups))
        while (groups := found.groups) > 1:
            half = (groups + 1) // 2
            rest = found.take(range(half, groups))
            found = found.take(range(half))
            found.absorb(rest, torch.arange(groups - half))
        return found


class Sums(Accumulator):
    """An accumulator that is tensors and nothing else, whose first axis is the groups."""

    empty: ClassVar[Mapping[str, float]]
    """name of each tensor -> what it is of a group without rows"""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def groups(self) -> int:
        return len(next(iter(self.tensors.values())))

    def absorb(self, other: Self, slots: Tensor) -> None:
        wanted = int(slots.max()) + 1 if len(slots) else 0
        if wanted > self.groups:
            size = max(wanted, min(2 * self.groups, self.groups + 1024))
            for name, held in self.tensors.items():
                grown = held.new_full((size, *held.shape[1:]), self.empty[name])
                grown[: len(held)] = held
                self.tensors[name] = grown
        device = next(iter(self.tensors.values())).device
        slots, theirs = slots.to(device), {name: each.to(device) for name, each in other.tensors.items()}
        merged = self.merged({name: each[slots] for name, each in self.tensors.items()}, theirs)
        for name, value in merged.items():
            self.tensors[name][slots] = value

    @staticmethod
    @abstractmethod
    def merged(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of both, group by group."""

    def take(self, groups: range) -> Self:
        return type(self)({name: each[groups.start : groups.stop].clone() for name, each in self.tensors.items()})

    def state(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        found = {name: state[name] for name in cls.empty if name in state}
        if len({len(each) for each in found.values()}) != 1:
            raise ValueError(f"expected {', '.join(cls.empty)} of as many groups")
        return cls(found)


class Moments(Sums):
    """Count, mean, and sums of the 2nd to 4th powers of what differs from the mean. parameter: up to which power."""

    kind = "moments"
    empty: ClassVar = {"count": 0, "mean": 0, "m2": 0, "m3": 0, "m4": 0}

    @classmethod
    def of(cls, batch: Batch, parameter: Any) -> Self:
        count = batch.counts()
        found = {"count": count}
        if parameter >= 1:
            found["mean"] = batch.sums(lambda rows: [rows])[0] / count[:, None]
        if parameter >= 2:
            powers = batch.sums(lambda apart: _powers(apart, parameter), found["mean"])
            found |= dict(zip(("m2", "m3", "m4"), powers, strict=False))
        return cls(found)

    @staticmethod
    def merged(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {"count": a["count"] + b["count"]}
        if "mean" not in a:
            return found
        x, y, n = (each[:, None] for each in (a["count"], b["count"], found["count"].clamp(min=1)))
        delta = b["mean"] - a["mean"]
        found["mean"] = a["mean"] + delta * (y / n)
        if "m2" in a:
            found["m2"] = a["m2"] + b["m2"] + delta**2 * (x * y / n)
        if "m3" in a:
            found["m3"] = (
                a["m3"]
                + b["m3"]
                + delta**3 * (x * y * (x - y) / n**2)
                + 3 * delta * ((x / n) * b["m2"] - (y / n) * a["m2"])
            )
        if "m4" in a:
            found["m4"] = (
                a["m4"]
                + b["m4"]
                + delta**4 * (x * y * (x * x - x * y + y * y) / n**3)
                + 6 * delta**2 * ((x / n) ** 2 * b["m2"] + (y / n) ** 2 * a["m2"])
                + 4 * delta * ((x / n) * b["m3"] - (y / n) * a["m3"])
            )
        return found


def _powers(apart: Tensor, most: int) -> list[Tensor]:
    square = apart * apart
    return [square, square * apart, square * square][: most - 1]


class Extrema(Sums):
    """The least and the greatest value of each feature."""

    kind = "extrema"
    empty: ClassVar = {"min": float("inf"), "max": float("-inf")}

    @classmethod
    def of(cls, batch: Batch, parameter: Any) -> Self:
        if batch.groups == 1:
            least, greatest = batch.rows.amin(0, keepdim=True), batch.rows.amax(0, keepdim=True)
            return cls({"min": least.double(), "max": greatest.double()})
        member = batch.member[:, None].expand_as(batch.rows)
        empty = batch.rows.new_empty(batch.groups, batch.rows.shape[1])
        least, greatest = (
            empty.scatter_reduce(0, member, batch.rows, how, include_self=False) for how in ("amin", "amax")
        )
        return cls({"min": least.double(), "max": greatest.double()})

    @staticmethod
    def merged(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"min": torch.minimum(a["min"], b["min"]), "max": torch.maximum(a["max"], b["max"])}


class Covariance(Sums):
    """Count, mean, and the sum of the products of what differs from it: [d, d]."""

    kind = "covariance"
    empty: ClassVar = {"count": 0, "mean": 0, "products": 0}

    @classmethod
    def of(cls, batch: Batch, parameter: Any) -> Self:
        count = batch.counts()
        mean, wide = batch.sums(lambda rows: [rows])[0] / count[:, None], batch.wide
        products = []
        for group in range(batch.groups):
            rows = wide if batch.groups == 1 else wide[batch.member == group]
            apart = rows - mean[group]
            products.append(apart.T @ apart)
        return cls({"count": count, "mean": mean, "products": torch.stack(products)})

    @staticmethod
    def merged(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        count = a["count"] + b["count"]
        x, y, n = (each[:, None] for each in (a["count"], b["count"], count.clamp(min=1)))
        delta = b["mean"] - a["mean"]
        between = (delta * (x * y / n))[:, :, None] * delta[:, None, :]
        return {
            "count": count,
            "mean": a["mean"] + delta * (y / n),
            "products": a["products"] + b["products"] + between,
        }


class Histogram(Sums):
    """How many values of each feature lie in each bin. parameter: the edges of the bins, ascending.

    A bin holds its lower edge and not its upper one; the last bin holds both, as NumPy's does.
    """

    kind = "histogram"
    empty: ClassVar = {"counts": 0}

    @classmethod
    def of(cls, batch: Batch, parameter: Any) -> Self:
        rows, edges = batch.wide, torch.tensor(parameter, dtype=torch.float64, device=batch.rows.device)
        bins = torch.bucketize(rows, edges, right=True)  # 0: below the first edge; len(edges): above the last
        bins -= (rows == edges[-1]).long()
        width, size = rows.shape[1], len(parameter) + 1
        cells = (batch.member[:, None] * width + torch.arange(width, device=bins.device)) * size + bins
        counts = torch.bincount(cells.flatten(), minlength=batch.groups * width * size)
        return cls({"counts": counts.view(batch.groups, width, size)})

    @staticmethod
    def merged(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"counts": a["counts"] + b["counts"]}
