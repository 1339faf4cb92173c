"""Runs other programs on the host, reports progress, and fails with a message."""

import subprocess
import sys
from collections.abc import Mapping, Sequence


class Failed(Exception):
    """Ends the program: the user sees this message in place of a result."""


def say(text: str) -> None:
    """Show a line of progress: stderr reaches the person, stdout carries the result."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output. Its exit code is 127 where there is no such program."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def step(command: Sequence[str], wrong: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a command that must succeed. Raises Failed with `wrong` and the end of its output."""
    done = run(command, environment)
    if done.returncode:
        raise Failed(f"{wrong}:\n{(done.stderr.strip() or done.stdout.strip())[-1500:]}")
