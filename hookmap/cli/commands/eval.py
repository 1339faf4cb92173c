"""`hookmap eval gsm8k`: evaluate a model, and keep the activations of its answers."""

import json
from pathlib import Path
from typing import Any

import click

from hookmap.cli import cluster_options, model_options
from hookmap.cli.chat_options import read_kwargs
from hookmap.cli.options import amount, calls_option, count


@click.group()
def command() -> None:
    """Evaluate a model on inspect_ai.

    \b
    hookmap eval gsm8k --samples 100 --points resid_post --layers 8,12,16 -o results
    """


@command.command()
@click.argument("model", required=False)
@click.option("--data", metavar="FILE", help="Rows with question and answer; hf://NAME:SPLIT; demo.")
@count("--samples", "The first N.  [default: all; of demo 100]")
@count("--skip", "Leave the first N out.  [default: 0]", least=0)
@click.option(
    "--mode",
    type=click.Choice(["no-tools", "with-tools"]),
    help="with-tools gives it a calculator.  [default: no-tools]",
)
@click.option("--ask", type=click.Choice(["gsm8k", "inspect_evals", "bare"]), help="What form of answer to ask for.")
@count("--parallel", "At once.  [default: 8]", unit="K")
@count("--max-new-tokens", "[default: 512]")
@click.option("--points", metavar="NAMES", help="Keep these tensors: resid_post,mlp_out.  [default: none]")
@click.option("--layers", metavar="LAYERS", help="8,12,16 or 0-3 or -1 or all.  [default: all]")
@calls_option
@amount("--temperature", "T", "Greedy if not given, or 0.", least=0)
@click.option("--seed", type=int, metavar="N", help="Of sampling.")
@click.option("--chat-template-kwargs", metavar="JSON", help="What the template reads: '{\"enable_thinking\": false}'.")
@click.option(
    "-o", "--output", metavar="DIR", required=True, help="The results folder; the same again goes on with it."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout, and no table.")
@click.option("--engine", type=click.Choice(["hooks", "ray"]), help="ray: many processes.  [default: hooks]")
@cluster_options.clustered
@model_options.loading
def gsm8k(
    model: str | None,
    points: str | None,
    layers: str | None,
    calls: str | None,
    chat_template_kwargs: str | None,
    engine: str | None,
    output: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Grade-school mathematics.

    Asks each question, scores the answers by three rules, and writes a folder with samples, conversations,
    activations and inspect's own log (`inspect view --log-dir DIR/inspect`). After a kill the same command goes on.

    \b
    hookmap eval gsm8k --samples 100 --points resid_post --layers 8,12,16 -o results

    The folder's name goes to stdout.
    """
    from hookmap.cli.configuration import Evaluating, read_section
    from hookmap.cli.console import console, working
    from hookmap.cli.settings import (
        choose_model,
        chosen_calls,
        chosen_tensors,
        load_settings,
        refuse_unknown,
        typed_or_set,
    )
    from hookmap.demo import MODEL_PATH
    from hookmap.extras import needed

    settings = load_settings()
    asked = read_section(Evaluating, "eval", settings, given)
    names, of_layers = chosen_tensors(settings, points, layers)
    of_calls = chosen_calls(settings, calls)
    drawn = typed_or_set(given, settings, "temperature", "seed")
    chosen = choose_model(model, settings)
    demo = chosen in ("demo", str(MODEL_PATH))
    data = asked.data or ("demo" if demo else "hf://openai/gsm8k:test")
    with working("importing inspect_ai", quiet=as_json):
        needed("inspect_ai", 'evaluations need inspect_ai: pip install "hookmap[eval]"')
        from hookmap.evaluation.gsm8k.run import evaluate
    refuse_unknown(names or ())
    template = settings.get("chat_template_kwargs")
    if chat_template_kwargs is not None:
        template = read_kwargs(chat_template_kwargs)
    engine = engine or settings.get("engine", "hooks")
    if engine not in ("auto", "hooks", "ray"):
        click.echo(f"note: an evaluation runs on hooks; engine: {engine} is for captures", err=True)
    cluster = cluster_options.cluster_of("ray" if engine == "ray" else "hooks", given, settings)
    opening = typed_or_set({"map": given.pop("map_"), **given}, settings, "map", *given)
    if template:
        opening["chat_template_kwargs"] = template
    if cluster is not None:
        opening |= {"workers": 1} | cluster
    with working(f"evaluating {'demo' if demo else chosen} on {data}", quiet=as_json, spinner=False):
        summary = evaluate(
            output,
            "demo" if demo else chosen,
            source=data,
            samples=asked.samples,
            skip=asked.skip,
            mode=asked.mode,
            prompt=asked.ask,
            parallel=asked.parallel,
            points=names or (),
            layers=of_layers,
            calls=of_calls,
            max_tokens=asked.max_new_tokens,
            **drawn,
            opening=opening,
        )
    for warning in summary["warnings"]:
        console().print(f"[yellow]{warning}[/]")
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return
    _show(summary)
    click.echo(str(Path(output)))


def _show(summary: dict[str, Any]) -> None:
    from hookmap.cli.console import console, table

    screen = console()
    rows = table("scorer", ">accuracy", "95 %", ">n", "")
    for name, score in summary["scores"].items():
        mark = "[dim]correct, in the files[/]" if name == summary["settings"]["scorer"] else ""
        rows.add_row(
            name, f"{score['accuracy']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}", str(score["n"]), mark
        )
    screen.print(rows)
    if summary["samples"] < (asked := summary["settings"]["samples"] or 0):
        screen.print(f"[yellow]there are {summary['samples']} questions, {asked} were asked for[/]")
    cut = (
        f", {summary['truncated']} cut off ({summary['truncated_and_wrong']} of them wrong)"
        if summary["truncated"]
        else ""
    )
    calls = f" in {summary['calls']} calls" if summary["calls"] > summary["samples"] else ""
    screen.print(
        f"{summary['correct']} of {summary['samples']} correct{cut}, {summary['tokens']} tokens generated{calls}"
    )
