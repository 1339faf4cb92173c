"""A grid as a table in the terminal: layers upwards, positions to the right, colours by value."""

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from hookmap.analysis.charts import printable
from hookmap.analysis.grid import Grid

_WIDE = 6
_LIGHT, _DARK = (247, 251, 255), (8, 81, 156)


def grid_table(
    grid: Grid,
    words: Sequence[Sequence[str]] | None = None,
    columns: int | None = None,
    told: Sequence[Sequence[bool]] | None = None,
) -> Table:
    """words: texts in the cells, in place of numbers. columns: only this many, the last ones, are shown.

    told: [layers, positions]; numbers are in brackets where it is False.
    """
    first = max(0, len(grid.positions) - columns) if columns else 0
    known = grid.values[grid.values.isfinite()]
    low, high = (float(known.min()), float(known.max())) if known.numel() else (0.0, 1.0)
    table = Table(box=None, pad_edge=False, padding=0, header_style="bold", title=grid.metric, title_justify="left")
    table.add_column("layer ", justify="right")
    for position, token in list(zip(grid.positions, grid.tokens, strict=True))[first:]:
        name = f" {position} \n {printable(token, _WIDE)} " if grid.column == "position" else f" {token} "
        table.add_column(Text(name), justify="center", no_wrap=True)
    for row in range(len(grid.layers) - 1, -1, -1):
        cells = [Text(f"{grid.rows[row]} ")]
        for column in range(first, len(grid.positions)):
            value = float(grid.values[row, column])
            number = f"{value:.2g}" if told is None or told[row][column] else f"({value:.1g})"
            text = number if words is None else printable(words[row][column], _WIDE)
            cells.append(Text(f" {text} ", style=_style((value - low) / ((high - low) or 1.0))))
        table.add_row(*cells)
    return table


def _style(share: float) -> str:
    """Light where the value is small, dark where it is large; no style for nan."""
    if not math.isfinite(share):
        return ""
    mixed = (round(a + (b - a) * share) for a, b in zip(_LIGHT, _DARK, strict=True))
    return f"{'white' if share > 0.6 else 'black'} on rgb({','.join(map(str, mixed))})"
