"""One ssh connection carries everything: a tar on stdin, progress on stderr, the result as JSON on stdout."""

import contextlib
import io
import json
import shlex
import subprocess
import tarfile
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import IO, Any

from hookmap.errors import DeployError
from hookmap.services.deploy.bundle import program

_NO_SSH = 255
_REASONS = {
    41: "there is no {python} on its PATH: install Python 3.11 or later, or name one: --python PATH",
    42: "there is no tar on its PATH: install it",
    43: "{python} is older than Python 3.11: name a newer one: --python PATH",
}
"""exit codes of enter.sh"""
PROGRAM = "on_host.pyz"
"""its name for enter.sh"""


def ssh_command(ssh: Sequence[str], host: str, folder: str, python: str | None) -> list[str]:
    """The command to run here: ssh, with one quoted line for the host's shell."""
    enter = (files("hookmap.services.deploy") / "enter.sh").read_text(encoding="utf-8")
    return [
        *ssh,
        "-T",
        "-o",
        "ServerAliveInterval=15",
        host,
        shlex.join(["sh", "-c", enter, "sh", folder, python or ""]),
    ]


def packed(content: Mapping[str, bytes]) -> bytes:
    """A tar of these files, by name, with the program that runs on the host."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, data in {**content, PROGRAM: program()}.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o600
            tar.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def call(command: Sequence[str], sent: bytes, host: str, python: str | None, tell: Callable[[str], None]) -> Any:
    """Run the command and return the host's answer. `tell` gets each line of progress. Raises DeployError."""
    told: list[str] = []

    def listen(lines: IO[bytes]) -> None:
        for line in lines:
            told.append(line.decode(errors="replace").rstrip())
            tell(told[-1])

    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    except OSError as error:
        what = f"cannot run {command[0]}: {error.strerror}"
        raise DeployError(f"{what}. Install OpenSSH's client, or say how it is typed: --ssh COMMAND") from error
    with process:
        assert process.stdin and process.stdout and process.stderr
        listener = threading.Thread(target=listen, args=(process.stderr,), daemon=True)
        listener.start()
        with contextlib.suppress(BrokenPipeError):  # the exit code says why
            process.stdin.write(sent)
            process.stdin.close()
        answer = process.stdout.read().decode(errors="replace")
        code = process.wait()
        listener.join()
    if code < 0 or code == _NO_SSH:
        raise DeployError(
            f"no connection to {host}, or it was lost; ssh's own words are above. A server that was started there "
            f"lives on: see it with --status.\nTry the connection by hand: {shlex.join([*command[:-1], 'true'])}"
        )
    return _result(code, answer, told, host, python)


def _result(code: int, answer: str, told: Sequence[str], host: str, python: str | None) -> Any:
    if code in _REASONS:
        raise DeployError(f"{host}: {_REASONS[code].format(python=python or 'python3')}.")
    try:
        found = json.loads(answer.strip().splitlines()[-1])  # a login shell may print lines of its own before
        error = found.get("error")
    except (IndexError, ValueError, AttributeError):
        said = "\n".join(told[-5:])
        raise DeployError(f"{host}: the program there ended with code {code} and no answer:\n{said}") from None
    if error is not None:
        raise DeployError(f"{host}: {error}")
    return found
