"""What keeps the server running when the connection is gone: a systemd unit, a tmux server, or a session of its own."""

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from hookmap.services.deploy.on_host.commands import Failed, run, step
from hookmap.services.deploy.on_host.folder import Folder


def choose_runner(asked: str) -> tuple[str, str]:
    """The runner to use, and a note for the person. Raises Failed where the host has not the one asked for."""
    systemd = run(["systemctl", "--user", "show-environment"], _systemd_environment()).returncode == 0
    lingers = systemd and "yes" in run(["loginctl", "show-user", str(os.getuid()), "--property=Linger"]).stdout
    tmux = shutil.which("tmux") is not None
    if asked == "systemd" and not systemd:
        raise Failed("systemd keeps no units for users on this host: leave --runner out.")
    if asked == "tmux" and not tmux:
        raise Failed("there is no tmux on this host: leave --runner out.")
    note = "" if lingers or not systemd else "; for a systemd unit: loginctl enable-linger, and deploy again"
    if asked == "systemd" and not lingers:
        note = "; the unit ends with your last session here, unless: loginctl enable-linger"
    best = "systemd" if lingers else "tmux" if tmux else "detached"
    return best if asked == "auto" else asked, note


def start(runner: str, folder: Folder, drain: int) -> None:
    """Start the folder's launcher under this runner. `drain`: seconds that the server may take to stop."""
    _STARTERS[runner](folder, drain)


def disable_unit(folder: Folder) -> None:
    """Stop the folder's systemd unit, and do not start it again."""
    run(["systemctl", "--user", "disable", "--now", f"{folder.unit}.service"], _systemd_environment())


def unit_file(folder: Path, drain: int) -> str:
    """The text of a systemd unit, in which % is special, and in a command also $, quotes and backslashes."""
    escaped = str(folder).replace("%", "%%")
    launcher = f"{escaped}/run.sh".replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    lines = [
        "[Unit]",
        f"Description=hookmap server of {escaped}",
        "[Service]",
        f'ExecStart=/bin/sh "{launcher}"',
        "Restart=on-failure",
        "RestartSec=5",
        "LimitNOFILE=65536",
        f"TimeoutStopSec={drain + 15}",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"


def _start_systemd(folder: Folder, drain: int) -> None:
    """Restarted by systemd when it fails, and with lingering when the host does."""
    units = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "systemd" / "user"
    units.mkdir(parents=True, exist_ok=True)
    (units / f"{folder.unit}.service").write_text(unit_file(folder.path, drain), encoding="utf-8")
    for words in (["daemon-reload"], ["enable", f"{folder.unit}.service"], ["restart", f"{folder.unit}.service"]):
        step(["systemctl", "--user", *words], "systemd refuses the unit", _systemd_environment())


def _start_tmux(folder: Folder, drain: int) -> None:
    """In a tmux server of its own, so that no session of the user's is touched."""
    tmux = ["tmux", "-L", folder.unit]
    run([*tmux, "kill-server"])  # its only window's program has ended, and tmux may not have noticed yet
    end = time.monotonic() + 5
    while run([*tmux, "has-session"]).returncode == 0 and time.monotonic() < end:
        time.sleep(0.05)
    launcher = shlex.join(["exec", "sh", str(folder.launcher)])
    step([*tmux, "new-session", "-d", "-s", "server", launcher], "tmux cannot start the server")


def _start_detached(folder: Folder, drain: int) -> None:
    """In a session of its own, without terminal, stdin and stdout: nothing ties it to the connection."""
    null = subprocess.DEVNULL
    subprocess.Popen(["sh", str(folder.launcher)], stdin=null, stdout=null, stderr=null, start_new_session=True)


def _systemd_environment() -> dict[str, str]:
    """A command over ssh may lack the variable by which the user's systemd is found."""
    return {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", **os.environ}


_STARTERS: dict[str, Callable[[Folder, int], None]] = {
    "systemd": _start_systemd,
    "tmux": _start_tmux,
    "detached": _start_detached,
}
