"""What commands that can run on Ray share: the options that say where, and the model held by workers."""

from typing import TYPE_CHECKING, Any

import click

import hookmap
from hookmap.cli.model_options import chosen

if TYPE_CHECKING:
    from hookmap.scale.model import RayModel

_CLUSTER = (
    click.option("--workers", type=click.IntRange(min=1), metavar="N", help="With --engine ray.  [default: 1]"),
    click.option("--address", metavar="HOST:PORT", help="A running Ray cluster, or auto.  [default: one of its own]"),
    click.option("--cpus-per-worker", type=click.FloatRange(min=0, min_open=True), metavar="C", help="[default: 1]"),
    click.option("--gpus-per-worker", type=click.FloatRange(min=0), metavar="G", help="[default: 1 where there are]"),
)


def clustered(command: Any) -> Any:
    """Adds the options that `cluster_of` takes."""
    for option in reversed(_CLUSTER):
        command = option(command)
    return command


def cluster_of(engine: str, given: dict[str, Any]) -> dict[str, Any] | None:
    """The cluster that `given`, the options of the command, names; they are taken out of it. None without Ray."""
    names = ("workers", "address", "cpus_per_worker", "gpus_per_worker")
    found = {name: value for name in names if (value := given.pop(name)) is not None}
    if engine == "ray":
        return found
    if found:
        wrong = ", ".join(f"--{name.replace('_', '-')}" for name in found)
        raise click.UsageError(f"{wrong} needs --engine ray")
    return None


def opened_on_ray(model: str | None, given: dict[str, Any], cluster: dict[str, Any]) -> "RayModel":
    """The model that was named, or the one of the settings, held by workers."""
    from hookmap.cli.console import working

    model, options = chosen(model, given)
    with working("connecting to Ray"):
        return hookmap.open_on_ray(model, **cluster, **options)
