"""`hookmap experiment`: what a few words before a question do to answers and activations."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hookmap.evaluation.experiments.report import Report

_STAGES = ("configure", "generate", "score", "report")


def _print_schema(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from hookmap.evaluation.experiments.document import schema

        click.echo(json.dumps(schema(), indent=2))
        ctx.exit()


@click.command()
@click.argument("file")
@click.option("-o", "--output", metavar="DIR", required=True, help="The folder; the same again goes on with it.")
@click.option("--stage", type=click.Choice(_STAGES), help="This one only.  [default: those of the file]")
@click.option("--again", type=click.Choice(["score", "report"]), help="This one and those after it, done anew.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout, and no table.")
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print FILE's JSON Schema.",
)
def command(file: str, output: str, stage: Any, again: Any, as_json: bool) -> None:
    """Run the experiment with prefixes that FILE describes.

    Each question is asked after each prefix: answers and activations are kept, rewarded, and compared with those after
    the neutral prefix. Every stage goes on after a kill.

    \b
    hookmap experiment demo -o emotions
    hookmap experiment emotions.yaml -o emotions --stage generate

    The folder's name goes to stdout.
    """
    from rich.markup import escape

    from hookmap.cli.console import console, progress, working
    from hookmap.extras import needed

    with working("importing inspect_ai and scikit-learn", quiet=as_json):
        for package in ("inspect_ai", "sklearn"):
            needed(package, 'experiments need more packages: pip install "hookmap[eval,viz]"')
        from hookmap.evaluation.experiments.document import load_experiment
        from hookmap.evaluation.experiments.run import run
    experiment = load_experiment(file)
    what = f"{len(experiment.prefixes)} prefixes, {experiment.samples.number} questions"
    with working(what, quiet=as_json, spinner=False), progress() as bars:
        bar = bars.add_task("running", total=None)
        report = run(
            experiment,
            output,
            stage,
            again,
            lambda name, done, total: bars.update(bar, description=name, completed=done, total=total),
        )
    for warning in report.warnings if report is not None else ():
        console().print(f"[yellow]{escape(warning)}[/]")
    if as_json:
        click.echo("null" if report is None else report.model_dump_json(indent=2))
        return
    if report is not None:
        _show(report)
    click.echo(str(Path(output)))


def _show(report: "Report") -> None:
    from rich.markup import escape

    from hookmap.cli.console import console, table
    from hookmap.evaluation.experiments.page import conclusion, three

    screen = console()
    means = {(one.prefix, one.reward): one.mean for one in report.rewards}
    rows = table(
        "prefix",
        "reward",
        ">mean",
        f">− {report.neutral}",
        f"95 %, n = {report.questions}",
        ">higher",
        ">lower",
        ">p",
        ">Holm",
    )
    for reward in dict.fromkeys(one.reward for one in report.rewards):
        rows.add_row(f"[dim]{report.neutral}[/]", reward, f"{means[report.neutral, reward]:.3f}")
        mine = [one for one in report.comparisons if one.reward == reward]
        for c in mine:
            bold = "bold" if c in report.significant else None
            rows.add_row(
                c.prefix, reward, f"{means[c.prefix, reward]:.3f}", f"{c.difference:+.3f}",
                f"{c.low:+.3f} to {c.high:+.3f}", str(c.better), str(c.worse), f"{c.p:.4f}", f"{c.p_holm:.4f}",
                style=bold, end_section=c is mine[-1],
            )  # fmt: skip
    screen.print(rows)
    if report.separations:
        rows = table("told by a probe", "rows", ">AUROC", "95 %", ">shuffled", ">p", ">best control", "")
        for s in report.separations:
            rows.add_row(
                s.prefix, s.pool, three(s.auroc), f"{three(s.low)}–{three(s.high)}", three(s.shuffled),
                three(s.p), three(s.control_auroc), f"[dim]{s.control or ''}[/]",
            )  # fmt: skip
        screen.print(rows)
    if report.cut:
        screen.print(escape(report.cut))
    screen.print(escape(conclusion(report)))
