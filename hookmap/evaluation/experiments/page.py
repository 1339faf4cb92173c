"""The report as one self-contained HTML page with tables and SVG charts."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from hookmap.evaluation.experiments.report import SIGNIFICANT, Report

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; }
th { border-bottom: 1px solid #999; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.holds td { font-weight: 600; } figure { margin: 1.5rem 0; } svg { max-width: 100%; height: auto; }
"""


def page(report: Report, pictures: Mapping[str, str]) -> str:
    """The HTML document. pictures: name -> SVG document."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Prefixes</title>",
        f"<style>{_STYLE}</style><h1>Prefixes: what they change</h1>",
        f"<p>{escape(report.model)}, {report.questions} questions of {escape(report.data)}, {report.answers} answers. "
        f"Each prefix is compared with <b>{escape(report.neutral)}</b>, paired by question.</p>",
        _table(("prefix", "words"), ((name, repr(text)) for name, text in report.prefixes.items())),
        f"<h2>Rewards</h2><p>{conclusion(report)}</p>",
        *(f"<p><b>{escape(warning)}</b></p>" for warning in report.warnings),
        f"<p>{escape(report.cut)}</p>",
        _rewards(report),
        _figure(pictures, "differences"),
    ]
    if report.separations:
        parts += ["<h2>Activations</h2>", f"<p>{WARNING}</p>", _separations(report)]
        parts += [_figure(pictures, name) for name in pictures if name != "differences"]
    return "\n".join(parts) + "\n</html>\n"


WARNING = (
    "A probe tells answers after a prefix from those after neutral. That alone says nothing of emotions: a prefix of "
    "any words is in the context, and the best control (what needs no model) often does as well."
)


def conclusion(report: Report) -> str:
    """One sentence: which differences are significant after the correction."""
    held = report.significant
    if not held:
        return f"No difference holds after Holm's correction ({len(report.comparisons)} comparisons)."
    told = "; ".join(f"{one.prefix}: {one.reward} {one.difference:+.3f}" for one in held)
    return escape(f"{len(held)} of {len(report.comparisons)} differences hold (Holm, p < {SIGNIFICANT}): {told}.")


def _rewards(report: Report) -> str:
    head = (
        "prefix",
        "reward",
        ">mean",
        ">difference",
        f">95 %, n = {report.questions}",
        ">higher",
        ">lower",
        ">p",
        ">p (Holm)",
        "test",
    )
    means = {(one.prefix, one.reward): one.mean for one in report.rewards}
    rows: list[tuple[str, ...]] = [
        (c.prefix, c.reward, three(means[c.prefix, c.reward]), f"{c.difference:+.3f}", f"{c.low:+.3f} to {c.high:+.3f}",
         str(c.better), str(c.worse), f"{c.p:.4f}", f"{c.p_holm:.4f}", c.test)
        for c in report.comparisons
    ]  # fmt: skip
    rows = [
        (report.neutral, one.reward, f"{one.mean:.3f}", *[""] * 7)
        for one in report.rewards
        if one.prefix == report.neutral
    ] + rows
    held = {(one.prefix, one.reward) for one in report.significant}
    return _table(head, rows, lambda row: (row[0], row[1]) in held)


def _separations(report: Report) -> str:
    head = ("prefix", "rows", ">AUROC", ">95 %", ">shuffled", ">p", ">best control", "which")
    return _table(
        head,
        (
            (s.prefix, s.pool, three(s.auroc), f"{three(s.low)} to {three(s.high)}", three(s.shuffled),
             three(s.p), three(s.control_auroc), s.control or "")
            for s in report.separations
        ),
    )  # fmt: skip


def three(value: float | None) -> str:
    """The number with three decimal places; an empty text for None."""
    return "" if value is None else f"{value:.3f}"


def _figure(pictures: Mapping[str, str], name: str) -> str:
    return f"<figure>{pictures[name]}</figure>" if name in pictures else ""


def _table(head: Iterable[str], rows: Iterable[tuple[str, ...]], marked: Any = lambda row: False) -> str:
    columns = [(name.removeprefix(">"), " class=n" if name.startswith(">") else "") for name in head]
    lines = ["<tr>" + "".join(f"<th{c}>{escape(name)}</th>" for name, c in columns) + "</tr>"]
    for row in rows:
        cells = "".join(f"<td{c}>{escape(cell)}</td>" for (_, c), cell in zip(columns, row, strict=True))
        lines.append(f"<tr{' class=holds' if marked(row) else ''}>{cells}</tr>")
    return "<table>" + "".join(lines) + "</table>"
