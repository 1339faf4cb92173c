"""`hookmap vector make|convert|show`: steering vectors and their files."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli import model_options
from hookmap.cli.chat_options import chat_options, templating

if TYPE_CHECKING:
    from hookmap.analysis.steering import SteeringVector

_SIDES = ("positive", "negative")


@click.group()
def command() -> None:
    """Make, convert and show steering vectors.

    \b
    hookmap vector make --pairs pairs.jsonl --layers 8-12 -o vector.safetensors
    hookmap vector convert vector.safetensors vector.gguf
    hookmap vector show vector.gguf
    """


@command.command()
@click.argument("model", required=False)
@click.option("--pairs", metavar="FILE", required=True, help='JSON lines: {"positive": …, "negative": …}.')
@click.option("-o", "--output", metavar="FILE", required=True, help="A .safetensors or .gguf file.")
@click.option(
    "--point", default="resid_post", show_default=True, metavar="NAME", help="The point that the vector is added to."
)
@click.option("--layers", default="all", show_default=True, metavar="LAYERS", help="8,12,16 or 0-3 or -1 or all.")
@click.option("--calls", metavar="CALL", help="Which run of layers that run several times: last, or a number.")
@click.option("--method", type=click.Choice(["mean_difference", "pca"]), default="mean_difference", show_default=True)
@click.option(
    "--positions", default="last", show_default=True, metavar="WHERE", help="Which tokens; several are averaged."
)
@chat_options
@model_options.loading
def make(
    model: str | None,
    pairs: str,
    output: str,
    point: str,
    layers: str,
    calls: str | None,
    method: Any,
    positions: str,
    **given: Any,
) -> None:
    """Make a vector from contrast pairs.

    Each line of FILE is a pair of prompts: texts, chat messages (images too) or token ids. The vector points from the
    negative ones to the positive ones. The file's name goes to stdout.
    """
    from hookmap.cli.parsing import parse_calls, parse_layers
    from hookmap.cli.settings import load_settings, refuse_unknown

    chosen, of_calls = parse_layers(layers), parse_calls(calls or "all")
    positive, negative = _pairs(pairs)
    _check_ending(output)
    refuse_unknown(point, chosen, model, of_calls, positions=positions)
    how = templating(given, load_settings())
    hm = model_options.opened(model, given, quiet=False)
    how |= {"method": method, "positions": positions, "calls": of_calls}
    made = hm.steering_vector(positive, negative, point, chosen, **how)
    _write(made, output)
    click.echo(output)


@command.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--model-hint", metavar="NAME", help="The model hint in a GGUF file.  [default: the model's type]")
def convert(source: str, target: str, model_hint: str | None) -> None:
    """Turn .safetensors into .gguf, or back.

    GGUF is what llama.cpp and repeng read: resid_post of layer 1 and up, float32.
    """
    _check_ending(target)
    from hookmap.analysis.gguf import open_vector

    _write(open_vector(source), target, model_hint)
    click.echo(target)


@command.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no table.")
def show(file: str, as_json: bool) -> None:
    """Show what a vector is of, and how long it is at each layer."""
    from hookmap.analysis.gguf import open_vector

    found = open_vector(file)
    lengths = {layer: float(found[layer].norm()) for layer in found.layers}
    about = found.about.model_dump(mode="json")
    if as_json:
        click.echo(json.dumps({"about": about, "d_model": len(found[found.layers[0]]), "lengths": lengths}))
        return
    from rich.markup import escape

    from hookmap.cli.console import console, table

    screen = console()
    screen.print(
        "  ".join(f"[dim]{name}[/] {escape(str(value))}" for name, value in about.items() if value is not None)
    )
    rows = table(">layer", ">length")
    for layer, length in lengths.items():
        rows.add_row(str(layer), f"{length:.4g}")
    screen.print(rows)


def _check_ending(path: str) -> None:
    if Path(path).suffix not in (".safetensors", ".gguf"):
        raise click.UsageError(f"{path}: a vector's file ends in .safetensors or .gguf")


def _write(vector: "SteeringVector", path: str, model_hint: str | None = None) -> None:
    from hookmap.analysis.gguf import write_gguf

    if Path(path).suffix == ".gguf":
        write_gguf(vector, path, model_hint)
    else:
        vector.save(path)


def _pairs(path: str) -> tuple[list[Any], list[Any]]:
    """Paths of images are relative to the file. Raises click.UsageError with every wrong line at once."""
    from hookmap.datasets.messages import relative_to

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"the pairs file {path} cannot be read: {error}") from error
    found, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}, column {error.colno}: not JSON: {error.msg}")
            continue
        if not isinstance(pair, dict) or not all(
            pair.get(n) and isinstance(pair[n], str | list | dict) for n in _SIDES
        ):
            problems.append(f'line {number}: expected {{"positive": …, "negative": …}}, found {line.strip()[:60]}')
            continue
        found.append(tuple(relative_to(pair[side], Path(path).parent) for side in _SIDES))
    if problems or not found:
        raise click.UsageError(f"{path}:\n" + "\n".join(f"  - {p}" for p in problems or ["it holds no pairs"]))
    return [pair[0] for pair in found], [pair[1] for pair in found]
