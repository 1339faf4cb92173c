"""`hookmap serve`: an OpenAI-compatible server that also records activations."""

import re
from pathlib import Path
from typing import Any

import click

from hookmap.cli import model_options
from hookmap.cli.cluster_options import vllm_option
from hookmap.cli.options import amount, calls_option, check_folder, count

_GIB = 2**30
_VLLMS = {"batch": "max_num_seqs", "batch_tokens": "max_num_batched_tokens"}
"""options of batches that vLLM makes, by its own names"""
_AS_TYPED = ("host", "port", "queue", "batch_tokens", "connections", "max_new_tokens", "inline_bytes")


def _key(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """What a header can hold: with another key nobody would get in."""
    if value and not re.fullmatch("[!-~]+", value):
        raise click.BadParameter("a key is letters, digits and signs of ASCII, without spaces")
    return value


@click.command()
@click.argument("model", required=False)
@click.option("--host", metavar="NAME", help="Where to listen; 0.0.0.0 for every address.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), metavar="N", help="[default: 8000]")
@click.option(
    "--served-model-name",
    metavar="NAME",
    help="The model's name for clients.  [default: its hub id, or its folder's name]",
)
@click.option(
    "--key", envvar="HOOKMAP_KEY", callback=_key, help="The bearer key that clients need.  [env: HOOKMAP_KEY]"
)
@click.option(
    "--admin-key", envvar="HOOKMAP_ADMIN_KEY", callback=_key, help="Loads and unloads models.  [env: HOOKMAP_ADMIN_KEY]"
)
@click.option("--allow", metavar="MODEL", multiple=True, help="A model that may be loaded; may be given several times.")
@click.option("--allowed-host", metavar="NAME", multiple=True, help="A name of this server besides localhost.")
@click.option(
    "--function",
    metavar="PACKAGE.MODULE:NAME",
    multiple=True,
    help="A function that interventions of requests may name; may be given several times.",
)
@click.option(
    "--points", metavar="NAMES", help="The points that `store_activations: true` stores.  [default: resid_post]"
)
@click.option("--layers", metavar="LAYERS", help="Which layers: 8,12,16 or 0-3 or all.  [default: all]")
@calls_option
@click.option("--engine", type=click.Choice(["hooks", "vllm"]), help="What runs the model.  [default: hooks]")
@click.option(
    "--eager",
    is_flag=True,
    default=None,
    help="With --engine vllm: compile nothing, and keep every point.  [default: False]",
)
@vllm_option
@click.option("--sessions", metavar="DIR", help="The folder of the sessions.  [default: sessions]")
@click.option("--vectors", metavar="DIR", help="A folder of steering vectors (hookmap vector) to offer to clients.")
@amount(
    "--max-bytes",
    "GIB",
    "The most space for all sessions; the oldest finished ones are deleted first.  [default: 20.0]",
)
@amount("--max-age", "HOURS", "How long a session is kept.  [default: 168.0]")
@amount("--request-bytes", "GIB", "The most activations that one request may store.  [default: 2.0]")
@count("--inline-bytes", "The most activations inside an answer.  [default: 16777216]", unit="BYTES")
@count("--queue", "Requests that may wait for the model; more get 429.  [default: 64]")
@count("--batch", "Requests run together, up to N rows, and join while others run; 1: each alone.  [default: 16]")
@click.option(
    "--deterministic",
    is_flag=True,
    default=None,
    help="Each request runs alone: its answer depends on no other.  [default: False]",
)
@count("--batch-tokens", "The most tokens of such a batch: rows times the longest prompt and answer.  [default: 32768]")
@count("--connections", "Clients that may be connected; more get 503.  [default: 1000]")
@count("--max-new-tokens", "The most tokens that a request may ask for.  [default: 4096]")
@count("--drain", "How long running requests may go on when the server is told to stop.  [default: 30]", unit="SECONDS")
@model_options.loading
def command(
    model: str | None,
    key: str | None,
    admin_key: str | None,
    points: str | None,
    layers: str | None,
    calls: str | None,
    **given: Any,
) -> None:
    """Serve MODEL through OpenAI's API, and record activations.

    Existing clients work unchanged; a field `hookmap` in a request says which activations to keep of it.

    \b
    hookmap serve Qwen/Qwen3-0.6B --points resid_pre,resid_mid --layers 8,12,16
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Hello"}], "store_activations": true}'

    Try a running server with `hookmap smoke URL`. Every field and route: docs/server.md
    """
    from hookmap.cli.cluster_options import fields_for_vllm, on_vllm
    from hookmap.cli.configuration import Serving, read_section
    from hookmap.cli.console import working
    from hookmap.cli.settings import choose_model, chosen_calls, chosen_tensors, load_settings, refuse_unknown
    from hookmap.services.server import check_installed

    check_installed()
    settings = load_settings()
    chosen, of_layers = chosen_tensors(settings, points, layers, default="resid_post")
    of_calls = chosen_calls(settings, calls)
    serving = read_section(Serving, "serve", settings, given)
    check_folder(serving.sessions, "--sessions")
    check_folder(serving.vectors, "--vectors")
    loads = model_options.loads(given, settings)
    if serving.engine == "vllm":
        if named := [name for name in _VLLMS if name in serving.model_fields_set]:
            typed, fields = (f"--{name.replace('_', '-')}" for name in named), (f"{_VLLMS[name]}=N" for name in named)
            raise click.UsageError(f"{', '.join(typed)}: vLLM makes the batches; give --vllm {', '.join(fields)}")
        instead = {"functions": "give --function", "served_model_name": "give --served-model-name"}
        loads = {**fields_for_vllm(serving.vllm, **instead), **on_vllm(loads), "eager": serving.eager}
    elif serving.eager or serving.vllm:
        raise click.UsageError("--eager and --vllm need --engine vllm")
    if serving.deterministic and serving.engine == "vllm":
        raise click.UsageError("--deterministic needs --engine hooks; of vLLM: VLLM_BATCH_INVARIANT=1 hookmap serve …")
    model = choose_model(model, settings)
    with working("importing torch and transformers"):
        from hookmap.services.server.run import serve
        from hookmap.services.server.settings import Settings
    refuse_unknown(chosen, of_layers, model, of_calls)
    limits = Settings(
        root=Path(serving.sessions),
        vectors=Path(serving.vectors) if serving.vectors else None,
        key=key or None,
        admin_key=admin_key or None,
        hosts=tuple(serving.allowed_host),
        allow=(*serving.allow, model),
        functions=tuple(serving.function),
        points=tuple(chosen) if isinstance(chosen, list) else chosen,
        layers=of_layers if isinstance(of_layers, str) else tuple(of_layers),
        calls=of_calls if isinstance(of_calls, str) else tuple(of_calls),
        request_bytes=int(serving.request_bytes * _GIB),
        total_bytes=int(serving.max_bytes * _GIB),
        max_age=serving.max_age * 3600,
        drain=float(serving.drain),
        batch=1 if serving.deterministic else serving.batch,
        engine=serving.engine,
        loads=loads,
        **serving.model_dump(include=set(_AS_TYPED)),
    )
    if not limits.local and not key:
        click.echo("note: anybody who reaches this address may use the model; give --key", err=True)
    serve(model, limits, serving.served_model_name)
