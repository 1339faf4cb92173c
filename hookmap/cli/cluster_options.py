"""Options of commands that can run on Ray or on an nnsight server, and the opening of a model there."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

import hookmap
from hookmap.cli.model_options import chosen
from hookmap.cli.options import FiniteRange, amount, count, option_group

if TYPE_CHECKING:
    from hookmap.services.nnsight_server import RemoteModel
    from hookmap.services.ray.model import RayModel

clustered = option_group(
    count("--workers", "With --engine ray.  [default: 1]"),
    click.option(
        "--address", metavar="ADDRESS", help="Of a running Ray cluster, or auto; of an nnsight server, or local."
    ),
    click.option("--cpus-per-worker", type=FiniteRange(min=0, min_open=True), metavar="C", help="[default: 1]"),
    amount("--gpus-per-worker", "G", "[default: 1 where there are]", least=0),
)
"""where a run elsewhere is; `cluster_of` reads them"""


def cluster_of(engine: str, given: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any] | None:
    """Where a run on Ray or on a server is; None if it runs here. `given`, the options of the command, loses these.

    An option that the engine has no use for is wrong usage; such a setting is ignored.
    """
    names = ("workers", "address", "cpus_per_worker", "gpus_per_worker")
    found = {name: value for name in names if (value := given.pop(name)) is not None}
    taken = {"ray": names, "remote": ("address",)}.get(engine, ())
    if wrong := [f"--{name.replace('_', '-')}" for name in found if name not in taken]:
        raise click.UsageError(f"{', '.join(wrong)} needs --engine ray")
    return {name: settings[name] for name in taken if name in settings} | found if taken else None


def opened_elsewhere(
    model: str | None, given: dict[str, Any], engine: str, cluster: dict[str, Any], until: ExitStack
) -> "RayModel | RemoteModel":
    """Open the model that was named, or the one of the settings, on Ray workers until `until` ends, or on a server."""
    from hookmap.cli.console import working

    model, options = chosen(model, given)
    if engine == "ray":
        with working("connecting to Ray"):
            return until.enter_context(hookmap.open_on_ray(model, **cluster, **options))
    here = {name: options.pop(name) for name in ("map", "tokenizer")}
    if named := [
        name
        for name in ("dtype", "device", "config", "trust_remote_code")
        if options[name] not in (None, "auto", False)
    ]:
        raise click.UsageError(f"the server chooses {', '.join(named)}: leave them out with --engine remote")
    with working(f"reading the skeleton of {model}"):
        return hookmap.open_remote(model, cluster.get("address", True), **here)
