"""The server's process: its id, its health, its port, and how it is stopped.

Only a server that is proved to be of this folder is stopped; a port that any other process has is left alone.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

from hookmap.services.deploy.on_host.commands import Failed, run, say
from hookmap.services.deploy.on_host.folder import Folder
from hookmap.services.deploy.on_host.request import Request
from hookmap.services.deploy.on_host.runners import disable_unit


def pid_of(folder: Folder) -> int | None:
    """The process id of the folder's running server: the number in the pid file, if that process is this server."""
    try:
        pid = int(folder.pid_file.read_text())
    except (OSError, ValueError):
        return None
    line = command_line(pid)
    serves = "hookmap.cli serve" in line and f"--sessions {folder.sessions}" in line
    return pid if serves or str(folder.launcher) in line else None


def stop(folder: Folder, request: Request) -> int | None:
    """Stop the folder's server; returns the process id that it had, None where it did not run."""
    state, pid = folder.state, pid_of(folder)
    if state.get("runner") == "systemd":  # also where it is dead just now, and about to be started again
        disable_unit(folder)
    if pid is None:
        return None
    drain = state.get("drain", 30)
    say(f"stopping the server of this folder (pid {pid}), which may answer for {drain} s more")
    end = time.monotonic() + drain + 15
    _signal(pid, signal.SIGTERM)
    while pid_of(folder) == pid:
        if time.monotonic() > end + 10:
            raise Failed(f"pid {pid}, the server of this folder, cannot be stopped: see {request.ssh} ps {pid}")
        if time.monotonic() > end:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.1)
    return pid


def status(folder: Folder) -> dict[str, Any]:
    """What the folder's server is and whether it runs and answers."""
    state, pid = folder.state, pid_of(folder)
    found = health(state["port"]) if pid is not None else None
    seen = {"folder": str(folder.path), "log": str(folder.log), "pid": pid, "running": pid is not None}
    return {**state, **seen, "answers": found is not None}


def refuse_taken_port(folder: Folder, request: Request) -> None:
    """Raises Failed where another process has the port. The folder's own server makes room when it is stopped."""
    port = request.port
    if _is_free(port) or (pid_of(folder) is not None and folder.state.get("port") == port):
        return
    who = "another program" if health(port) is None else "a hookmap server that this folder did not start"
    raise Failed(
        f"port {port} is taken by {who}; it is left alone. Another: {request.again} --port {port + 1}\n"
        f"See who it is: {request.ssh} ss -ltnp 'sport = :{port}'"
    )


def health(port: int, seconds: float = 2) -> dict[str, Any] | None:
    """What a hookmap server on this port answers to GET /health; None where none answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/health", timeout=seconds) as answer:
            found = json.loads(answer.read(100_000))
    except (OSError, ValueError, http.client.HTTPException):
        return None
    ours = isinstance(found, dict) and {"status", "version", "models"} <= found.keys()
    return found if ours else None


def command_line(pid: int) -> str:
    """The words of a process's command with spaces between; "" where it does not run."""
    if not Path("/proc/self").exists():
        return run(["ps", "-ww", "-o", "command=", "-p", str(pid)]).stdout
    end = time.monotonic() + 5
    with contextlib.suppress(OSError):
        while True:  # while its program is being replaced (exec), a running process has no words
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if words or state in "ZX" or time.monotonic() > end:
                return words.replace(b"\0", b" ").decode(errors="replace")
            time.sleep(0.001)
    return ""


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


def _is_free(port: int) -> bool:
    """Whether a server can listen on the port."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does; a listener is still seen
        try:
            tried.bind(("127.0.0.1", port))
        except PermissionError as error:
            raise Failed(f"port {port} needs more rights than yours: choose one above 1023.") from error
        except OSError:
            return False
    return True
