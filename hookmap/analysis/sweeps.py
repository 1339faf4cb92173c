"""What a sweep found: the metric of each pair with each cell patched, their mean, and its bootstrap interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hookmap.activations import Key, call_of
from hookmap.analysis.grid import Grid
from hookmap.errors import SelectionError
from hookmap.wording import counted

RESAMPLES = 2000
_AT_ONCE = 2**24
"""numbers of a bootstrap that are held together"""


class Cell(NamedTuple):
    """One cell of a sweep."""

    name: str
    """`z 9.3`, `resid_pre 8 at -1`"""
    effect: float
    row: int
    """of the grid"""
    column: int


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep. Tensors are float32, on the CPU."""

    values: torch.Tensor
    """[pairs, rows, heads, positions]: the metric of each pair with one cell patched; nan where a layer has fewer heads

    The last two axes have the size 1 where all heads, or all positions, were patched together.
    """
    keys: tuple[Key, ...]
    """(point, layer) of each row, in forward order; (point, layer, call) of layers that run several times"""
    heads: tuple[int, ...] | None
    """the head of each column; None where heads were not swept"""
    positions: tuple[int, ...] | None
    """the position of each column, negative where pairs are as long as each other only from the end; or None"""
    tokens: tuple[str, ...]
    """the text of each position's token; `*` where it is another one in some pairs"""
    clean_of_pairs: torch.Tensor
    """[pairs]: the metric of the clean prompts"""
    corrupted_of_pairs: torch.Tensor
    """[pairs]: the metric of the corrupted prompts"""
    noise: float
    """how far the metric's mean may differ between equal runs: by the rounding of the logits, and by the batch size"""
    metric: str
    """what the values are, in words"""
    noising: bool = False
    """whether corrupted values were put into the clean run; else clean ones into the corrupted run"""
    path: str = ""
    """where a path was patched: what it leads to, in words"""
    pairs: tuple[str, ...] = ()
    """the name of each pair"""

    @property
    def clean(self) -> float:
        """The metric of the clean prompt, or the mean of several."""
        return float(self.clean_of_pairs.mean())

    @property
    def corrupted(self) -> float:
        """The same of the corrupted prompt."""
        return float(self.corrupted_of_pairs.mean())

    @property
    def grid(self) -> Grid:
        """The metric, a mean over pairs: a row for each layer, a column for each head or position (or each of both)."""
        return self._grid(self.values.mean(0), self.metric)

    @property
    def effect(self) -> Grid:
        """How far the patch moves the metric: 0 as in the run that is patched, 1 as in that which the patch is from.

        Of several pairs it is the ratio of two means: of what patches do, and of what lies between the prompts.
        """
        ends = ("clean", "corrupted") if self.noising else ("corrupted", "clean")
        return self._grid(self._effect(), f"effect on the {self.metric}: 0 {ends[0]}, 1 {ends[1]}")

    @property
    def effect_of_pairs(self) -> torch.Tensor:
        """The effect of each pair by itself, as `values`: large where the metric hardly differs between its prompts."""
        start, end = (each[:, None, None, None] for each in self._ends)
        return (self.values - start) / (end - start)

    @property
    def above_noise(self) -> torch.Tensor:
        """As the grid, bool: whether the patch moves the metric by more than the noise.

        Where it is False, the effect cannot be told from 0. It is False too where the metric is nan.
        """
        start = self._ends[0].mean()
        return (self.grid.values - start).abs() > self.noise

    def interval(self, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Grid, Grid]:
        """The ends of the effect's interval: the percentile bootstrap over pairs, each of which may be drawn again.

        Raises SelectionError for a single pair, or a level that is not between 0 and 1.
        """
        count = len(self.values)
        if count < 2 or not 0 < level < 1 or resamples < 1:
            raise SelectionError(
                f"an interval needs two pairs at least and a level between 0 and 1, got {counted(count, 'pair')} and "
                f"{level}."
            )
        draws = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
        weights = torch.zeros(resamples, count, dtype=torch.float64)
        weights.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64)).div_(count)
        start, end = ((weights @ each.double())[:, None] for each in self._ends)
        shares = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        flat = self.values.double().flatten(1)
        found = [
            (((weights @ part) - start) / (end - start)).quantile(shares, dim=0)
            for part in torch.split(flat, max(1, _AT_ONCE // resamples), 1)
        ]
        low, high = torch.cat(found, 1).float().reshape(2, *self.values.shape[1:])
        return tuple(  # type: ignore[return-value]  # two of them
            self._grid(each, f"{end} end of the {level:.0%} interval of the effect")
            for each, end in ((low, "lower"), (high, "upper"))
        )

    def top(self, count: int = 10) -> list[Cell]:
        """The cells with the largest effects, in descending order of their size."""
        effect = self.effect
        sizes = effect.values.abs().nan_to_num(-1.0).flatten()
        found = []
        for place in sizes.argsort(descending=True, stable=True)[:count].tolist():
            row, column = divmod(place, len(effect.positions))
            if sizes[place] >= 0:
                found.append(Cell(self._name(row, column), float(effect.values[row, column]), row, column))
        return found

    def _name(self, row: int, column: int) -> str:
        effect, key = self.grid, self.keys[row]
        call = "" if call_of(key) is None else f" call {call_of(key)}"
        name = f"{key[0]}" if key[1] is None else f"{key[0]} {key[1]}"
        label = effect.tokens[column] if effect.column != "position" else str(effect.positions[column])
        behind = {"head": f".{label}", "position": f" at {label}", "head@position": f".{label}"}
        return name + call + behind.get(effect.column, "")

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data, with each pair's own values; `null` where a layer has fewer heads."""
        names = ("keys", "heads", "positions", "tokens", "metric", "noising", "path", "clean", "corrupted", "noise")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        found["effect"] = _plain(self._effect())
        if len(self.values) > 1:
            ends = self.interval()
            found["interval"] = {"level": 0.95, "low": _plain(ends[0].values), "high": _plain(ends[1].values)}
        each = zip(self.clean_of_pairs.tolist(), self.corrupted_of_pairs.tolist(), self.values, strict=True)
        found["pairs"] = [
            {"id": self.pairs[n] if self.pairs else str(n), "clean": one, "corrupted": other, "values": _plain(own)}
            for n, (one, other, own) in enumerate(each)
        ]
        return found | {"above_noise": self.above_noise.tolist()}

    def save(self, path: str | Path) -> Path:
        """Writes the effect as PATH.safetensors and PATH.csv (see `Grid.save`), and everything as PATH.json."""
        written = self.effect.save(path)
        text = json.dumps(self.as_json(), ensure_ascii=False)
        written.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        return written

    def __repr__(self) -> str:
        found = f"clean {self.clean:.4g}, corrupted {self.corrupted:.4g}, noise {self.noise:.1g}"
        of = f" of {counted(len(self.values), 'pair')}" if len(self.values) > 1 else ""
        path = f" {self.path}" if self.path else ""
        return f"<Sweep{of}: {repr(self.grid)[1:-1]}{path}; {found}>"

    @cached_property
    def _ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The metric of the run that is patched, and of that which the patch is from; each [pairs]."""
        found = (self.corrupted_of_pairs, self.clean_of_pairs)
        return found[::-1] if self.noising else found

    def _effect(self) -> torch.Tensor:
        start, end = (each.mean() for each in self._ends)
        return (self.values.mean(0) - start) / (end - start)

    def _grid(self, values: torch.Tensor, metric: str) -> Grid:
        """values: [rows, heads, positions]."""
        points = tuple(key[0] for key in self.keys)
        calls = tuple(call_of(key) for key in self.keys)
        several = len(set(points)) > 1
        grid = Grid(
            values.flatten(1),
            tuple(-1 if key[1] is None else key[1] for key in self.keys),
            *self._columns(),
            metric,
            ", ".join(dict.fromkeys(points)),
            calls if any(call is not None for call in calls) else (),
        )
        return replace(grid, column=self._column, points=points if several else ())

    @property
    def _column(self) -> str:
        if self.heads is None:
            return "all tokens" if self.positions is None else "position"
        return "head" if self.positions is None else "head@position"

    def _columns(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The number and the text of each column of the grid."""
        if self.heads is None:
            return ((0,), ("all",)) if self.positions is None else (self.positions, self.tokens)
        if self.positions is None:
            return self.heads, tuple(map(str, self.heads))
        names = tuple(f"{head}@{position}" for head in self.heads for position in self.positions)
        return tuple(range(len(names))), names


def _plain(values: torch.Tensor) -> Any:
    """Nested lists; None where a number is nan."""

    def of(found: Any) -> Any:
        return [of(each) for each in found] if isinstance(found, list) else found if found == found else None

    return of(values.tolist())


def names_of(ids: Sequence[str | None]) -> tuple[str, ...]:
    """The name of each pair: its own, or its number."""
    return tuple(str(number) if name is None else name for number, name in enumerate(ids))
