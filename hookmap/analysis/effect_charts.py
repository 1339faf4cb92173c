"""Estimated effects of patches as charts: nodes by layer and head, and the largest edges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hookmap.analysis.charts import finished, load_altair

if TYPE_CHECKING:
    from hookmap.analysis.attribution_patching import AttributionPatch
    from hookmap.analysis.edge_attribution import EdgeScores


def node_map(found: AttributionPatch, *, title: str = "") -> Any:
    """An Altair chart: a cell for each layer upwards, and for each head, or point without heads, to the right.

    Effects are summed over positions, the mean over the pairs; red and blue around zero. Raises CaptureError where
    Altair is not installed.
    """
    alt = load_altair()
    rows: list[dict[str, Any]] = []
    for key, parts in found.scores.items():
        sums = torch.stack([each.sum(0) for each in parts]).mean(0)
        values = [float(sums)] if sums.ndim == 0 else sums.tolist()
        name = key[0] if len(key) == 2 else f"{key[0]} call {key[2]}"
        rows += [
            {"layer": -1 if key[1] is None else key[1], "column": name if sums.ndim == 0 else f"{name} {n}",
             "value": float(f"{value:.5g}")}
            for n, value in enumerate(values)
        ]  # fmt: skip
    most = max(abs(row["value"]) for row in rows) or 1.0
    columns = list(dict.fromkeys(row["column"] for row in rows))
    layers = len({row["layer"] for row in rows})
    what = f"estimated effect on the {found.metric}"
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_rect(stroke="white", strokeWidth=0.5)
        .encode(
            x=alt.X("column:O", sort=columns, title=None, axis=alt.Axis(labelAngle=-60, labelOverlap=False)),
            y=alt.Y("layer:O", sort="descending", title="layer"),
            color=alt.Color("value:Q", title=None, scale=alt.Scale(scheme="redblue", domain=[-most, most])),
            tooltip=["layer:O", "column:N", alt.Tooltip("value:Q", title=what, format=".4~g")],
        )
    )
    return finished(chart, title or what, 18 * len(columns), 14 * layers)


def edge_bars(found: EdgeScores, top: int = 30, *, title: str = "") -> Any:
    """An Altair chart of the edges of the largest effects. Raises CaptureError where Altair is not installed."""
    alt = load_altair()
    rows = [{"edge": f"{one} → {other}", "value": float(f"{value:.5g}")} for one, other, value in found.top(top)]
    what = f"estimated effect on the {found.metric}"
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("value:Q", title=what),
            y=alt.Y("edge:N", sort=None, title=None, axis=alt.Axis(labelLimit=320)),
            tooltip=["edge:N", alt.Tooltip("value:Q", format=".4~g")],
        )
    )
    return finished(chart, title or f"the {len(rows)} largest edges", 420, 14 * len(rows))
