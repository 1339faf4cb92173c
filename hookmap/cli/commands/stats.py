"""`hookmap stats`: statistics of tensors, without keeping their rows."""

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.chat_options import chat_options, templating
from hookmap.cli.cluster_options import cluster_of, clustered, opened_elsewhere, taps_of
from hookmap.cli.model_options import loading, opened
from hookmap.cli.options import calls_option, count, option_group
from hookmap.cli.prompts_file import chosen_prompts, prompt_options
from hookmap.cli.row_options import row_options, row_selection
from hookmap.cli.sampling_options import sampling, sampling_options
from hookmap.wording import is_ascii_numeral

if TYPE_CHECKING:
    from hookmap.analysis.reductions.statistics import Statistics, Summary

_WHAT = option_group(
    click.option("--points", metavar="NAMES", help="Of which tensors: resid_post,mlp_post or resid_post@3,5 or all."),
    click.option("--layers", metavar="LAYERS", help="Which layers: 8,12,16 or 0-3 or -1 or all.  [default: all]"),
    calls_option,
    click.option(
        "--reductions",
        metavar="NAMES",
        default="mean,variance,max",
        show_default=True,
        help="Of count, mean, variance, std, skewness, kurtosis, min, max, covariance, quantiles, histogram, norm, "
        "cosine, outlier, massive.",
    ),
    click.option(
        "--by",
        metavar="NAMES",
        help="Groups of rows: sink (the first token of each text), position, token, label:NAME.  [default: sink]",
    ),
    click.option("--edges", metavar="LIST", help="Of the histogram's bins: -10,-1,0,1,10.  [default: -20 to 20]"),
    click.option("--direction", metavar="FILE", help="A steering vector's file, for the reduction cosine."),
)
_FROM = option_group(
    click.option("--store", metavar="DIR", help="Reduce this capture instead of running MODEL."),
    click.option(
        "--merge", metavar="DIR", multiple=True, help="Merge the statistics in these folders into -o; repeatable."
    ),
)


@click.command()
@click.argument("model", required=False)
@_WHAT
@prompt_options
@_FROM
@click.option("-o", "--output", metavar="DIR", help="Write the statistics to DIR.  [default: print only]")
@click.option("--resume", is_flag=True, help="Go on with the statistics in DIR.")
@count("--max-new-tokens", least=0, help="Tokens to generate for each prompt; 0 reads the texts.", default=0)
@count("--batch-size", "How many prompts run together.  [default: 8]")
@count("--batch-tokens", "How many tokens are read at once.  [default: 4096]")
@row_options
@click.option("--intervene", metavar="FILE", help="Apply the interventions in this JSON or YAML file.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "hooks", "nnsight", "ray", "vllm"]),
    help="What watches the model.  [default: auto]",
)
@clustered
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout, and no table.")
@sampling_options
@chat_options
@loading
def command(model: str | None, output: str | None, as_json: bool, **given: Any) -> None:
    """Sum up tensors of MODEL while it reads or generates.

    Means, variances, extremes, covariances, quantiles, norms and more of each feature, over all tokens and by groups of
    them. No row is kept: memory is flat in the number of tokens. A killed run goes on with --resume.

    \b
    hookmap stats --points resid_post --prompts texts.jsonl -o stats
    hookmap stats Qwen/Qwen3-0.6B --points resid_post,mlp_post --layers 8-12 --prompts hf://NAME:train \\
        --reductions mean,variance,covariance --by label:topic -o stats
    hookmap stats --store captures/0001 --reductions max,norm
    hookmap stats --merge part1 --merge part2 -o whole

    The name of DIR goes to stdout, or with --json everything.
    """
    merge, store = given.pop("merge"), given.pop("store")
    if merge:
        found = _merged(merge, output)
    elif store:
        found = _of_store(store, output, given)
    else:
        found = _of_model(model, output, as_json, given)
    if as_json:
        click.echo(json.dumps(found.as_json(), ensure_ascii=False))
        return
    _show(found)
    if output:
        click.echo(output)


def _merged(folders: tuple[str, ...], output: str | None) -> "Statistics":
    from hookmap.analysis.reductions.files import STATISTICS
    from hookmap.analysis.reductions.run import merged

    if output:
        STATISTICS.refuse_used(output)
    found = merged(map(STATISTICS.open, folders))
    if output:
        STATISTICS.save(found, output)
    return found


def _of_store(store: str, output: str | None, given: dict[str, Any]) -> "Statistics":
    import hookmap
    from hookmap.analysis.reductions.files import STATISTICS
    from hookmap.analysis.reductions.run import reduce_store
    from hookmap.cli.settings import chosen_tensors

    names, layers = chosen_tensors({}, given["points"], given["layers"], "all")
    if output:
        STATISTICS.refuse_used(output)
    found = reduce_store(hookmap.open_store(store), names, layers, **_how(given))
    if output:
        STATISTICS.save(found, output)
    return found


def _of_model(model: str | None, output: str | None, quiet: bool, given: dict[str, Any]) -> "Statistics":
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
    points, layers = chosen_tensors(settings, given.pop("points"), given.pop("layers"), "resid_post")
    calls = chosen_calls(settings, given.pop("calls"))
    prompts = chosen_prompts(given, settings, how.get("chat"))
    if prompts is None:
        raise click.UsageError("statistics of which texts? Give --prompts FILE or --prompt TEXT")
    resume, new = given.pop("resume"), given.pop("max_new_tokens")
    if resume and not output:
        raise click.UsageError("--resume needs the folder to go on with: -o DIR")
    if output and not resume:
        from hookmap.analysis.reductions.files import STATISTICS

        STATISTICS.refuse_used(output)
    engine = typed_or_set(given, settings, "engine").get("engine", "auto")
    cluster = cluster_of(engine, given, settings)
    run = {**how, **typed_or_set(given, settings, "batch_size", "batch_tokens"), **row_selection(given, settings)}
    run |= sampling(given, settings, generates=new > 0) if new else {}
    if (file := given.pop("intervene")) is not None:
        from hookmap.capture.interventions.documents import load_interventions

        run["interventions"] = load_interventions(file)
    if cluster is not None and engine == "vllm":
        cluster |= taps_of(points, layers, run.get("interventions", ()))
    wanted = _how(given)
    model = choose_model(model, settings)
    refuse_unknown(points, layers, model, calls)
    with ExitStack() as stack:
        if cluster is None:
            hm: Any = opened(model, given, quiet)
            run["engine"] = engine
        else:
            hm = opened_elsewhere(model, given, engine, cluster, stack)
        bars = stack.enter_context(progress())
        bar = bars.add_task("texts", total=len(prompts))

        def show(state: Any) -> None:
            bars.update(bar, completed=state.samples_done)

        run |= {"calls": calls, "store": output, "resume": resume, "progress": show}
        found: Statistics = hm.reduce(prompts, points, layers, max_new_tokens=new, **wanted, **run)
    return found


def _how(given: dict[str, Any]) -> dict[str, Any]:
    """What is reduced. `given` loses these. Raises SelectionError, before anything is loaded."""
    from hookmap.analysis.reductions.wanted import wanted
    from hookmap.analysis.steering import load_vector
    from hookmap.cli.parsing import parse_list

    by, edges, direction = given.pop("by"), given.pop("edges"), given.pop("direction")
    found: dict[str, Any] = {"reductions": parse_list(given.pop("reductions"))}
    if by is not None:
        found["by"] = parse_list(by)
    if edges is not None:
        found["edges"] = _numbers(edges)
    if direction is not None:
        found["direction"] = load_vector(direction)
    wanted(**found)
    return found


def _numbers(text: str) -> list[float]:
    try:
        if not is_ascii_numeral(text):
            raise ValueError
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: write numbers such as -10,-1,0,1,10", param_hint="--edges") from error


def _show(found: "Statistics") -> None:
    from hookmap.cli.console import console, table
    from hookmap.stores.ledger import tensor_name
    from hookmap.wording import counted

    screen = console()
    names = [name for name in found.wanted.reductions if name not in ("count", "covariance", "histogram", "quantiles")]
    shown = table("tensor", ">rows", *(f">{name}" for name in names), "groups")
    for key in found.keys:
        if key not in found.tensors:
            shown.add_row(tensor_name(key), "0", *("" for _ in names), "")
            continue
        own = found[key]
        apart = [by for by in found.wanted.by if by != "sink"]
        groups = ", ".join(counted(len(own.by(by).groups), by.removeprefix("label:")) for by in apart)
        shown.add_row(tensor_name(key), str(own.count), *(_cell(own, name) for name in names), groups)
    screen.print(shown)
    screen.print("[dim]of each feature's: the largest in size, and its feature; norm and cosine: mean ± deviation[/]")
    for key in found.tensors:
        if lost := found.tensors[key].not_finite:
            screen.print(f"[yellow]{tensor_name(key)}: {counted(lost, 'row')} not finite, left out[/]")


def _cell(own: "Summary", name: str) -> str:
    if f"{name}.mean" in own.names:
        return f"{float(own[f'{name}.mean']):.4g} ± {float(own[f'{name}.std']):.3g}"
    values = own[name].flatten()
    place = int(values.nan_to_num(0).abs().argmax())
    return f"{float(values[place]):.4g} at {place}"
