"""`hookmap examples`: the tokens at which features are largest, with their context."""

import json
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.chat_options import chat_options, templating
from hookmap.cli.model_options import loading, opened
from hookmap.cli.options import calls_option, count
from hookmap.cli.prompts_file import chosen_prompts, prompt_options
from hookmap.wording import is_number

if TYPE_CHECKING:
    from hookmap.activations import Key
    from hookmap.analysis.examples.result import Examples


@click.command()
@click.argument("model", required=False)
@click.option("--points", metavar="NAMES", help="Features of which tensors: mlp_post or z@8.  [default: mlp_post]")
@click.option("--layers", metavar="LAYERS", help="Which layers: 8,12,16 or 0-3 or -1 or all.  [default: all]")
@calls_option
@click.option("--features", metavar="LIST", help="Which features: 0,17,507 or 0-99.  [default: all]")
@click.option("--norms", is_flag=True, help="The norms of rows, of z those of each head, in place of features.")
@click.option("--direction", "directions", metavar="FILE", multiple=True, help="A steering vector's file; repeatable.")
@click.option("--choices", is_flag=True, help="What routers choose, in place of a point: features are experts.")
@click.option("--dictionary", metavar="DIR", help="The features of this sparse autoencoder, where it reads.")
@prompt_options
@click.option("--store", metavar="DIR", help="Look at the rows of this capture, and run no model.")
@count("--top", "Examples of the largest value, of each feature.", default=20)
@count("--random", "Random examples, of each feature.", least=0, default=20)
@click.option("--context", default="24,8", show_default=True, metavar="N,M", help="Tokens shown before and after.")
@count("--skip-first", "Tokens at the start of each text that are no examples.", least=0, default=1)
@click.option("--positive", is_flag=True, help="Only values above 0 are examples.")
@count("--max-new-tokens", least=0, help="Tokens to generate for each prompt; 0 reads the texts.", default=0)
@count("--batch-size", "How many prompts run together.")
@count("--batch-tokens", "How many tokens are read at once.  [default: 4096]")
@click.option("-o", "--output", metavar="DIR", help="Write the examples to DIR.  [default: print only]")
@click.option("--resume", is_flag=True, help="Go on with the examples in DIR.")
@click.option("--from", "source", metavar="DIR", help="Show the examples in this folder instead of running MODEL.")
@click.option("--html", metavar="FILE", help="Write a page of them; one file, no network.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no table.")
@chat_options
@loading
def command(
    model: str | None,
    features: str | None,
    output: str | None,
    source: str | None,
    html: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Find the tokens at which features of MODEL are largest.

    Of all features at once, in one pass over the texts: the tokens of the largest values and random ones, with what
    stands around them. Features are the numbers of a point, norms of heads, or directions of vectors.

    \b
    hookmap examples --points mlp_post --layers 8 --prompts texts.jsonl -o examples
    hookmap examples --from examples --features 0-99 --html examples.html
    hookmap examples --store captures/0001 --points features --positive -o examples

    The name of DIR goes to stdout, or with --json everything.
    """
    from hookmap.cli.parsing import parse_layers

    numbers = None if features is None or features == "all" else _numbers(features, parse_layers)
    if source is not None:
        from hookmap.analysis.examples.files import open_examples

        found = open_examples(source)
        chosen = _named(found, numbers)
    else:
        of = _of_store if given["store"] else _of_model
        found = of(model, output, as_json, numbers, given)
        chosen = _named(found, None)
    if html:
        from hookmap.analysis.examples.page import save_page

        click.echo(f"wrote {save_page(found, html, chosen)}", err=True)
    if as_json:
        click.echo(json.dumps(found.as_json(chosen), ensure_ascii=False))
        return
    _show(found, chosen)
    if output:
        click.echo(output)


def _numbers(text: str, parse: Any) -> list[int]:
    try:
        found = parse(text)
    except click.BadParameter:
        found = [-1]
    if min(found) < 0:
        raise click.BadParameter(f"{text!r}: write numbers such as 0,17,507 or 0-99", param_hint="--features")
    return list(dict.fromkeys(found))


def _named(found: "Examples", numbers: list[int] | None) -> "dict[Key, list[int | str]]":
    """The features of a folder that were typed; those of each tensor that it has. Raises SelectionError."""
    if numbers is None:
        return {key: [*found.names(key)] for key in found.tensors}
    for key in found.tensors:
        found.of(key, numbers[0])  # raises where it has no such feature
    return {key: [*numbers] for key in found.tensors}


def _of_model(
    model: str | None, output: str | None, quiet: bool, numbers: list[int] | None, given: dict[str, Any]
) -> "Examples":
    from hookmap.analysis.examples.files import EXAMPLES
    from hookmap.cli.console import progress
    from hookmap.cli.settings import (
        choose_model,
        chosen_calls,
        chosen_tensors,
        load_settings,
        refuse_unknown,
        typed_or_set,
    )

    settings = load_settings()
    how = templating(given, settings)
    own, of = given.pop("points"), given.pop("layers")
    points, layers = chosen_tensors({}, own, of, "mlp_post")
    named = own is None and (given["choices"] or given["dictionary"])  # they say which points themselves
    calls = chosen_calls(settings, given.pop("calls"))
    prompts = chosen_prompts(given, settings, how.get("chat"))
    if prompts is None:
        raise click.UsageError("examples in which texts? Give --prompts FILE or --prompt TEXT")
    if given["resume"] and not output:
        raise click.UsageError("--resume needs the folder to go on with: -o DIR")
    if output and not given["resume"]:
        EXAMPLES.refuse_used(output)
    batches = typed_or_set(given, settings, "batch_size", "batch_tokens")
    model = choose_model(model, settings)
    refuse_unknown(() if named else points, layers, model, calls)
    wanted = _wanted(given)
    hm = opened(model, given, quiet)
    with progress() as bars:
        bar = bars.add_task("texts", total=len(prompts))
        run = {**how, **batches, "calls": calls, "store": output, "resume": given["resume"]}
        run["progress"] = lambda state: bars.update(bar, completed=state.samples_done)
        of_points = None if named else points
        return hm.examples(prompts, of_points, layers, given["max_new_tokens"], features=numbers, **wanted, **run)


def _of_store(
    model: str | None, output: str | None, quiet: bool, numbers: list[int] | None, given: dict[str, Any]
) -> "Examples":
    import hookmap
    from hookmap.analysis.examples.files import EXAMPLES
    from hookmap.analysis.examples.run import examples
    from hookmap.cli.settings import chosen_tensors
    from hookmap.loading.checkpoints import load_tokenizer
    from hookmap.loading.prompts import text_of

    if output:
        EXAMPLES.refuse_used(output)
    store = hookmap.open_store(given["store"])
    names, layers = chosen_tensors({}, given["points"], given["layers"], "all")
    found = examples(None, store, names, layers, features=numbers, **_wanted(given))
    named = given["tokenizer"] or model or found.about["model"]
    if named:
        tokenizer = load_tokenizer(named, trust_remote_code=bool(given["trust_remote_code"]))
        found.text = lambda token: text_of(tokenizer, [token])
    if output:
        EXAMPLES.save(found, output)
    return found


def _wanted(given: dict[str, Any]) -> dict[str, Any]:
    """What examples are looked for, as `HookedModel.examples` takes it."""
    from hookmap.analysis.steering import load_vector

    found: dict[str, Any] = {"norms": given["norms"], "choices": given["choices"], "k": given["top"]}
    found |= {"random": given["random"], "skip": given["skip_first"], "context": _context(given["context"])}
    if given["positive"]:
        found["positive"] = True
    if given["directions"]:
        found["directions"] = _directions([(file, load_vector(file)) for file in given["directions"]])
    if given["dictionary"]:
        from hookmap.analysis.dictionaries.loading import load_dictionary

        found["dictionary"] = load_dictionary(given["dictionary"])
    return found


def _directions(vectors: list[tuple[str, Any]]) -> dict[str, Any]:
    """Each file's directions by name; of several layers, with the layer behind it."""
    found = {}
    for file, vector in vectors:
        for layer in vector.layers:
            found[file if len(vector.layers) == 1 else f"{file} layer {layer}"] = vector[layer]
    return found


def _context(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(is_number(part.strip()) for part in parts):
        raise click.BadParameter(f"{text!r}: write tokens before and after, such as 24,8", param_hint="--context")
    return int(parts[0]), int(parts[1])


SHOWN = 20
"""features in the table"""


def _show(found: "Examples", chosen: "dict[Key, list[Any]]") -> None:
    from rich.markup import escape

    from hookmap.analysis.charts import printable
    from hookmap.cli.console import console, table
    from hookmap.stores.ledger import tensor_name

    screen, rows = console(), table("tensor", "feature", ">above 0", ">largest", "where")
    every = [(key, name) for key, names in chosen.items() for name in names]
    for key, name in every[:SHOWN]:
        own = found.of(key, name)
        best = own.top[0] if own.top else None
        text = "" if best is None else _snippet([found.text(t) for t in best.tokens], best.at, printable)
        largest = "" if best is None else f"{best.value:.4g}"
        rows.add_row(tensor_name(key), escape(str(name)), f"{own.density:.2%}", largest, escape(text))
    screen.print(rows)
    if len(every) > SHOWN:
        screen.print(f"[dim]{len(every) - SHOWN} features more: --html FILE shows them, --features names some[/]")


def _snippet(words: list[str], at: int, printable: Any) -> str:
    """A few tokens around the one that is meant, which stands in brackets."""
    before, after = "".join(words[max(0, at - 8) : at]), "".join(words[at + 1 : at + 4])
    return f"{printable(before)}[{printable(words[at])}]{printable(after)}"
