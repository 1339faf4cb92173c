"""The folder of one server on the host, and the files in it."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hookmap.services.deploy.on_host.commands import Failed, say

OURS = frozenset(
    "venv releases run.sh env hookmap.yaml key pid pid.new server.json server.log server.log.1 sessions .lock".split()
)
"""the files of a server's folder"""


@dataclass(frozen=True)
class Folder:
    """Where one server lives. It belongs to this server alone."""

    path: Path

    @property
    def unit(self) -> str:
        """The name of its systemd unit and tmux server: short enough for a socket's path, unique to this folder."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", str(self.path)).strip("-")[-30:]
        return f"hookmap-{readable}-{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:8]}"

    @property
    def venv(self) -> Path:
        """The environment with the dependencies."""
        return self.path / "venv"

    @property
    def releases(self) -> Path:
        """Folders of hookmap's code, each named by a digest of it."""
        return self.path / "releases"

    @property
    def launcher(self) -> Path:
        """The script that starts the server."""
        return self.path / "run.sh"

    @property
    def sessions(self) -> Path:
        """Where the server keeps recorded activations."""
        return self.path / "sessions"

    @property
    def pid_file(self) -> Path:
        """The launcher writes its process id there."""
        return self.path / "pid"

    @property
    def log(self) -> Path:
        """The output of the server that was started last."""
        return self.path / "server.log"

    @property
    def state(self) -> dict[str, Any]:
        """What was started last: port, model, runner, release, drain, version. {} before the first deployment."""
        try:
            return dict(json.loads((self.path / "server.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def write_state(self, **state: Any) -> None:
        """Remember what is being started."""
        (self.path / "server.json").write_text(json.dumps(state), encoding="utf-8")

    def key(self) -> str:
        """The server's bearer key. It is made once, readable by its owner alone."""
        file = self.path / "key"
        if not file.exists():
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
                new.write(secrets.token_urlsafe(24) + "\n")
        file.chmod(0o600)
        return file.read_text().strip()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other deployments out. Raises Failed where one is at work."""
        with open(self.path / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Failed(f"another `hookmap deploy` is at work in {self.path}: wait for it.") from None
            yield

    def refuse_other_files(self) -> None:
        """Raises Failed for a first deployment among files that are not a server's: --fresh would remove their venv."""
        if self.state:
            return
        there = sorted(each.name for each in self.path.iterdir() if not each.name.startswith("incoming."))
        if strange := [name for name in there if name not in OURS]:
            raise Failed(
                f"{self.path} is not empty and not a server's: it holds {', '.join(strange[:5])}. "
                "Nothing was changed. Name a folder of its own: --folder DIR"
            )

    def unpack(self, code: Path, version: str | None) -> Path:
        """Unpack hookmap's code into a release of its own: the code that runs is not touched."""
        digest = hashlib.sha256(code.read_bytes()).hexdigest()[:12]
        release = self.releases / digest
        if not release.exists():
            say(f"unpacking hookmap {version} ({digest})")
            unpacked = code.with_name("code")
            with zipfile.ZipFile(code) as archive:
                archive.extractall(unpacked)
            release.parent.mkdir(exist_ok=True)
            unpacked.rename(release)
        return release

    def keep_only(self, release: Path) -> None:
        """Remove the code of earlier deployments."""
        for other in self.releases.iterdir():
            if other != release:
                shutil.rmtree(other, ignore_errors=True)

    def write_launcher(self, python: str, release: Path, model: str, port: int, options: Sequence[str] = ()) -> None:
        """Write run.sh, by which every runner starts the server. The key is in no command line."""
        own = ["--host", "127.0.0.1", "--port", str(port), "--sessions", str(self.sessions)]
        command = [python, "-m", "hookmap.cli", "serve", model, *own, *options]
        settings = self.path / "hookmap.yaml"
        if not settings.exists():  # or the server would take one of a folder above
            settings.write_text("# Options of the server, as in docs/cli.md\n", encoding="utf-8")
        self.pid_file.unlink(missing_ok=True)
        if self.log.exists():
            self.log.replace(f"{self.log}.1")
        lines = [
            "#!/bin/sh",
            "# Starts the server of this folder. Written by `hookmap deploy`, anew each time.",
            f"cd {shlex.quote(str(self.path))} || exit 1",
            "umask 077",
            "set -a",
            "if [ -f env ]; then . ./env; fi",
            "HOOKMAP_KEY=$(cat key)",
            f"PYTHONPATH={shlex.quote(str(release))}",
            "set +a",
            "echo $$ > pid.new && mv pid.new pid",  # a reader never meets half of it
            f"exec {shlex.join(command)} >> server.log 2>&1",
        ]
        self.launcher.write_text("\n".join(lines) + "\n", encoding="utf-8")
