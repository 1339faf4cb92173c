"""`hookmap train-probe`: linear probes of classes and numbers, learnt from rows that are not kept."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.chat_options import chat_options, templating
from hookmap.cli.model_options import loading, opened
from hookmap.cli.options import FiniteRange, calls_option, count
from hookmap.cli.probe_report import interval, name_of, tell, three
from hookmap.cli.prompts_file import chosen_prompts, prompt_options

if TYPE_CHECKING:
    from hookmap.analysis.probes.streamed.report import StreamReport
    from hookmap.analysis.probes.streamed.run import StreamedProbes

_POOLS = ("last", "last_prompt", "mean", "mean_prompt", "mean_answer", "max")
_BETWEEN = FiniteRange(min=0, min_open=True, max=1, max_open=True)


@click.command("train-probe")
@click.argument("model", required=False)
@prompt_options
@click.option("--store", metavar="DIR", help="Learn the rows of this capture, and run no model.")
@click.option("--table", metavar="FILE", help="A table with `id` that has the label: .jsonl, .csv, .parquet, …")
@click.option("--points", default="resid_post", show_default=True, metavar="NAMES", help="Which tensors.")
@click.option("--layers", default="all", show_default=True, metavar="LAYERS", help="8,12,16 or 0-3 or -1 or all.")
@calls_option
@click.option("--dictionary", "dictionaries", metavar="DIR", multiple=True, help="For --points features; repeatable.")
@click.option("--kind", type=click.Choice(["classes", "regression"]), default="classes", show_default=True)
@click.option("--group", metavar="NAME", help="The label that names a text's question.  [default: the text itself]")
@click.option("--pool", type=click.Choice(_POOLS), default="last", show_default=True, help="Which rows of a text.")
@count(
    "--skip-first", "Tokens at the start of each text that no mean and no label of tokens reads.", least=0, default=1
)
@count("--shuffles", "Controls: labels that are learnt beside the real ones.", default=3)
@count("--passes", "Over all texts.", default=1)
@count("--batch-rows", "Rows of a step.", default=256)
@click.option("--learning-rate", type=_BETWEEN, default=3e-3, show_default=True, metavar="X")
@click.option("--decay", type=FiniteRange(min=0), default=1e-3, show_default=True, metavar="X", help="Of the weights.")
@click.option("--training-seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N")
@count("--batch-size", "How many texts run together.")
@count("--batch-tokens", "How many tokens are read at once.  [default: 4096]")
@click.option("-o", "--output", metavar="DIR", help="Write report and probes.  [default: nothing]")
@click.option("--resume", is_flag=True, help="Go on with the training in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on stdout, and no table.")
@chat_options
@loading
def command(
    model: str | None, store: str | None, output: str | None, resume: bool, as_json: bool, **given: Any
) -> None:
    """Train linear probes while MODEL reads texts. No row is kept.

    --label names what is learnt: a class or a number of each text, or a list with one for each of its tokens. Whole
    questions are held out. Beside each probe: labels of controls, random directions, and the tokens alone. A killed
    run goes on with --resume, and gives the same numbers.

    \b
    hookmap train-probe Qwen/Qwen3-0.6B --prompts texts.jsonl --label topic --layers 8,14,20 -o probes
    hookmap train-probe --store captures/0001 --label length --kind regression --passes 20

    The name of DIR goes to stdout, or with --json the report.
    """
    from hookmap.cli.settings import load_settings

    settings = load_settings()
    how = templating(given, settings)
    named = given["labels"]
    if resume and not output:
        raise click.UsageError("--resume needs the folder to go on with: -o DIR")
    if not named or named == ("all",):
        raise click.UsageError("which label is learnt? Give --label NAME")
    asked = {name: given.pop(name) for name in ("kind", "group", "pool", "shuffles", "passes", "batch_rows")}
    asked |= {name: given.pop(name) for name in ("learning_rate", "decay", "training_seed")}
    asked |= {"label": named[0], "labels": given.pop("table"), "skip": given.pop("skip_first")}
    asked |= {"store": output, "resume": resume}
    kept = named if asked["labels"] is None else named[1:]  # a table has the label itself
    given["labels"] = tuple(dict.fromkeys((*kept, *([asked["group"]] if asked["group"] else []))))
    prompts = chosen_prompts(given, settings, how.get("chat"))
    if (prompts is None) == (store is None):
        raise click.UsageError("on what? Give texts (--prompts FILE) or a capture (--store DIR)")
    found = _of_store(store, given, asked) if store else _of_model(model, prompts, how, as_json, given, asked)
    from hookmap.analysis.probes.report import PROBES, REPORT

    written = [Path(output) / name for name in (REPORT, PROBES)] if output else []
    tell(found.report, written, output, as_json, _show)


def _of_store(store: str, given: dict[str, Any], asked: dict[str, Any]) -> "StreamedProbes":
    import hookmap
    from hookmap.analysis.probes.streamed.run import train_probe
    from hookmap.cli.settings import chosen_tensors

    names, layers = chosen_tensors({}, given["points"], given["layers"])
    return train_probe(None, hookmap.open_store(store), points=names, layers=layers, **asked)


def _of_model(
    model: str | None, prompts: Any, how: dict[str, Any], quiet: bool, given: dict[str, Any], asked: dict[str, Any]
) -> "StreamedProbes":
    from hookmap.cli.settings import choose_model, chosen_calls, chosen_tensors, load_settings, typed_or_set

    settings = load_settings()
    names, layers = chosen_tensors({}, given.pop("points"), given.pop("layers"))
    run = {**how, **typed_or_set(given, settings, "batch_size", "batch_tokens")}
    run["calls"] = chosen_calls(settings, given.pop("calls"))
    if sources := given.pop("dictionaries"):
        from hookmap.analysis.dictionaries.loading import load_dictionary

        run["dictionaries"] = [load_dictionary(source) for source in sources]
    return opened(choose_model(model, settings), given, quiet).train_probe(
        prompts, points=names, layers=layers, **asked, **run
    )


_MEASURES = {"accuracy": "accuracy", "r2": "R²"}


def _show(report: "StreamReport") -> None:
    from rich.markup import escape

    from hookmap.cli.console import console, table

    screen, measure = console(), _MEASURES[report.measure]
    what = f"{len(report.classes)} classes" if report.classes else "numbers"
    screen.print(
        f"[bold]{escape(report.label)}[/]  {what}, of each {report.per}: {report.train.rows} to learn from, "
        f"{report.test.rows} to test on, of {report.test.questions} questions"
    )
    for reason, texts in report.why_left_out.items():
        screen.print(f"[yellow]left out: {texts} with {escape(reason)}[/]")
    rows = table("probe", f">{measure}", "95 %", ">control", ">selectivity", ">random directions")
    for place in report.places if len(report.places) <= 40 else (report.best,):
        more = (place.control, place.selectivity, place.random_directions)
        rows.add_row(name_of(place), three(place.score), interval(place), *map(three, more))
    screen.print(rows)
    screen.print(f"tokens alone: {three(report.tokens_alone)}; {_SIMPLEST[report.measure]}: {three(report.simplest)}")
    best = report.best
    screen.print(f"chosen on other texts: {name_of(best)}")
    if max(report.tokens_alone or 0, report.simplest or 0) >= (best.low or 0):
        screen.print("[yellow]the probe does not clearly beat what the tokens alone tell[/]")


_SIMPLEST = {"accuracy": "the commonest class", "r2": "the mean"}
