"""One number for each layer and position, as lenses and patching sweeps give them, for tables and heat maps.

Imports no torch until asked to save or load.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hookmap.errors import CaptureError, StoreError
from hookmap.wording import counted

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Grid:
    """`values`: float32 [layers, positions], on the CPU."""

    values: "torch.Tensor"
    layers: tuple[int, ...]
    """the layer of each row"""
    positions: tuple[int, ...]
    """the token index of each column, 0 the sample's first"""
    tokens: tuple[str, ...]
    """the text of each column's token"""
    metric: str
    """what the values are, in words"""
    point: str
    calls: tuple[int | None, ...] = ()
    """which run of its layer each row is of, None where it runs once; empty where all do"""
    column: str = "position"
    """what the columns are, or `head`: then `positions` are heads, and `tokens` their names"""
    points: tuple[str, ...] = ()
    """the point of each row; empty where it is the same"""

    @property
    def rows(self) -> tuple[str, ...]:
        """What each row is called: `8`, `8 call 2`, or of several points `mlp_out 8`."""
        calls = self.calls or (None,) * len(self.layers)
        names = (
            str(layer) if call is None else f"{layer} call {call}"
            for layer, call in zip(self.layers, calls, strict=True)
        )
        return tuple(f"{p} {name}" for p, name in zip(self.points, names, strict=True)) if self.points else (*names,)

    @property
    def numbered(self) -> bool:
        """Whether the layers alone tell the rows apart."""
        return not self.calls and not self.points

    def __post_init__(self) -> None:
        """Raises CaptureError where the labels do not fit the values' shape."""
        labels = (len(self.layers), len(self.positions))
        if tuple(self.values.shape) != labels or len(self.tokens) != len(self.positions):
            raise CaptureError(
                f"a grid's values are [layers, positions]: got {list(self.values.shape)} for {labels[0]} layers, "
                f"{labels[1]} positions and {len(self.tokens)} tokens."
            )

    def __repr__(self) -> str:
        sizes = f"{counted(len(self.layers), 'row')} × {counted(len(self.positions), self.column)}"
        return f"<Grid of {self.metric}: {self.point}, {sizes}>"

    def save(self, path: str | Path) -> Path:
        """Write PATH.safetensors (values, labels) and PATH.csv (layer, position, token, value); returns the first.

        The table has a column `call` where layers run several times, `point` where rows are of several, and `head` in
        the place of position and token.
        """
        from safetensors.torch import save_file

        base = Path(path).with_suffix("")
        labels = {name: getattr(self, name) for name in ("layers", "positions", "tokens", "metric", "point")}
        labels |= {name: getattr(self, name) for name in ("calls", "points") if getattr(self, name)}
        labels |= {} if self.column == "position" else {"column": self.column}
        base.parent.mkdir(parents=True, exist_ok=True)
        values = base.with_suffix(".safetensors")
        save_file({"values": self.values.contiguous()}, values, metadata={"hookmap.grid": json.dumps(labels)})
        of_rows = {"point": self.points, "layer": self.layers, "call": self.calls}
        of_rows = {name: each for name, each in of_rows.items() if each}
        of_columns = {"position": self.positions, "token": self.tokens}
        of_columns = of_columns if self.column == "position" else {self.column: self.tokens}
        with base.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([*of_rows, *of_columns, "value"])
            for number, row in enumerate(self.values.tolist()):
                where = [each[number] for each in of_rows.values()]
                for column, value in enumerate(row):
                    table.writerow([*where, *(each[column] for each in of_columns.values()), value])
        return values


def load_grid(path: str | Path) -> Grid:
    """Read a file of `Grid.save`. Raises StoreError where it is another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path).with_suffix(".safetensors"), framework="pt") as file:
            labels = json.loads((file.metadata() or {})["hookmap.grid"])
            values = file.get_tensor("values")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StoreError(f"{path}: no grid that hookmap wrote ({type(error).__name__}: {error}).") from error
    lists = {name: tuple(labels[name]) for name in ("layers", "positions", "tokens")}
    more = {name: tuple(labels.get(name, ())) for name in ("calls", "points")}
    return Grid(
        values, metric=labels["metric"], point=labels["point"], **lists, **more, column=labels.get("column", "position")
    )
