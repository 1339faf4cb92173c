"""What a deployment does, in order: refuse, install, replace the server, wait until it answers, try it."""

import json
import os
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from hookmap.services.deploy.on_host.commands import Failed, run, say
from hookmap.services.deploy.on_host.environment import install
from hookmap.services.deploy.on_host.folder import Folder
from hookmap.services.deploy.on_host.process import health, pid_of, refuse_taken_port, status, stop
from hookmap.services.deploy.on_host.request import Request
from hookmap.services.deploy.on_host.runners import choose_runner, start

LOG_LINES = 25
"""lines of the log that are shown when a server fails"""


def deploy(folder: Folder, sent: Path, request: Request) -> dict[str, Any]:
    """Run what was sent as the folder's server, in place of the one that runs. Returns its status. Raises Failed."""
    model = model_path(request.model)
    folder.refuse_other_files()
    refuse_taken_port(folder, request)
    runner, note = choose_runner(request.runner)
    if request.fresh:
        stop(folder, request)
        remove_installed(folder)
    python = install(folder.venv, sent, request)
    release = folder.unpack(sent / "code.zip", request.version)
    folder.key()
    stop(folder, request)
    refuse_taken_port(folder, request)  # it may have been taken meanwhile
    name = request.name or served_name(model)
    bundled = str(release / "hookmap" / "demo" / "model")
    folder.write_launcher(python, release, model or bundled, request.port, request.options)
    folder.write_state(
        port=request.port,
        model=name,
        runner=runner,
        release=release.name,
        drain=request.drain,
        version=request.version,
    )
    start(runner, folder, request.drain)
    say(f"started ({runner}){note}; waiting for it to answer, {request.wait:.0f} s at most")
    wait_for_health(folder, request, name)
    smoke(folder, request, python, release, name)
    folder.keep_only(release)
    return status(folder)


def model_path(model: str | None) -> str | None:
    """The model to serve: a folder of this host by its whole path, a hub id as it is. Raises Failed."""
    if model is None or not model.startswith(("/", "~", ".")):
        return model
    path = Path(model).expanduser().absolute()
    if not path.is_dir():
        raise Failed(f"there is no folder {path} on this host. Copy it there (scp -r), or name a hub id.")
    return str(path)


def served_name(model: str | None) -> str:
    """What clients call the model; `hookmap serve` names it so."""
    if model is None:
        return "hookmap-demo"
    return Path(model).resolve().name if Path(model).exists() else model


def remove_installed(folder: Folder) -> None:
    """Remove the environment and every release."""
    for installed in (folder.venv, folder.releases):
        shutil.rmtree(installed, ignore_errors=True)


def wait_for_health(folder: Folder, request: Request, name: str) -> None:
    """Wait until the server answers, with the version and model asked for. Raises Failed with the end of its log."""
    started = time.monotonic()
    while (found := health(request.port)) is None:
        waited = time.monotonic() - started
        if pid_of(folder) is None and waited > 10 * (not folder.pid_file.exists()):
            raise failed(folder, request, "the server ended before it answered")
        if waited > request.wait:
            raise failed(
                folder, request, f"the server does not answer after {request.wait:.0f} s; longer: --wait SECONDS"
            )
        time.sleep(0.2)
    expected = {"status": "ok", "version": request.version}
    if {key: found.get(key) for key in expected} != expected or name not in found.get("models", ()):
        what = f"expected hookmap {request.version} with {name} on port {request.port}, found {found}"
        raise failed(folder, request, what)


def smoke(folder: Folder, request: Request, python: str, release: Path, name: str) -> None:
    """Run `hookmap smoke` with this folder's key, which no other server takes. Raises Failed."""
    environment = {**os.environ, "PYTHONPATH": str(release), "HOOKMAP_KEY": folder.key()}
    command = [python, "-m", "hookmap.cli", "smoke", f"http://127.0.0.1:{request.port}"]
    done = run([*command, "--model", name, "--json", "--timeout", "300"], environment)
    try:
        steps = json.loads(done.stdout)
    except ValueError:
        what = f"the smoke test did not run: {done.stderr.strip()[-500:]}"
        raise failed(folder, request, what) from None
    for each in steps:
        say(f"  {'✓' if each['passed'] else '✗'} {each['name']}: {each['detail']}")
    if done.returncode:
        raise failed(folder, request, "the smoke test failed; the server still runs")


def failed(folder: Folder, request: Request, what: str) -> Failed:
    """An error with the end of the log. A server that has ended is not started again."""
    if pid_of(folder) is None:
        stop(folder, request)
    log = folder.log
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    shown = "\n".join(f"  | {line}" for line in lines[-LOG_LINES:]) or "  | (it is empty)"
    return Failed(f"{what}. The end of {log}:\n{shown}\nAll of it: {request.ssh} cat {shlex.quote(str(log))}")
