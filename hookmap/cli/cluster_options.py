"""Options of commands that can run on Ray, on an nnsight server or on vLLM, and the opening of a model there."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

import hookmap
from hookmap.cli.model_options import chosen, fields_of
from hookmap.cli.options import FiniteRange, amount, count, option_group

if TYPE_CHECKING:
    from hookmap.services.nnsight_server import RemoteModel
    from hookmap.services.ray.model import RayModel
    from hookmap.vllm.model import VllmModel

vllm_option = click.option(
    "--vllm",
    metavar="FIELD=VALUE",
    multiple=True,
    callback=lambda context, option, given: fields_of(given),
    help="With --engine vllm: an argument of vLLM's LLM, such as max_model_len=4096; may be given several times.",
)

clustered = option_group(
    count("--workers", "Processes on Ray; with --engine vllm, each has vLLM.  [default: 1; vllm: none, it runs here]"),
    click.option(
        "--address", metavar="ADDRESS", help="Of a running Ray cluster, or auto; of an nnsight server, or local."
    ),
    click.option("--cpus-per-worker", type=FiniteRange(min=0, min_open=True), metavar="C", help="[default: 1]"),
    amount("--gpus-per-worker", "G", "[default: 1 where there are]", least=0),
    click.option("--eager", is_flag=True, default=None, help="With --engine vllm: compile nothing; it starts sooner."),
    vllm_option,
)
"""where a run elsewhere is; `cluster_of` reads them"""
_ON_RAY = ("workers", "address", "cpus_per_worker", "gpus_per_worker")
"""of Ray's workers, whatever runs the model there"""


def cluster_of(engine: str, given: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any] | None:
    """Where a run on Ray or on a server is; None if it runs here. `given`, the options of the command, loses these.

    An option that the engine has no use for is wrong usage; such a setting is ignored.
    """
    names = (*_ON_RAY, "eager", "vllm")
    found = {name: value for name in names if (value := given.pop(name)) is not None}
    of_engines = {"ray": _ON_RAY, "remote": ("address",), "vllm": names}
    taken = of_engines.get(engine, ())
    if wrong := [name for name in found if name not in taken]:
        needed = {name: " or ".join(each for each, takes in of_engines.items() if name in takes) for name in wrong}
        told = (f"--{name.replace('_', '-')} needs --engine {engines}" for name, engines in needed.items())
        raise click.UsageError(", ".join(told))
    return {name: settings[name] for name in taken if name in settings} | found if taken else None


def taps_of(points: Any, layers: Any, interventions: Any, dictionaries: Any = ()) -> dict[str, Any]:
    """What a capture on vLLM compiles taps for: the points that it names; where it names all, nothing is compiled."""
    if points == "all":
        return {"eager": True}
    if dictionaries:
        from hookmap.capture.features import without_features

        points = without_features(points)
    named = dict(points) if isinstance(points, Mapping) else dict.fromkeys(points, layers)
    beside = [(each.point, each.layers) for each in interventions]
    beside += [(point, "all" if layer is None else layer) for point, layer, *_ in (each.reads for each in dictionaries)]
    taps: dict[str, Any] = {}
    for name, own in [*named.items(), *beside]:
        both = [each for each in (taps.get(name, ()), own) if each != ()]
        taps[name] = "all" if "all" in both else sorted({n for each in both for n in _listed(each)})
    return {"taps": taps}


def _listed(layers: Any) -> list[int]:
    return [layers] if isinstance(layers, int) else list(layers)


def on_vllm(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `hookmap.open` that `hookmap.open_on_vllm` has, too. Raises click.UsageError for others."""
    if named := [name for name in ("map", "device", "config") if options[name] is not None]:
        raise click.UsageError(f"vLLM chooses {', '.join(named)}: leave them out with --engine vllm")
    if not options["check"]:
        raise click.UsageError("--no-check: a model on vLLM is always tested when it is opened; leave it out")
    return {name: options[name] for name in ("tokenizer", "dtype", "trust_remote_code")}


_NOT_THERE = {
    "model": "give MODEL", "tokenizer": "give --tokenizer", "dtype": "give --dtype",
    "trust_remote_code": "give --trust-remote-code", "eager": "give --eager", "enforce_eager": "give --eager",
    "shared": "leave it out", "processes": "set VLLM_ENABLE_V1_MULTIPROCESSING",
}  # fmt: skip
"""arguments that `--vllm` does not take"""


def fields_for_vllm(given: Mapping[str, Any] | None, **others: str) -> dict[str, Any]:
    """The arguments of vLLM's `LLM` that `--vllm`, or the settings, give. Raises click.UsageError.

    `others`: arguments that this command does not take either, and what to do instead.
    """
    instead = _NOT_THERE | others
    if wrong := [f"{name}: {instead[name]}" for name in given or {} if name in instead]:
        raise click.UsageError(f"--vllm {', '.join(wrong)}")
    return dict(given or {})


def opened_elsewhere(
    model: str | None, given: dict[str, Any], engine: str, cluster: dict[str, Any], until: ExitStack
) -> "RayModel | RemoteModel | VllmModel":
    """Open the model that was named, or the one of the settings, on Ray workers until `until` ends, or on a server."""
    from hookmap.cli.console import working

    model, options = chosen(model, given)
    if engine == "ray":
        with working("connecting to Ray"):
            return until.enter_context(hookmap.open_on_ray(model, **cluster, **options))
    if engine == "vllm":
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # what a command gives goes to stdout
        instead = {"taps": "give --points and --layers", "functions": "a file's interventions have none"}
        options = {**on_vllm(options), **fields_for_vllm(cluster.pop("vllm", None), **instead)}
        if any(name in cluster for name in _ON_RAY):
            with working("connecting to Ray"):
                return until.enter_context(hookmap.open_on_ray(model, engine="vllm", **cluster, **options))
        with working(f"starting vLLM with {model}"):
            return until.enter_context(hookmap.open_on_vllm(model, **cluster, **options))
    here = {name: options.pop(name) for name in ("map", "tokenizer")}
    if named := [
        name
        for name in ("dtype", "device", "config", "trust_remote_code")
        if options[name] not in (None, "auto", False)
    ]:
        raise click.UsageError(f"the server chooses {', '.join(named)}: leave them out with --engine remote")
    with working(f"reading the skeleton of {model}"):
        return hookmap.open_remote(model, cluster.get("address", True), **here)
