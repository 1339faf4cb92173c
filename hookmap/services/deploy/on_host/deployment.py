"""Runs on the host, where `hookmap deploy` has sent it: `python3 on_host.py FOLDER/incoming.XXXXXX`.

It does what request.json beside it says. Only the standard library; progress goes to stderr, one JSON object to stdout.
What it stops is only a server that it proves to be of this folder; a port that anybody else listens on is refused.
"""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OURS = frozenset(
    "venv releases run.sh env hookmap.yaml key pid pid.new server.json server.log server.log.1 sessions .lock".split()
)
"""what a server's folder holds"""
TAIL = 25
"""lines of the log that are shown when a server fails"""


class Failed(Exception):
    """What is told to the person, in place of a result."""


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Host:
    """One folder, and the one server that belongs to it."""

    def __init__(self, folder: Path, work: Path, asked: "dict[str, Any]") -> None:
        self.folder, self.work, self.asked = folder, work, asked
        self.log, self.key_file, self.pid_file = folder / "server.log", folder / "key", folder / "pid"
        self.state_file = folder / "server.json"
        # Short enough for tmux's socket, and another one for another folder.
        known = re.sub(r"[^A-Za-z0-9]+", "-", str(folder)).strip("-")[-30:]
        self.unit = f"hookmap-{known}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"

    # The server that is there ---------------------------------------------------------------------------------------

    @property
    def state(self) -> "dict[str, Any]":
        """What was started last; {} where nothing was."""
        try:
            return dict(json.loads(self.state_file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def pid(self) -> "int | None":
        """Of this folder's server, where it runs: the number in the pid file, if that process is one of this folder."""
        try:
            pid = int(self.pid_file.read_text())
        except (OSError, ValueError):
            return None
        line = command_line(pid)
        served = "hookmap.cli serve" in line and f"--sessions {self.folder / 'sessions'}" in line
        return pid if served or str(self.folder / "run.sh") in line else None

    def stop(self) -> "int | None":
        """Ends this folder's server; returns the number that it had."""
        state, pid = self.state, self.pid()
        if state.get("runner") == "systemd":  # also where it is dead just now, and about to be started again
            run(["systemctl", "--user", "disable", "--now", f"{self.unit}.service"], systemd_environment())
        if pid is None:
            return None
        say(f"stopping the server of this folder (pid {pid}), which may answer for {state.get('drain', 30)} s more")
        end = time.monotonic() + state.get("drain", 30) + 15
        send(pid, signal.SIGTERM)
        while self.pid() == pid:
            if time.monotonic() > end + 10:
                raise Failed(
                    f"pid {pid}, the server of this folder, cannot be stopped: see {self.asked['ssh']} ps {pid}"
                )
            if time.monotonic() > end:
                send(pid, signal.SIGKILL)
            time.sleep(0.1)
        return pid

    def check_folder(self) -> None:
        """Raises Failed for a first deployment among files of another kind, whose venv --fresh would remove."""
        if self.state:
            return
        there = sorted(each.name for each in self.folder.iterdir() if not each.name.startswith("incoming."))
        if strange := [name for name in there if name not in OURS]:
            raise Failed(
                f"{self.folder} is not empty and not a server's: it holds {', '.join(strange[:5])}. "
                "Nothing was changed. Name a folder of its own: --folder DIR"
            )

    def check_port(self, port: int) -> None:
        """Raises Failed where somebody else has it. The server of this folder will have made room."""
        if free(port) or (self.pid() is not None and self.state.get("port") == port):
            return
        found = health(port)
        who = "another program" if found is None else "a hookmap server that this folder did not start"
        raise Failed(
            f"port {port} is taken by {who}; it is left alone. Another: {self.asked['again']} --port {port + 1}\n"
            f"See who it is: {self.asked['ssh']} ss -ltnp 'sport = :{port}'"
        )

    # What a deployment does, in this order --------------------------------------------------------------------------

    def deploy(self) -> "dict[str, Any]":
        port, model = self.asked["port"], self.model_path()
        self.check_folder()
        self.check_port(port)
        if self.asked["fresh"]:
            self.stop()
            for name in ("venv", "releases"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        python = self.environment()
        release = self.unpack()
        self.make_key()
        self.stop()
        self.check_port(port)
        name = self.asked["name"] or served_name(model)
        runner, note = self.runner()
        self.write_launcher(python, release, model or str(release / "hookmap" / "demo" / "model"))
        state = {"port": port, "model": name, "runner": runner, "release": release.name, "drain": self.asked["drain"]}
        self.state_file.write_text(json.dumps({**state, "version": self.asked["version"]}), encoding="utf-8")
        RUNNERS[runner](self)
        say(f"started ({runner}){note}; waiting for it to answer, {self.asked['wait']:.0f} s at most")
        self.wait_for_health(port, name)
        self.smoke(python, release, port, name)
        for other in (self.folder / "releases").iterdir():
            if other != release:
                shutil.rmtree(other, ignore_errors=True)
        return self.status()

    def model_path(self) -> "str | None":
        """The model, where it is a folder of this host by its whole path."""
        model: str | None = self.asked["model"]
        if model is None or not model.startswith(("/", "~", ".")):
            return model
        path = Path(model).expanduser().absolute()
        if not path.is_dir():
            raise Failed(f"there is no folder {path} on this host. Copy it there (scp -r), or name a hub id.")
        return str(path)

    def environment(self) -> str:
        """The interpreter with the dependencies: one that is there (--python), or that of the folder's venv."""
        if self.asked["python"]:
            say(f"dependencies: those of {sys.executable}, as they are")
            return sys.executable
        venv = self.folder / "venv"
        python, ready = venv / "bin" / "python", venv / ".ready"
        if self.asked["sync"] == "skip":
            if not python.exists():
                raise Failed(f"--sync skip, and {venv} is not there yet: deploy once without it.")
            say("dependencies: left as they are")
            return str(python)
        wanted = self.requirements()
        if ready.exists() and ready.read_text() == wanted:
            say("dependencies: as locked already")
            return str(python)
        ready.unlink(missing_ok=True)
        self.install(venv, python)
        ready.write_text(wanted)
        return str(python)

    def requirements(self) -> str:
        """A digest of all that decides what is installed."""
        parts = [(self.work / name).read_text(encoding="utf-8") for name in ("requirements.txt", "lock.txt")]
        return hashlib.sha256("\n".join([*parts, self.torch()]).encode()).hexdigest()

    def torch(self) -> str:
        """The requirement for PyTorch: without CUDA's libraries, of several GB, on Linux without an NVIDIA GPU."""
        if self.asked["torch"]:
            return str(self.asked["torch"])
        locked = re.search(r"^torch==([^\s+;]+)", (self.work / "lock.txt").read_text(encoding="utf-8"), re.MULTILINE)
        assert locked is not None  # the sender has looked
        cpu = platform.system() == "Linux" and not has_nvidia_gpu()
        return f"torch=={locked[1]}{'+cpu' if cpu else ''}"

    def install(self, venv: Path, python: Path) -> None:
        if not python.exists():
            say(f"making {venv} with Python {platform.python_version()}")
            bare = [] if has_module("ensurepip") else ["--without-pip"]
            step([sys.executable, "-m", "venv", *bare, str(venv)], "cannot make an environment")
        pip = [str(python), "-m", "pip"]
        if run([*pip, "--version"]).returncode:
            if not has_module("pip"):
                raise Failed("this host's Python has neither ensurepip nor pip: sudo apt install python3-venv")
            pip = [sys.executable, "-m", "pip", "--python", str(python)]
        torch = self.torch()
        say(f"installing {torch}")
        # Few retries, and its dependencies later from PyPI: where this index is not reached, pip goes on with the
        # other places that it is configured for.
        index = (
            ["--no-deps", "--extra-index-url", CPU_INDEX, "--retries", "1", "--timeout", "20"] if "+" in torch else []
        )
        step([*pip, "install", "-q", torch, *index], f"pip cannot install {torch}; another: --torch REQUIREMENT")
        say("installing what hookmap needs, in the locked versions (a minute or two)")
        files = ["-r", str(self.work / "requirements.txt"), "-c", str(self.work / "lock.txt")]
        step([*pip, "install", "-q", *files], "pip cannot install the locked versions; other ones: --lock FILE")

    def unpack(self) -> Path:
        """hookmap's code in a folder of its own: what runs is not touched."""
        digest = hashlib.sha256((self.work / "code.zip").read_bytes()).hexdigest()[:12]
        release = self.folder / "releases" / digest
        if not release.exists():
            say(f"unpacking hookmap {self.asked['version']} ({digest})")
            with zipfile.ZipFile(self.work / "code.zip") as archive:
                archive.extractall(self.work / "code")
            release.parent.mkdir(exist_ok=True)
            (self.work / "code").rename(release)
        return release

    def make_key(self) -> str:
        """The server's key; made once, readable by its owner alone."""
        if not self.key_file.exists():
            with open(os.open(self.key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(24) + "\n")
        self.key_file.chmod(0o600)
        return self.key_file.read_text().strip()

    def write_launcher(self, python: str, release: Path, model: str) -> None:
        """run.sh, by which every runner starts the server. The key is in no command line."""
        sessions = str(self.folder / "sessions")
        options = ["--host", "127.0.0.1", "--port", str(self.asked["port"]), "--sessions", sessions]
        command = [python, "-m", "hookmap.cli", "serve", model, *options, *self.asked["options"]]
        settings = self.folder / "hookmap.yaml"
        if not settings.exists():  # or the server would take one of a folder above
            settings.write_text("# Options of the server, as in docs/cli.md\n", encoding="utf-8")
        self.pid_file.unlink(missing_ok=True)
        if self.log.exists():
            self.log.replace(f"{self.log}.1")
        lines = [
            "#!/bin/sh",
            "# Starts the server of this folder. Written by `hookmap deploy`, anew each time.",
            f"cd {shlex.quote(str(self.folder))} || exit 1",
            "umask 077",
            "set -a",
            "if [ -f env ]; then . ./env; fi",
            "HOOKMAP_KEY=$(cat key)",
            f"PYTHONPATH={shlex.quote(str(release))}",
            "set +a",
            "echo $$ > pid.new && mv pid.new pid",  # so that nobody reads half of it
            f"exec {shlex.join(command)} >> server.log 2>&1",
        ]
        (self.folder / "run.sh").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def runner(self) -> "tuple[str, str]":
        """What keeps the server when the connection is gone, and a note about it."""
        asked: str = self.asked["runner"]
        systemd = run(["systemctl", "--user", "show-environment"], systemd_environment()).returncode == 0
        lingers = systemd and "yes" in run(["loginctl", "show-user", str(os.getuid()), "--property=Linger"]).stdout
        note = "" if lingers or not systemd else "; for a systemd unit: loginctl enable-linger, and deploy again"
        if asked == "systemd" and not systemd:
            raise Failed("systemd keeps no units for users on this host: leave --runner out.")
        if asked == "tmux" and shutil.which("tmux") is None:
            raise Failed("there is no tmux on this host: leave --runner out.")
        if asked == "systemd" and not lingers:
            note = "; the unit ends with your last session here, unless: loginctl enable-linger"
        if asked != "auto":
            return asked, note
        return ("systemd" if lingers else "tmux" if shutil.which("tmux") else "detached"), note

    def wait_for_health(self, port: int, name: str) -> None:
        """Returns when the server answers as the one that was asked for."""
        end = time.monotonic() + self.asked["wait"]
        started = time.monotonic()
        while (found := health(port)) is None:
            if self.pid() is None and time.monotonic() - started > 10 * (not self.pid_file.exists()):
                raise self.failed("the server ended before it answered")
            if time.monotonic() > end:
                raise self.failed(
                    f"the server does not answer after {self.asked['wait']:.0f} s; longer: --wait SECONDS"
                )
            time.sleep(0.2)
        expected = {"status": "ok", "version": self.asked["version"]}
        if {key: found.get(key) for key in expected} != expected or name not in found.get("models", ()):
            raise self.failed(f"expected hookmap {self.asked['version']} with {name} on port {port}, found {found}")

    def smoke(self, python: str, release: Path, port: int, name: str) -> None:
        """hookmap's own walk through a running server; with this folder's key, which no other server takes."""
        own = {**os.environ, "PYTHONPATH": str(release), "HOOKMAP_KEY": self.make_key()}
        url = f"http://127.0.0.1:{port}"
        command = [python, "-m", "hookmap.cli", "smoke", url, "--model", name, "--json", "--timeout", "300"]
        done = run(command, own)
        try:
            steps = json.loads(done.stdout)
        except ValueError:
            raise self.failed(f"the smoke test did not run: {done.stderr.strip()[-500:]}") from None
        for each in steps:
            say(f"  {'✓' if each['passed'] else '✗'} {each['name']}: {each['detail']}")
        if done.returncode:
            raise self.failed("the smoke test failed; the server still runs")

    def failed(self, what: str) -> Failed:
        """With the end of the log. A server that has ended is not started again."""
        if self.pid() is None:
            self.stop()
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        shown = "\n".join(f"  | {line}" for line in lines[-TAIL:]) or "  | (it is empty)"
        return Failed(f"{what}. The end of {self.log}:\n{shown}\nAll of it: {self.asked['ssh']} cat {self.quoted_log}")

    @property
    def quoted_log(self) -> str:
        return shlex.quote(str(self.log))

    def status(self) -> "dict[str, Any]":
        """Of the folder's server."""
        state, pid = self.state, self.pid()
        found = health(state["port"]) if pid is not None else None
        seen = {"folder": str(self.folder), "log": str(self.log), "pid": pid, "running": pid is not None}
        return {**state, **seen, "answers": found is not None}


# What keeps a server ------------------------------------------------------------------------------------------------


def start_systemd(host: Host) -> None:
    """A unit of the user: systemd starts it again when it fails, and with lingering when the host does."""
    units = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "systemd" / "user"
    units.mkdir(parents=True, exist_ok=True)
    (units / f"{host.unit}.service").write_text(unit(host.folder, host.asked["drain"]), encoding="utf-8")
    for words in (["daemon-reload"], ["enable", f"{host.unit}.service"], ["restart", f"{host.unit}.service"]):
        step(["systemctl", "--user", *words], "systemd refuses the unit", systemd_environment())


def unit(folder: Path, drain: int) -> str:
    """The text of a systemd unit; in it, % and in a command also $, quotes and backslashes mean something."""
    told = str(folder).replace("%", "%%")
    launcher = f"{told}/run.sh".replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    lines = [
        "[Unit]",
        f"Description=hookmap server of {told}",
        "[Service]",
        f'ExecStart=/bin/sh "{launcher}"',
        "Restart=on-failure",
        "RestartSec=5",
        f"TimeoutStopSec={drain + 15}",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"


def start_tmux(host: Host) -> None:
    """A tmux server of its own, so that no session of the user's is touched."""
    launcher = shlex.join(["exec", "sh", str(host.folder / "run.sh")])
    tmux = ["tmux", "-L", host.unit]
    run([*tmux, "kill-server"])  # its only window's program has ended, and tmux may not have noticed yet
    end = time.monotonic() + 5
    while run([*tmux, "has-session"]).returncode == 0 and time.monotonic() < end:
        time.sleep(0.05)
    step([*tmux, "new-session", "-d", "-s", "server", launcher], "tmux cannot start the server")


def start_detached(host: Host) -> None:
    """A session of its own, without terminal, stdin and stdout: nothing of it hangs on the connection."""
    null = subprocess.DEVNULL
    launcher = ["sh", str(host.folder / "run.sh")]
    subprocess.Popen(launcher, stdin=null, stdout=null, stderr=null, start_new_session=True)


RUNNERS: "dict[str, Callable[[Host], None]]" = {
    "systemd": start_systemd,
    "tmux": start_tmux,
    "detached": start_detached,
}


# The host -----------------------------------------------------------------------------------------------------------


def command_line(pid: int) -> str:
    """Of a process, its words with spaces between; "" where there is none, or a dead one."""
    if not Path("/proc/self").exists():
        return run(["ps", "-ww", "-o", "command=", "-p", str(pid)]).stdout
    end = time.monotonic() + 5
    with contextlib.suppress(OSError):
        while True:  # a process has no words, and lives, while its program is being replaced (exec)
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if words or state in "ZX" or time.monotonic() > end:
                return words.replace(b"\0", b" ").decode(errors="replace")
            time.sleep(0.001)
    return ""


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


def free(port: int) -> bool:
    """Whether a server can listen there."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does; who listens is still seen
        try:
            tried.bind(("127.0.0.1", port))
        except PermissionError as error:
            raise Failed(f"port {port} needs more rights than yours: choose one above 1023.") from error
        except OSError:
            return False
    return True


def health(port: int, seconds: float = 2) -> "dict[str, Any] | None":
    """What a hookmap server on this port says of itself; None where none answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://127.0.0.1:{port}/health", timeout=seconds) as answer:
            found = json.loads(answer.read(100_000))
    except (OSError, ValueError, http.client.HTTPException):
        return None
    ours = isinstance(found, dict) and {"status", "version", "models"} <= found.keys()
    return found if ours else None


def served_name(model: "str | None") -> str:
    """As `hookmap serve` names a model."""
    if model is None:
        return "hookmap-demo"
    return Path(model).resolve().name if Path(model).exists() else model


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi is there and lists a GPU."""
    return shutil.which("nvidia-smi") is not None and "GPU" in run(["nvidia-smi", "--list-gpus"]).stdout


def has_module(name: str) -> bool:
    return run([sys.executable, "-c", f"import {name}"]).returncode == 0


def systemd_environment() -> "dict[str, str]":
    """A command over ssh may lack what names the user's own systemd."""
    return {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", **os.environ}


def run(command: "list[str]", environment: "dict[str, str] | None" = None) -> "subprocess.CompletedProcess[str]":
    """What a command says; exit code 127 where it is not there."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def step(command: "list[str]", wrong: str, environment: "dict[str, str] | None" = None) -> None:
    done = run(command, environment)
    if done.returncode:
        raise Failed(f"{wrong}:\n{(done.stderr.strip() or done.stdout.strip())[-1500:]}")


def do(work: Path) -> "dict[str, Any]":
    asked = json.loads((work / "request.json").read_text(encoding="utf-8"))
    host, action = Host(work.parent, work, asked), asked["action"]
    if action != "deploy" and not host.state:
        raise Failed(
            f"nothing was deployed to {host.folder}. Deploy: {asked['again']}, or name the folder: --folder DIR"
        )
    if action == "status":
        return host.status()
    if action == "key":
        return {"key": host.make_key()}
    with open(host.folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Failed(f"another `hookmap deploy` is at work in {host.folder}: wait for it.") from None
        return host.deploy() if action == "deploy" else {"stopped": host.stop(), **host.status()}


def main() -> None:
    work = Path(sys.argv[1]).resolve()
    try:
        result = do(work)
    except (Failed, OSError) as error:
        result = {"error": str(error)}
    sys.stdout.write(json.dumps(result) + "\n")
    sys.exit("error" in result)


if __name__ == "__main__":
    main()
