"""Grids, attributions and attention as charts: PNG, SVG, or one self-contained HTML file.

The charts are Altair's; they are drawn offline. Both packages come with `pip install "hookmap[viz]"`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookmap.analysis.grid import Grid
from hookmap.errors import CaptureError, SelectionError, StoreError
from hookmap.extras import needed
from hookmap.stores.durable_files import writing

if TYPE_CHECKING:
    import torch

    from hookmap.analysis.attribution import Attribution
    from hookmap.analysis.expert_outliers import LayerExperts
    from hookmap.analysis.heads import HeadScores
    from hookmap.analysis.outliers import OutlierFeatures

FORMATS = (".png", ".svg", ".html")
MISSING = 'pictures need Altair and vl-convert: pip install "hookmap[viz]"'
_LABEL, _CELL = 12, 6
"""the most characters of a token that are shown at an axis, and in a cell"""
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "→", "\r": "←", "": "∅"}


def heat_map(
    grid: Grid, words: Sequence[Sequence[str]] | None = None, *, title: str | None = None, log: bool = False
) -> Any:
    """An Altair chart of a grid, with layers upwards and positions to the right.

    words: texts in the cells, [layers, positions]. log: a logarithmic colour scale, dark where the value is small.
    Values of both signs are red and blue around zero. Raises CaptureError where Altair is not installed.
    """
    alt = load_altair()
    values, cell = grid.values.tolist(), _cell(words)
    rows = [
        {
            "layer": name,
            "column": column,
            "position": position,
            "token": printable(token),
            "value": _short(values[row][column]),
            "word": "" if words is None else printable(words[row][column]),
            "cell": "" if words is None else printable(words[row][column], cell),
        }
        for row, name in enumerate(grid.layers if grid.numbered else grid.rows)
        for column, (position, token) in enumerate(zip(grid.positions, grid.tokens, strict=True))
    ]
    colour, dark = _colours(grid, log)
    width = 18 if words is None else 7 * cell + 8
    named = {"position": "position", "token": "token"} if grid.column == "position" else {"token": grid.column}
    named = {"layer": "layer", **named, **({"word": "word"} if words else {})}
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("column:O", title=grid.column, axis=_token_axis(grid.tokens)),
        y=alt.Y("layer:O", sort="descending" if grid.numbered else [*grid.rows[::-1]], title=f"{grid.point}, layer"),
        tooltip=[alt.Tooltip(f"{field}:N", title=title) for field, title in named.items()]
        + [alt.Tooltip("value:Q", title=grid.metric, format=".4~g")],
    )
    drawn = base.mark_rect(stroke="white", strokeWidth=0.5).encode(
        color=alt.Color("value:Q", title=None, scale=alt.Scale(**colour), legend=alt.Legend(format="~g"))
    )
    if words is not None:
        drawn += base.mark_text(fontSize=11).encode(
            text="cell:N", color=alt.condition(dark, alt.value("white"), alt.value("#222"))
        )
    return finished(drawn, title or f"{grid.metric}: {grid.point}", width * len(grid.positions), 18 * len(grid.layers))


def bars(attribution: Attribution, column: int = -1) -> Any:
    """An Altair chart of what each part adds to the logit at one position, the last unless given."""
    alt = load_altair()
    values = attribution.values[:, column].tolist()
    rows = [
        {"part": part, "branch": part.partition("[")[0], "value": _short(value)}
        for part, value in zip(attribution.parts, values, strict=True)
    ]
    cap = ", before the soft-cap" if attribution.before_soft_cap else ""
    what = added_to(attribution, column)
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("value:Q", title=f"added to {what}{cap}"),
            y=alt.Y("part:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
            color=alt.Color("branch:N", title=None, sort=None),
            tooltip=[alt.Tooltip("part:N"), alt.Tooltip("value:Q", format=".4~g")],
        )
    )
    title = f"{what} = {float(attribution.logit[column]):.3f}, the sum of its parts"
    return finished(chart, title, 420, 14 * len(rows))


def added_to(attribution: Attribution, column: int = -1) -> str:
    """What the parts of one position add to, in words: a logit, a difference of two, or a direction."""
    if attribution.direction:
        return attribution.direction
    against = "" if attribution.against is None else f" − logit {printable(attribution.against)}"
    return f"logit {printable(attribution.target[column])}{against}"


def attention(
    pattern: torch.Tensor, tokens: Sequence[str], *, heads: Sequence[int] | None = None, title: str = "attention"
) -> Any:
    """An Altair chart of attention weights [heads, query, key]: one small heat map for each head.

    heads: the heads to draw; for a slice such as `pattern[4:6]`, the number of each head in it. They are drawn in
    ascending order. Raises CaptureError for heads that are not there.
    """
    alt = load_altair()
    if pattern.ndim != 3 or pattern.shape[1:] != (len(tokens), len(tokens)):
        raise CaptureError(
            f"attention is [heads, query, key] of the tokens given: got {list(pattern.shape)} and {len(tokens)} tokens."
        )
    drawn = _heads(len(pattern), heads)
    causal = not bool(pattern.triu(1).any())
    rows = [
        {
            "head": f"head {name}",
            "q": q,
            "k": k,
            "query": printable(tokens[q]),
            "key": printable(tokens[k]),
            "value": _short(v),
        }
        for name, h in drawn
        for q, keys in enumerate(pattern[h].float().tolist())
        for k, v in enumerate(keys[: q + 1] if causal else keys)
    ]
    side = max(120, 12 * len(tokens))
    names = [f"head {name}" for name, _ in drawn]  # sorted as texts they would be 0, 1, 10, 11, 2
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_rect()
        .encode(
            x=alt.X("k:O", title="key", axis=_token_axis(tokens)),
            y=alt.Y("q:O", title="query", axis=_token_axis(tokens, level=True)),
            color=alt.Color("value:Q", title=None, scale=alt.Scale(scheme="blues", domain=[0, 1])),
            tooltip=["head:N", "query:N", "key:N", alt.Tooltip("value:Q", format=".4~g")],
        )
        .properties(width=side, height=side)
        .facet(facet=alt.Facet("head:N", title=None, sort=names), columns=2 if len(names) <= 4 else 4)
    )
    return chart.properties(title=title, background="white")


def head_scores(scores: HeadScores, kinds: Sequence[str] | None = None, *, title: str = "") -> Any:
    """An Altair chart of scores of heads: for each kind, all unless given, a heat map of layers upwards and heads.

    Raises SelectionError for a kind that is not there, CaptureError where Altair is not installed.
    """
    alt = load_altair()
    named = list(scores.scores) if kinds is None else list(kinds)
    rows = [
        {"kind": kind.replace("_", " "), "layer": name, "head": head, "value": _short(value)}
        for kind in named
        for name, row in zip(scores.rows, scores[kind].tolist(), strict=True)
        for head, value in enumerate(row)
        if math.isfinite(value)
    ]
    heads = scores[named[0]].shape[1]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_rect(stroke="white", strokeWidth=0.5)
        .encode(
            x=alt.X("head:O", title="head", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("layer:N", title="layer", sort=[*scores.rows[::-1]], axis=alt.Axis(labelOverlap=True)),
            color=alt.Color("value:Q", title=None, scale=alt.Scale(scheme="blues", domain=[0, 1])),
            tooltip=["kind:N", "layer:N", "head:O", alt.Tooltip("value:Q", format=".3f")],
        )
        .properties(width=max(100, 14 * heads), height=12 * len(scores.rows))
        .facet(facet=alt.Facet("kind:N", title=None, sort=[k.replace("_", " ") for k in named]), columns=4)
    )
    return chart.properties(title=title or "where heads look, as a share of their attention", background="white")


def outlier_features(found: OutlierFeatures, top: int = 20, *, title: str = "") -> Any:
    """An Altair chart of the largest magnitude of the `top` largest features of each point, by layer, on a log scale.

    Raises SelectionError where there are no such features, CaptureError where Altair is not installed.
    """
    alt, charts = load_altair(), []
    for point in found.points:
        features = [each.feature for each in found.of(point)[:top]]
        if not features:
            continue
        keys, sizes = found.magnitudes(point, features)
        names = ["" if key[1] is None else str(key[1]) + "".join(f" call {c}" for c in key[2:]) for key in keys]
        rows = [
            {"layer": name, "feature": str(feature), "value": _short(max(value, 1e-3))}
            for name, row in zip(names, sizes.tolist(), strict=True)
            for feature, value in zip(features, row, strict=True)
        ]
        drawn = alt.Chart(alt.Data(values=rows)).mark_rect(stroke="white", strokeWidth=0.5)
        drawn = drawn.encode(
            x=alt.X("feature:N", title=f"feature of {point}", sort=[str(each) for each in features]),
            y=alt.Y("layer:N", title="layer", sort=names[::-1], axis=alt.Axis(labelOverlap=True)),
            color=alt.Color("value:Q", title="largest |x|", scale=alt.Scale(scheme="blues", type="log", clamp=True)),
            tooltip=["layer:N", "feature:N", alt.Tooltip("value:Q", format=".4~g")],
        )
        charts.append(drawn.properties(width=max(120, 26 * len(features)), height=12 * len(names)))
    if not charts:
        raise SelectionError("no outlier features and no massive activations: there is nothing to draw.")
    return alt.hconcat(*charts).properties(title=title or "the largest magnitudes, by layer", background="white")


def expert_outliers(found: Mapping[int, LayerExperts], *, title: str = "") -> Any:
    """An Altair chart of the largest magnitude that each expert of each layer writes to the stream, on a log scale.

    Raises CaptureError where Altair is not installed.
    """
    alt = load_altair()
    rows = [
        {"layer": str(layer), "expert": each["expert"], "value": _short(max(each["largest"], 1e-3)),
         "feature": each["feature"], "share": _short(each["share"])}
        for layer, own in found.items()
        for each in own.as_json()
        if own.chosen[each["expert"]]
    ]  # fmt: skip
    names, count = [str(layer) for layer in found], max(len(own.chosen) for own in found.values())
    drawn = alt.Chart(alt.Data(values=rows)).mark_rect(stroke="white", strokeWidth=0.5)
    drawn = drawn.encode(
        x=alt.X("expert:O", title="expert", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("layer:N", title="layer", sort=names[::-1], axis=alt.Axis(labelOverlap=True)),
        color=alt.Color("value:Q", title="largest |x|", scale=alt.Scale(scheme="blues", type="log", clamp=True)),
        tooltip=["layer:N", "expert:O", alt.Tooltip("value:Q", format=".4~g"), "feature:N",
                 alt.Tooltip("share:Q", format=".1%", title="tokens")],
    )  # fmt: skip
    drawn = drawn.properties(width=max(160, 14 * count), height=max(60, 14 * len(names)))
    return drawn.properties(title=title or "what each expert writes to the stream, at the most", background="white")


def _heads(count: int, heads: Sequence[int] | None) -> list[tuple[int, int]]:
    """(number, index in the pattern) of each head that is drawn, by number. Raises CaptureError."""
    if heads is None:
        return [(n, n) for n in range(count)]
    named = list(heads)
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 0 for n in named)
    if not named or not whole or len(set(named)) != len(named):
        raise CaptureError(f"heads {named}: expected different whole numbers from 0 on, such as [4, 5].")
    if len(named) == count and (set(named) != set(range(count)) or named == sorted(named)):
        return sorted(zip(named, range(count), strict=True))
    if len(named) == count:
        raise CaptureError(f"heads {named} of a pattern of all {count}: give them in ascending order.")
    if len(named) > count or max(named) >= count:
        raise CaptureError(
            f"heads {named} of a pattern of {count} heads: expected some of 0 to {count - 1}, or, where it is a slice, "
            "the number of each of its heads."
        )
    return [(n, n) for n in sorted(named)]


def bands(
    rows: Sequence[Mapping[str, Any]], lines: Mapping[str, float], *, value: str = "auroc", title: str = ""
) -> Any:
    """An Altair chart of a number by layer: a line for each point, with its interval as a band.

    rows: dicts with `point`, `layer`, `low`, `high`, and the number under the key `value`. lines: name -> a number to
    compare with, drawn as a dashed line.
    """
    alt = load_altair()
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, format="d"))
    )
    scale = alt.Scale(domain=[min([0.4, *(row["low"] for row in rows), *lines.values()]), 1.0], nice=False)
    y = alt.Y(f"{value}:Q", title=value.upper(), scale=scale)
    colour = alt.Color("point:N", title=None, sort=None)
    drawn = base.mark_area(opacity=0.2).encode(
        y=alt.Y("low:Q", scale=scale, title=value.upper()), y2="high:Q", color=colour
    )
    drawn += base.mark_line(point=True).encode(
        y=y, color=colour, tooltip=["point:N", "layer:Q", alt.Tooltip(f"{value}:Q", format=".3f")]
    )
    if lines:
        others = alt.Chart(alt.Data(values=[{"name": name, value: number} for name, number in lines.items()]))
        drawn += others.mark_rule(strokeDash=[4, 3]).encode(
            y=y, stroke=alt.Stroke("name:N", title="without the model", scale=alt.Scale(scheme="dark2"), sort=None)
        )
    return finished(drawn, title, 420, 260)


def check_picture(path: str | Path) -> Path:
    """The path of a picture. Raises StoreError for another ending, and where it or what it lies in is no such thing."""
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise StoreError(f"{target}: a picture ends in {', '.join(FORMATS)}, got {target.suffix or 'no ending'!r}.")
    if target.is_dir():
        raise StoreError(f"{target} is a folder: expected a file. Name a file in it, such as {target / 'chart.png'}.")
    if target.parent.exists() and not target.parent.is_dir():
        raise StoreError(f"{target.parent} is a file: expected a folder. Name another one.")
    return target


def save_picture(chart: Any, path: str | Path) -> Path:
    """Write a chart to a .png, .svg or .html file. Raises StoreError for another ending, or where writing fails."""
    target = check_picture(path)
    load_altair()
    import vl_convert

    specification = chart.to_dict()
    with writing(target):
        if target.suffix.lower() == ".png":
            target.write_bytes(vl_convert.vegalite_to_png(specification, scale=2))
        elif target.suffix.lower() == ".svg":
            target.write_text(vl_convert.vegalite_to_svg(specification), encoding="utf-8")
        else:
            target.write_text(chart.to_html(inline=True, json_kwds={"cls": _InAScript}), encoding="utf-8")
    return target


def printable(token: str, limit: int | None = None) -> str:
    """A token with visible characters: signs for spaces and line ends, codes for unprintable characters."""
    shown = "".join(_VISIBLE.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in token) or _VISIBLE[""]
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


class _InAScript(json.JSONEncoder):
    """JSON for a script element of the page, which no token's text may end."""

    def encode(self, o: Any) -> str:
        return super().encode(o).replace("<", "\\u003c")


def load_altair() -> Any:
    """Altair. Raises CaptureError where it, or vl-convert, is not installed."""
    altair, _ = (needed(package, MISSING) for package in ("altair", "vl_convert"))
    return altair


def _token_axis(tokens: Sequence[str], *, level: bool = False) -> Any:
    """An axis whose columns are labelled with tokens; columns with the same token stay apart. level: not aslant."""
    labels = json.dumps([printable(token, _LABEL) for token in tokens])
    angle = 0 if level or all(len(printable(token)) <= 2 for token in tokens) else -60
    return load_altair().Axis(labelExpr=f"{labels}[datum.value]", labelAngle=angle, labelOverlap=False)


def _short(value: float) -> float | None:
    """The value to five digits, which suffice in a picture; None for nan and infinities."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _cell(words: Sequence[Sequence[str]] | None) -> int:
    """The width of a cell in characters, in which nearly all words fit."""
    lengths = sorted(len(printable(word)) for row in words or () for word in row)
    return max(3, min(_CELL, lengths[int(0.95 * (len(lengths) - 1))])) if lengths else 0


def _colours(grid: Grid, log: bool) -> tuple[dict[str, Any], str]:
    """The colour scale, and the condition under which words on it are white."""
    known = grid.values[grid.values.isfinite()]
    low, high = (float(known.min()), float(known.max())) if known.numel() else (0.0, 1.0)
    if log:
        low, high = max(low, 1e-9), max(high, 1e-9)
        return {"scheme": "blues", "type": "log", "reverse": True, "domain": [low, max(high, low * 2)]}, (
            f"datum.value < {(low * max(high, low * 2)) ** 0.5}"
        )
    if low < 0 < high:
        most = max(-low, high)
        return {"scheme": "redblue", "domain": [-most, most]}, f"abs(datum.value) > {0.65 * most}"
    if low >= 0 and high <= 1 and "probability" in grid.metric:
        low, high = 0.0, 1.0
    return {"scheme": "blues", "domain": [low, high]}, f"datum.value > {low + 0.6 * (high - low)}"


def finished(chart: Any, title: str, width: int, height: int) -> Any:
    """A chart with its title, size and hookmap's style."""
    return chart.properties(title=title, width=width, height=height, background="white").configure_axis(
        labelFontSize=11, titleFontSize=12, grid=False
    )
