"""The report's numbers as charts."""

from collections.abc import Iterator, Sequence
from typing import Any

from hookmap.analysis.charts import bands, finished, load_altair
from hookmap.evaluation.experiments.report import SIGNIFICANT, Comparison, OfTensor, Report
from hookmap.wording import in_call


def charts(report: Report) -> dict[str, Any]:
    """Altair charts by file name without suffix. Raises CaptureError if Altair is not installed."""
    found = {"differences": differences(report.comparisons, report.neutral, report.questions, report.cut)}
    for pool, point in dict.fromkeys((t.pool, t.point) for t in report.tensors):
        tensors = [t for t in report.tensors if (t.pool, t.point) == (pool, point)]
        where = f"{point}, {pool}"
        found[f"auroc-{pool}-{point}"] = bands(
            list(_probe_rows(report, pool, point)), {}, title=f"told from {report.neutral} by a probe: {where}"
        )
        found[f"moved-{pool}-{point}"] = _by_layer(tensors, f"mean moved, over {report.neutral}'s norm: {where}")
        if len(report.prefixes) > 2:
            found[f"cosines-{pool}-{point}"] = _cosines(tensors, f"cosine of two prefixes' mean differences: {where}")
    return found


def differences(comparisons: Sequence[Comparison], neutral: str, questions: int, cut: str = "") -> Any:
    """One panel a reward, with a dot and an interval for each prefix. cut: a note about truncated answers."""
    alt = load_altair()
    rewards = list(dict.fromkeys(one.reward for one in comparisons))
    panels = []
    for reward in rewards:
        rows = [
            {**one.model_dump(), "holds": f"p (Holm) {'<' if one.p_holm < SIGNIFICANT else '≥'} {SIGNIFICANT}"}
            for one in comparisons
            if one.reward == reward
        ]
        base = alt.Chart(alt.Data(values=rows)).encode(
            y=alt.Y("prefix:N", sort=None, title=None),
            color=alt.Color("holds:N", title=None, scale=alt.Scale(scheme="category10")),
        )
        drawn = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color="#999").encode(x="zero:Q")
        drawn += base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=f"{reward} − {neutral}'s"), x2="high:Q")
        drawn += base.mark_circle(size=60, opacity=1).encode(
            x="difference:Q", tooltip=["prefix:N", "difference:Q", "low:Q", "high:Q", "p:Q", "p_holm:Q"]
        )
        panels.append(drawn.properties(width=240, height=22 * len(rows), title=reward))
    whole = alt.hconcat(*panels) if len(panels) < 3 else alt.concat(*panels, columns=2)
    title: Any = f"rewards, paired by question, 95 % intervals, n = {questions}"
    title = alt.Title(title, subtitle=cut) if cut else title
    return whole.properties(title=title, background="white").configure_axis(
        labelFontSize=11, titleFontSize=12, grid=False
    )


def _probe_rows(report: Report, pool: str, point: str) -> Iterator[dict[str, Any]]:
    for one in report.separations:
        for place in one.layers if one.pool == pool else ():
            if place.point == point and place.auroc is not None:
                yield {**place.model_dump(), "point": one.prefix + in_call(place.call)}


def _by_layer(tensors: Sequence[OfTensor], title: str) -> Any:
    alt = load_altair()
    rows = [
        {"prefix": name + in_call(t.call), "layer": t.layer, "moved": value}
        for t in tensors
        for name, value in t.moved.items()
    ]
    drawn = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y("moved:Q", title="‖difference of means‖ / norm"),
            color=alt.Color("prefix:N", title=None, sort=None),
            tooltip=["prefix:N", "layer:Q", alt.Tooltip("moved:Q", format=".3f")],
        )
    )
    return finished(drawn, title, 420, 260)


def _cosines(tensors: Sequence[OfTensor], title: str) -> Any:
    """A heat map: layers from left to right, pairs of prefixes from top to bottom."""
    alt = load_altair()
    rows = [
        {"layer": t.layer, "pair": f"{c.one} · {c.other}{in_call(t.call)}", "cosine": c.cosine}
        for t in tensors
        for c in t.cosines
        if c.cosine is not None
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("pair:N", sort=None, title=None, axis=alt.Axis(labelLimit=260)),
    )
    drawn = base.mark_rect(stroke="white").encode(
        color=alt.Color("cosine:Q", title=None, scale=alt.Scale(scheme="redblue", domain=[-1, 1])),
    )
    drawn += base.mark_text(fontSize=10).encode(
        text=alt.Text("cosine:Q", format=".2f"),
        color=alt.condition("abs(datum.cosine) > 0.65", alt.value("white"), alt.value("#222")),
    )
    pairs, layers = len({row["pair"] for row in rows}), len({row["layer"] for row in rows})
    return finished(drawn, title, 36 * max(1, layers), 18 * max(1, pairs))
