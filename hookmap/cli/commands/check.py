"""`hookmap check`: is hookmap right on this model, as it is loaded here?"""

import json
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli import model_options
from hookmap.cli.options import count

if TYPE_CHECKING:
    from hookmap.analysis.model_check import Finding, ModelCheck

TEXTS = (
    "The capital of France is",
    "When Mary and John went to the store, John gave a drink to",
    "A farmer has 17 sheep. All but 9 run away. How many sheep does the farmer have left, and why?",
    "Once",
)


@click.command()
@click.argument("model", required=False)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Use this text; repeatable.")
@count("--max-new-tokens", "Tokens to generate from each.", default=16)
@count("--batch-size", "Texts that run together.", default=4)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no table.")
@model_options.loading
def command(
    model: str | None, prompts: tuple[str, ...], max_new_tokens: int, batch_size: int, as_json: bool, **given: Any
) -> None:
    """Say whether hookmap is right on MODEL, as it is loaded here.

    The map is held against the weights, captures against plain PyTorch hooks around the model's own generation, and
    engines against each other. What batches, the cache, the dtype and eager attention change is told as numbers, and
    what a capture costs. It takes a minute on a small model.

    \b
    hookmap check
    hookmap check Qwen/Qwen3-0.6B --dtype bfloat16 --batch-size 8

    The table goes to stderr, the JSON to stdout. Exit code 1 if anything is wrong.
    """
    from hookmap.analysis.model_check import ModelCheck, check_model, setting_of
    from hookmap.cli.console import console

    hm = model_options.opened(model, given, quiet=as_json)
    found: list[Finding] = []
    setting = setting_of(hm)
    if not as_json:
        console().print(f"\n{hm.name or hm.map.architecture}  [dim]{setting}[/]\n")
    for answer in check_model(hm, prompts or TEXTS, max_new_tokens, batch_size):
        found.append(answer)
        if not as_json:
            _show(answer)
    result = ModelCheck(hm.name or hm.map.architecture, setting, tuple(found))
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=2, ensure_ascii=False))
    else:
        _verdict(result)
    if not result.passed:
        click.get_current_context().exit(1)


def _show(finding: "Finding") -> None:
    from rich.markup import escape

    from hookmap.cli.console import console

    mark = {"right": "[green]✓[/]", "note": "[yellow]![/]", "wrong": "[red]✗[/]"}[finding.state]
    console().print(f"{mark} [bold]{finding.about:10}[/] {escape(finding.found)}", highlight=False)


def _verdict(result: "ModelCheck") -> None:
    from hookmap.cli.console import console

    wrong = [finding.about for finding in result.findings if finding.state == "wrong"]
    told = f"[red]wrong on this model: {', '.join(wrong)}[/]" if wrong else "[green]right on this model[/]"
    console().print(f"\n{told}\n")
