"""The interpreter that runs the server, and the dependencies in it: a venv of the folder, filled by pip."""

import hashlib
import platform
import re
import shutil
import sys
from pathlib import Path

from hookmap.services.deploy.on_host.commands import Failed, run, say, step
from hookmap.services.deploy.on_host.request import Request

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
REQUIREMENTS, LOCK = "requirements.txt", "lock.txt"


def install(venv: Path, sent: Path, request: Request) -> str:
    """The interpreter with the dependencies: this one (--python), or that of the venv, made or updated where needed.

    `sent`: the folder of the requirements and the lock. Raises Failed.
    """
    if request.python:
        say(f"dependencies: those of {sys.executable}, as they are")
        return sys.executable
    python, ready = venv / "bin" / "python", venv / ".ready"
    if request.sync == "skip":
        if not python.exists():
            raise Failed(f"--sync skip, and {venv} is not there yet: deploy once without it.")
        say("dependencies: left as they are")
        return str(python)
    torch = request.torch or torch_requirement((sent / LOCK).read_text(encoding="utf-8"))
    wanted = _digest(sent, torch)
    if ready.exists() and ready.read_text() == wanted:
        say("dependencies: as locked already")
        return str(python)
    ready.unlink(missing_ok=True)
    if not python.exists():
        _make_venv(venv)
    _pip_install(_pip_of(python), torch, sent)
    ready.write_text(wanted)
    return str(python)


def torch_requirement(lock: str) -> str:
    """The locked PyTorch; without CUDA's libraries, which are several GB, on Linux without an NVIDIA GPU."""
    locked = re.search(r"^torch==([^\s+;]+)", lock, re.MULTILINE)
    assert locked is not None  # the sender has checked it
    cpu = platform.system() == "Linux" and not _has_nvidia_gpu()
    return f"torch=={locked[1]}{'+cpu' if cpu else ''}"


def _digest(sent: Path, torch: str) -> str:
    """A digest of everything that decides what is installed."""
    parts = [(sent / name).read_text(encoding="utf-8") for name in (REQUIREMENTS, LOCK)]
    return hashlib.sha256("\n".join([*parts, torch]).encode()).hexdigest()


def _make_venv(venv: Path) -> None:
    say(f"making {venv} with Python {platform.python_version()}")
    bare = [] if _has_module("ensurepip") else ["--without-pip"]
    step([sys.executable, "-m", "venv", *bare, str(venv)], "cannot make an environment")


def _pip_of(python: Path) -> list[str]:
    """The command of a pip that installs for this interpreter: its own, or this one's."""
    own = [str(python), "-m", "pip"]
    if run([*own, "--version"]).returncode == 0:
        return own
    if not _has_module("pip"):
        raise Failed("this host's Python has neither ensurepip nor pip: sudo apt install python3-venv")
    return [sys.executable, "-m", "pip", "--python", str(python)]


def _pip_install(pip: list[str], torch: str, sent: Path) -> None:
    say(f"installing {torch}")
    # With few retries, and torch's dependencies later from PyPI: where this index cannot be reached, pip goes on with
    # the other places that it is configured for.
    cpu = ["--no-deps", "--extra-index-url", CPU_INDEX, "--retries", "1", "--timeout", "20"] if "+" in torch else []
    step([*pip, "install", "-q", torch, *cpu], f"pip cannot install {torch}; another: --torch REQUIREMENT")
    say("installing what hookmap needs, in the locked versions (a minute or two)")
    files = ["-r", str(sent / REQUIREMENTS), "-c", str(sent / LOCK)]
    step([*pip, "install", "-q", *files], "pip cannot install the locked versions; other ones: --lock FILE")


def _has_nvidia_gpu() -> bool:
    """Whether nvidia-smi is there and lists a GPU."""
    return shutil.which("nvidia-smi") is not None and "GPU" in run(["nvidia-smi", "--list-gpus"]).stdout


def _has_module(name: str) -> bool:
    return run([sys.executable, "-c", f"import {name}"]).returncode == 0
