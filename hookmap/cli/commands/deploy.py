"""`hookmap deploy`: a server on another machine, over ssh."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hookmap.cli.options import amount

if TYPE_CHECKING:
    from hookmap.services.deploy.on_host.request import Request

_SERVE = "hookmap.serve"
_FOLDER = "hookmap-server"
_OURS = ("model", "host", "port", "key", "admin_key", "sessions")
"""options of `hookmap serve` that a deployment sets itself"""
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@:%\[\]-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?")


class _WithServeOptions(click.Command):
    """What stands behind `--` is for `hookmap serve`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own, given = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
        ctx.meta[_SERVE] = given
        return super().parse_args(ctx, own)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- OPTIONS OF SERVE]"]


@click.command(cls=_WithServeOptions)
@click.argument("host")
@click.argument("model", required=False)
@click.option(
    "--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="The port on the host's 127.0.0.1."
)
@click.option(
    "--folder",
    default=_FOLDER,
    show_default=True,
    metavar="FOLDER",
    help="The folder on the host, from its home folder.",
)
@click.option("--fresh", is_flag=True, help="Make a new environment instead of using the existing one.")
@click.option(
    "--sync",
    type=click.Choice(["frozen", "skip"]),
    help="Install the dependencies in the versions that are installed here, or leave them.  [default: frozen]",
)
@click.option(
    "--lock", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file with other exact versions."
)
@click.option(
    "--torch",
    metavar="REQUIREMENT",
    help="The build of PyTorch to install instead of the host's default: torch==2.13.0",
)
@click.option(
    "--python", metavar="PATH", help="Use this Python on the host, with its packages, and make no environment."
)
@click.option(
    "--release", metavar="VERSION", help="Install this version of hookmap from PyPI instead of the local one."
)
@click.option(
    "--runner",
    type=click.Choice(["auto", "systemd", "tmux", "detached"]),
    default="auto",
    show_default=True,
    help="What keeps the server running after the connection ends.",
)
@amount(
    "--wait",
    "SECONDS",
    "How long to wait for the server to answer. A model download counts too.",
    least=1,
    default=600.0,
)
@click.option(
    "--ssh", default="ssh", show_default=True, envvar="HOOKMAP_SSH", metavar="COMMAND", help="The ssh command."
)
@click.option("--stop", "action", flag_value="stop", help="Stop the server of this folder, and do nothing else.")
@click.option("--status", "action", flag_value="status", help="Show its state; exit code 1 if it does not answer.")
@click.option("--show-key", "action", flag_value="key", help="Print the server's key.")
@click.option("--dry-run", is_flag=True, help="Print what would be run and sent, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    host: str,
    model: str | None,
    port: int,
    folder: str,
    sync: str | None,
    lock: Path | None,
    python: str | None,
    release: str | None,
    ssh: str,
    action: str | None,
    dry_run: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Keep a server running on HOST, over plain ssh.

    HOST is what ssh takes; your ~/.ssh/config applies. MODEL is a hub id or a folder of the host. Again, the same
    command brings the server up to date: what is there is used, and only this folder's own server is stopped.

    \b
    hookmap deploy gpu-box Qwen/Qwen3-0.6B -- --points resid_pre,resid_mid --layers 8,12,16
    ssh -N -L 8000:127.0.0.1:8000 gpu-box
    hookmap deploy gpu-box --stop

    What happens there, and what to do when it does not: docs/deploy.md
    """
    _check(host, folder, python, sync, asked["fresh"], ssh)
    from hookmap.cli.configuration import Serving
    from hookmap.cli.settings import choose_model, load_settings
    from hookmap.demo import MODEL_PATH
    from hookmap.services.deploy.on_host.request import Request

    folder = folder.removeprefix("~/")
    again = ["hookmap", "deploy", host]
    again += ["--ssh", ssh] if ssh != "ssh" else []
    again += ["--folder", folder] if folder != _FOLDER else []
    common: dict[str, Any] = {"again": shlex.join(again), "ssh": f"{ssh} {shlex.quote(host)}", "port": port}
    if action is not None:
        _run(Request(action=action, **common), {}, host, folder, python, ssh, dry_run, as_json, ctx)
        return
    given: list[str] = ctx.meta[_SERVE]
    served = _served(given)
    chosen = choose_model(model, load_settings())
    if chosen == str(MODEL_PATH):
        chosen = ""
    elif not chosen.startswith(("/", "~", ".")) and not _HUB_ID.fullmatch(chosen):
        raise click.BadParameter(f"{chosen!r} is neither a hub id nor a path such as /data/model", param_hint="MODEL")
    from hookmap.services.deploy.bundle import bundle

    sent = bundle(release, lock, installs=python is None and sync != "skip")
    asked |= {"python": python, "sync": sync or "frozen", "version": sent.version, "options": tuple(given)}
    asked |= {"model": chosen or None, "name": served["served_model_name"]}
    asked |= {"drain": served["drain"] or Serving.model_fields["drain"].default}
    request = Request(action="deploy", **common, **asked)
    _run(request, sent.files, host, folder, python, ssh, dry_run, as_json, ctx)


def _check(host: str, folder: str, python: str | None, sync: str | None, fresh: bool, ssh: str) -> None:
    """Raises click.BadParameter for what could mean something else to ssh or to a shell there."""
    if not _HOST.fullmatch(host):
        raise click.BadParameter(f"{host!r} is no name of a host: write box or me@box", param_hint="HOST")
    for value, option in ((folder.removeprefix("~/"), "--folder"), (python, "--python")):
        if value is not None and (not value or value.startswith("-") or not value.isprintable()):
            raise click.BadParameter(f"{value!r} is no path", param_hint=option)
    if folder.startswith("~") and not folder.startswith("~/"):
        raise click.BadParameter(f"{folder!r}: no shell there reads ~; write it from your home", param_hint="--folder")
    try:
        words = shlex.split(ssh)
    except ValueError as error:
        raise click.BadParameter(f"{ssh!r}: {error}", param_hint="--ssh") from error
    if not words:
        raise click.BadParameter("it is empty", param_hint="--ssh")
    if python is not None and (sync is not None or fresh):
        raise click.UsageError("--python uses an environment as it is: leave --sync and --fresh out")
    if sync == "skip" and fresh:
        raise click.UsageError("--sync skip would leave the environment empty that --fresh makes: leave one out")


def _served(given: list[str]) -> dict[str, Any]:
    """What `hookmap serve` reads out of these options. Raises click.UsageError."""
    from hookmap.cli.commands.serve import command as serve

    serving = serve.make_context("hookmap deploy HOST [MODEL] --", list(given))
    typed = click.core.ParameterSource.COMMANDLINE
    if wrong := [name for name in _OURS if serving.get_parameter_source(name) is typed]:
        names = ", ".join("MODEL" if name == "model" else f"--{name.replace('_', '-')}" for name in wrong)
        raise click.UsageError(
            f"{names} behind -- is not for a deployment: MODEL and --port stand before it, the server listens on "
            "127.0.0.1, its key stays on the host, and its sessions in the folder there"
        )
    return serving.params


def _run(
    asked: "Request",
    files: dict[str, bytes],
    host: str,
    folder: str,
    python: str | None,
    ssh: str,
    dry_run: bool,
    as_json: bool,
    ctx: click.Context,
) -> None:
    import json

    from hookmap.services.deploy.on_host.request import FILE
    from hookmap.services.deploy.over_ssh import PROGRAM, call, packed, ssh_command

    line = ssh_command(shlex.split(ssh), host, folder, python)
    document = asked.to_json()
    if dry_run:
        click.echo(shlex.join(line))
        click.echo(f"\non its stdin a tar of {PROGRAM}" + "".join(f", {n} ({len(d)} bytes)" for n, d in files.items()))
        click.echo(f"and {FILE}:\n{document}")
        return
    sent = packed({**files, FILE: document.encode()})
    found = call(line, sent, host, python, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(found))
    elif asked.action == "key":
        click.echo(found["key"])
    else:
        _show(found, asked, host)
    if asked.action == "status" and not found["answers"]:
        ctx.exit(1)


def _show(found: dict[str, Any], asked: "Request", host: str) -> None:
    def tell(text: str) -> None:
        click.echo(text, err=True)

    if asked.action == "stop":
        tell("it was not running" if found["stopped"] is None else f"stopped (pid {found['stopped']})")
        return
    what = f"{found['model']} with hookmap {found['version']} on 127.0.0.1:{found['port']}"
    if not found["running"]:
        tell(f"{host} does not serve {what}: its server does not run\n")
        tell(f"  log     {_log(found, asked)}")
        tell(f"  start   {asked.again} … as it was deployed")
        return
    answers = "" if found["answers"] else ", and does not answer (yet)"
    tell(f"\n{host} serves {what} ({found['runner']}, pid {found['pid']}){answers}\n")
    tell(f"  reach   {_tunnel(found, asked, host)}   then http://127.0.0.1:{found['port']}")
    tell(f"  key     {asked.again} --show-key")
    tell(f"  log     {_log(found, asked)}")
    tell(f"  status  {asked.again} --status")
    tell(f"  stop    {asked.again} --stop")


def _log(found: dict[str, Any], asked: "Request") -> str:
    return f"{asked.ssh} {shlex.quote('tail -f ' + shlex.quote(found['log']))}"


def _tunnel(found: dict[str, Any], asked: "Request", host: str) -> str:
    name, port = shlex.quote(host), found["port"]
    return f"{asked.ssh.removesuffix(name)}-N -L {port}:127.0.0.1:{port} {name}"
