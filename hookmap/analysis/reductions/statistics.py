"""The result of a reduction: statistics of each tensor, over all rows and by groups of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hookmap.activations import Key
from hookmap.analysis.reductions.accumulators import Accumulator, Covariance, Extrema, Histogram, Moments
from hookmap.analysis.reductions.sketches import Quantiles
from hookmap.analysis.reductions.wanted import (
    COSINE,
    EXTREMA,
    MASSIVE,
    MOMENTS,
    NORM,
    OF_NUMBERS,
    OUTLIER,
    VALUE,
    Slot,
    Wanted,
)
from hookmap.errors import SelectionError
from hookmap.stores.interface import place_of
from hookmap.stores.ledger import tensor_name
from hookmap.stores.number_set import NumberSet
from hookmap.wording import counted, did_you_mean, sentence

ALL = "all"
"""the one grouping where none is asked for"""
PROBABILITIES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
Sums = dict[Slot, Accumulator]
Tensor = torch.Tensor


def absorb(into: Sums, other: Sums, slots: Tensor) -> None:
    """Take group i of `other` into group slots[i] of `into`."""
    for slot, theirs in other.items():
        if slot not in into:
            into[slot] = theirs.take(range(0))
        into[slot].absorb(theirs, slots)


@dataclass(frozen=True)
class Table:
    """Statistics of one tensor, for each group of its rows: `table["mean"]` is [groups, *row]."""

    grouping: str
    """what the groups are of: sink, position, token, label:NAME"""
    groups: tuple[Any, ...]
    """the value of each group: "sink" and "other", positions, token ids, values of the label"""
    _sums: Sums
    _slots: Tensor
    """which groups of the sums"""
    _wanted: Wanted
    _row: tuple[int, ...]

    @property
    def count(self) -> Tensor:
        """Rows of each group, int64 [groups]."""
        return self._of(VALUE, Moments, "count").long()

    @property
    def names(self) -> tuple[str, ...]:
        """What `[name]` gives; `norm.mean` and the like are of the rows' norms, `cosine.mean` of their cosines."""
        own = [name for name in self._wanted.reductions if name not in (NORM, COSINE)]
        more = [f"{view}.{name}" for view in (NORM, COSINE) if view in self._wanted.reductions for name in OF_NUMBERS]
        return tuple(dict.fromkeys(["count", *own, *more]))

    def __getitem__(self, name: str) -> Tensor:
        """float64 [groups, *row]; covariance [groups, d, d], quantiles [groups, probabilities, *row].

        A histogram is int64 [groups, *row, bins]: below the first edge, each bin, above the last. `norm.…` and
        `cosine.…` are [groups]; `outlier` and `massive` are shares of rows. Raises SelectionError for what was not
        asked for.
        """
        if name not in self.names:
            raise SelectionError(
                f"{name} was not asked for: these have {', '.join(self.names)}."
                f"{sentence(did_you_mean(name, self.names, n=1))}"
            )
        if name == "count":
            return self.count
        view, _, plain = name.rpartition(".")
        if view:
            return self._simple(view, plain)[:, 0]
        if name == "covariance":
            count = self._of(VALUE, Covariance, "count")
            return self._of(VALUE, Covariance, "products") / count[:, None, None]
        if name == "histogram":
            found = self._of(VALUE, Histogram, "counts")
            return found.view(len(found), *self._row, found.shape[-1])
        if name in (OUTLIER, MASSIVE):
            return self._simple(name, "mean").view(-1, *self._row)
        if name == "quantiles":
            return self.quantiles(PROBABILITIES)
        return self._simple(VALUE, name).view(-1, *self._row)

    def quantiles(self, probabilities: Sequence[float]) -> Tensor:
        """Quantiles of each feature, float64 [groups, probabilities, *row]. Raises SelectionError."""
        sketch = self._sums.get((VALUE, Quantiles.kind))
        if not isinstance(sketch, Quantiles):
            raise SelectionError(f"quantiles were not asked for: these have {', '.join(self.names)}.")
        if not all(0 <= each <= 1 for each in probabilities):
            raise SelectionError(f"quantiles: expected probabilities from 0 to 1, got {list(probabilities)}.")
        found = [sketch.values(group, tuple(probabilities)) for group in self._slots.tolist()]
        return torch.stack(found).view(len(found), len(probabilities), *self._row)

    def _simple(self, view: str, name: str) -> Tensor:
        if name in EXTREMA:
            return self._of(view, Extrema, name)
        count = self._of(view, Moments, "count")[:, None]
        if name == "mean":
            return self._of(view, Moments, "mean")
        second = self._of(view, Moments, "m2") / count
        if name == "variance":
            return second
        if name == "std":
            return second.sqrt()
        power = MOMENTS[name]
        return self._of(view, Moments, f"m{power}") / count / second ** (power / 2)

    def _of(self, view: str, kind: type[Accumulator], name: str) -> Tensor:
        return self._sums[view, kind.kind].state()[name].cpu()[self._slots]

    def __repr__(self) -> str:
        return f"<Table by {self.grouping} of {counted(len(self.groups), 'group')}: {', '.join(self.names)}>"


@dataclass(frozen=True)
class Summary:
    """Statistics of one tensor over all rows: `summary["mean"]` is of the shape of a row."""

    _table: Table
    _tables: Mapping[str, Table]
    not_finite: int
    """rows that hold an infinity or nan, and count nowhere else"""
    first_not_finite: tuple[int, int | None] | None
    """(sample, position) of the first of them"""

    @property
    def count(self) -> int:
        """Rows."""
        return int(self._table.count[0])

    @property
    def names(self) -> tuple[str, ...]:
        """What `[name]` gives."""
        return self._table.names

    def __getitem__(self, name: str) -> Tensor:
        """As of a `Table`, without the axis of the groups. Raises SelectionError."""
        return self._table[name][0]

    def by(self, grouping: str) -> Table:
        """The same for each group of rows: by("sink"), by("position"), by("label:NAME"). Raises SelectionError."""
        if grouping not in self._tables:
            held = ", ".join(name for name in self._tables if name != ALL) or "none"
            raise SelectionError(f"by {grouping!r}: these statistics have the groups {held}. Ask for them: by=[…].")
        return self._tables[grouping]

    def quantiles(self, *probabilities: float) -> Tensor:
        """Quantiles of each feature, float64 [probabilities, *row]. Raises SelectionError."""
        return self._table.quantiles(probabilities)[0]

    def eigenvectors(self, top: int | None = None) -> tuple[Tensor, Tensor]:
        """Of the covariance: (values [top], vectors [top, d]), the largest first: the principal components."""
        values, vectors = torch.linalg.eigh(self["covariance"])
        return values.flip(0)[:top], vectors.T.flip(0)[:top]

    def __repr__(self) -> str:
        return f"<Summary of {counted(self.count, 'row')}: {', '.join(self.names)}>"


@dataclass
class TensorSums:
    """What is held of one tensor."""

    row: tuple[int, ...]
    sums: dict[str, Sums]
    """by grouping"""
    not_finite: int = 0
    first_not_finite: tuple[int, int | None] | None = None


@dataclass
class Statistics:
    """Statistics of each point and layer: `statistics["resid_post", 8]["mean"]`. They merge, and are a file."""

    wanted: Wanted
    keys: tuple[Key, ...]
    about: dict[str, Any] = field(default_factory=dict)
    """of which run: model, architecture, settings, versions"""
    samples: NumberSet = field(default_factory=NumberSet)
    """numbers of the samples that are in them"""
    complete: bool = False
    """whether every sample of the run is"""
    groups: dict[str, list[Any]] = field(default_factory=dict)
    """by grouping, the value of each group"""
    tensors: dict[Key, TensorSums] = field(default_factory=dict)

    @property
    def groupings(self) -> tuple[str, ...]:
        return self.wanted.by or (ALL,)

    def __getitem__(self, where: Any) -> Summary:
        """Of one point and layer, as of a capture: ["resid_post", 8], ["resid_post", 8, 2] for call 2, ["logits"].

        Raises SelectionError.
        """
        point, layer, call = place_of(where)
        key = next((k for k in self.keys if k == (point, layer) or k == (point, layer, call)), None)
        if key is None:
            raise SelectionError(f"no statistics of {where!r}: they are of {', '.join(map(tensor_name, self.keys))}.")
        if key not in self.tensors:
            raise SelectionError(f"{tensor_name(key)} has no rows: no sample had any.")
        held = self.tensors[key]
        tables = {by: self._table(by, held) for by in self.groupings}
        # Every grouping holds every row: the smallest is the least work.
        least = min(self.groupings, key=lambda by: len(self.groups[by]))
        whole = {slot: each.collapsed() for slot, each in held.sums[least].items()}
        one = Table(ALL, (None,), whole, torch.tensor([0]), self.wanted, held.row)
        return Summary(one, tables, held.not_finite, held.first_not_finite)

    def _table(self, by: str, held: TensorSums) -> Table:
        counts = held.sums[by][VALUE, Moments.kind].state()["count"].cpu()
        slots = [slot for slot, count in enumerate(counts.tolist()) if count]
        values = self.groups[by]
        if by not in (ALL, "sink"):
            slots.sort(key=lambda slot: _order(values[slot]))
        names = tuple(values[slot] for slot in slots)
        return Table(by, names, held.sums[by], torch.tensor(slots, dtype=torch.long), self.wanted, held.row)

    def absorb(self, other: "Statistics") -> None:
        """Take another part of the run. Raises SelectionError where it is of another kind, or of a sample twice."""
        mine, theirs = (each.wanted.as_json() for each in (self, other))
        if self.keys != other.keys or mine != theirs:
            raise SelectionError(
                f"statistics of {_said(self)} do not merge with those of {_said(other)}: make both with the same "
                "points, layers, reductions and groups."
            )
        if twice := [number for number in other.samples if number in self.samples]:
            raise SelectionError(f"samples {twice[:5]} are in both statistics: they would count twice.")
        slots = {
            by: torch.tensor([self.slot(by, value) for value in other.groups.get(by, [])]) for by in self.groupings
        }
        for key, held in other.tensors.items():
            own = self.tensors.setdefault(key, TensorSums(held.row, {by: {} for by in self.groupings}))
            if own.row != held.row:
                raise SelectionError(f"{tensor_name(key)}: rows of {list(own.row)} do not merge with {list(held.row)}.")
            for by, sums in held.sums.items():
                for slot, each in sums.items():
                    there = slots[by][: each.groups]
                    absorb(own.sums[by], {slot: each.take(range(len(there)))}, there)
            own.not_finite += held.not_finite
            own.first_not_finite = own.first_not_finite or held.first_not_finite
        self.samples.update(other.samples)

    def identity(self) -> dict[str, Any]:
        """What a run has to have in common with these to go on with them."""
        directions = {layer: value.tolist() for layer, value in self.wanted.directions.items()}
        settings = {"settings": self.about.get("settings", {})}
        named = {name: self.about.get(name) for name in ("model", "architecture")}
        tensors = [tensor_name(key) for key in self.keys]
        return {"tensors": tensors, **self.wanted.as_json(), "directions": directions, **named, **settings}

    def slot(self, by: str, value: Any) -> int:
        """The number of a group; a new one where its value is new."""
        places = self._places.setdefault(by, {})
        found = places.get((type(value), value))
        if found is None:
            found = places[type(value), value] = len(self.groups.setdefault(by, []))
            self.groups[by].append(value)
        return found

    def __post_init__(self) -> None:
        self._places: dict[str, dict[Any, int]] = {
            by: {(type(value), value): slot for slot, value in enumerate(values)} for by, values in self.groups.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Everything but covariances, as plain JSON; what is not a number is null."""
        return {
            **{name: self.about.get(name) for name in ("model", "architecture")},
            **self.wanted.as_json(),
            "samples": len(self.samples),
            "complete": self.complete,
            "tensors": [self._tensor_json(key) for key in self.keys if key in self.tensors],
        }

    def _tensor_json(self, key: Key) -> dict[str, Any]:
        found = self[key]
        named = {"tensor": tensor_name(key), "point": key[0], "layer": key[1]}
        if len(key) == 3:
            named["call"] = key[2]
        groups = {
            by: [{"group": group, **_json_of(table, n)} for n, group in enumerate(table.groups)]
            for by, table in found._tables.items()
            if by != ALL
        }
        return {**named, "not_finite": found.not_finite, **_json_of(found._table, 0), "by": groups}

    def __repr__(self) -> str:
        left = "" if self.complete else ", not complete"
        return f"<Statistics of {_said(self)}, {counted(len(self.samples), 'sample')}{left}>"


def _said(statistics: Statistics) -> str:
    return f"{', '.join(statistics.wanted.reductions)} of {counted(len(statistics.keys), 'tensor')}" + (
        f" by {', '.join(statistics.wanted.by)}" if statistics.wanted.by else ""
    )


def _order(value: Any) -> tuple[str, Any]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return ("", value) if number else (type(value).__name__, str(value))


def _json_of(table: Table, group: int) -> dict[str, Any]:
    values = {name: _plain(table[name][group].tolist()) for name in table.names if name not in ("count", "covariance")}
    return {"count": int(table.count[group]), **values}


def _plain(value: Any) -> Any:
    """With null for what is not a number."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
