"""`hookmap probe`: is a label written in a tensor of a capture, and where?"""

import re
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.options import FiniteRange, count
from hookmap.cli.probe_report import interval, name_of, tell, three

if TYPE_CHECKING:
    from hookmap.analysis.probes.report import Report, Tested

_POOLS = ("last", "last_prompt", "mean", "mean_prompt", "mean_answer", "each")


@click.command()
@click.argument("folder", metavar="STORE")
@click.option("--label", default="correct", show_default=True, metavar="NAME", help="The label to predict.")
@click.option("--labels", metavar="FILE", help="A table with `id` and more labels: .jsonl, .csv, .parquet, …")
@click.option("--positive", metavar="VALUE", help="The value that counts as yes, where the label is not true or false.")
@click.option("--above", type=float, metavar="NUMBER", help="For a number as label: values above it count as yes.")
@click.option(
    "--group", metavar="NAME", help="The label that names a sample's question.  [default: each prompt is a question]"
)
@count("--limit", "Use at most N samples.")
@click.option("--points", default="all", show_default=True, metavar="NAMES", help="Which of the points in STORE.")
@click.option("--layers", default="all", show_default=True, metavar="LAYERS", help="8,12,16 or 0-3 or -1 or all.")
@click.option("--pool", type=click.Choice(_POOLS), default="last", show_default=True, help="Which rows of a sample.")
@click.option(
    "--positions",
    metavar="SPAN",
    help="Of a pool, as in a capture: 1: leaves the first token out. With --pool each: -8:4, from the prompt's end.",
)
@click.option("--method", type=click.Choice(["logistic", "ridge", "mean_difference"]), default="logistic")
@count("--folds", "Number of folds.", least=3, default=5)
@count(
    "--shuffles",
    default=100,
    help="How often the labels are shuffled and the probe refitted; p is at least 1 / (N + 1).",
)
@count("--seed", "Seed of folds and shuffles.", least=0, default=0)
@click.option("--memory", type=FiniteRange(min=0, min_open=True), default=2, show_default=True, metavar="GB")
@click.option("-o", "--output", metavar="DIR", help="Write report, pictures, probes and vectors.  [default: nothing]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout, and no table.")
def command(
    folder: str,
    points: str,
    layers: str,
    positions: str | None,
    memory: float,
    output: str | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Fit linear probes on the capture in STORE.

    Cross-validated by question; the layer is chosen on the training part only. The report has AUROC for each point and
    layer, and what shuffled labels, lengths and words alone would give. p: the share of shuffles that are as good, of a
    row those whose best row is.

    \b
    hookmap probe run --label correct -o probes
    hookmap probe run --label answer --above 10 --pool last_prompt --points resid_post -o probes

    The name of the folder that is written goes to stdout.
    """
    import hookmap
    from hookmap.cli.console import progress, working
    from hookmap.cli.settings import chosen_tensors

    names, chosen = chosen_tensors({}, points, layers)
    where = _span(positions) if how["pool"] == "each" else positions
    with working("importing torch and scikit-learn", quiet=as_json):
        from hookmap.analysis.probes.run import probe
    with progress() as bars:
        bar = bars.add_task("tensors", total=None)
        found = probe(
            hookmap.open_store(folder),
            points=names,
            layers=chosen,
            positions=where,
            memory=int(memory * 10**9),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
            **how,
        )
    tell(found.report, found.save(output) if output else [], output, as_json, _show)


def _span(text: str | None) -> slice | None:
    if text is None:
        return None
    match = re.fullmatch(r"(-?[0-9]{1,18})?:(-?[0-9]{1,18})?", text.strip())
    if match is None:
        raise click.BadParameter(f"{text!r}: write a span such as -8:4 or -8: or :0", param_hint="--positions")
    return slice(*(None if part is None else int(part) for part in match.groups()))


def _show(report: "Report") -> None:
    from rich.markup import escape

    from hookmap.cli.console import console, table

    screen, chosen = console(), report.chosen
    screen.print(
        f"[bold]{escape(report.label)}[/]  {report.positives} of {report.samples} samples, "
        f"{report.questions} questions, {report.folds} folds, {report.method}, {report.pool}"
    )
    for reason, samples in report.why_left_out.items():
        screen.print(f"[yellow]left out: {samples} with {escape(reason)}[/]")
    if report.strangers:
        screen.print(f"[yellow]{report.strangers} ids of the table are of no sample[/]")
    rows = table("probe", ">AUROC", "95 %", ">shuffled", ">selectivity", ">p")
    for place in report.places if len(report.places) <= 40 else ():
        rows.add_row(_name(place), *_cells(place))
    rows.add_row("[bold]chosen in training[/]", *_cells(chosen), end_section=True)
    for control in report.controls:
        rows.add_row(f"[dim]{control.name}[/]", three(control.auroc), interval(control))
    screen.print(rows)
    for what, why in [*((_name(p), p.why) for p in report.places), *((c.name, c.why) for c in report.controls)]:
        if why:
            screen.print(f"[dim]{what}: {why}[/]")
    names = ", ".join(dict.fromkeys(map(_name, chosen.places)))
    screen.print(
        f"chosen: {names}; recall at 1 % false positives {three(chosen.recall_at_1_percent)}, "
        f"calibration error {three(chosen.calibration_error)}, Brier {three(chosen.brier)}"
    )
    screen.print(f"{report.shuffles} shuffles of the labels: {report.seconds:.1f} s of fits")
    best = report.best_control
    if best is not None and (chosen.low or 0) <= (best.auroc or 0):
        screen.print(f"[yellow]the probe does not clearly beat {best.name} ({three(best.auroc)})[/]")


def _name(place: Any) -> str:
    return name_of(place) + ("" if place.position is None else f" at {place.position}")


def _cells(score: "Tested") -> list[str]:
    more = (score.shuffled, score.selectivity, score.p)
    return [three(score.auroc), interval(score), *map(three, more)]
