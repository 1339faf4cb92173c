"""Asks one program for many models: `PYTHON worker.py PROGRAM CHECKPOINTS ANSWERS TYPES`, in its own environment.

Imports the program once. Each model then has a process of its own, with a limit of processor time and of memory:
whatever it does, the next one is asked.
"""

import contextlib
import importlib
import json
import logging
import os
import resource
import signal
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from askers import PACKAGES, PROGRAMS, Asked, Said, in_a_line

SECONDS = 240
"""of processor time: the machine may be busy"""
PATIENCE = 20
"""times as long by the clock, for what waits and computes nothing"""
MODULES = "modules.list"
MEMORY = 10 * 2**30


def main(program: str, checkpoints: Path, answers: Path, types: list[str]) -> None:
    warnings.simplefilter("ignore")
    importlib.import_module(PACKAGES[program])
    importlib.import_module("transformers")
    (answers / "versions.json").write_text(json.dumps(versions(program)), encoding="utf-8")
    for model_type in types:
        if (answers / f"{model_type}.json").exists():
            continue
        begun, child = time.monotonic(), os.fork()
        if child == 0:
            try:
                ask(program, checkpoints / model_type, answers / model_type)
            finally:
                os._exit(0)
        ended = wait(child, begun + PATIENCE * SECONDS)
        if not (answers / f"{model_type}.json").exists():
            late = ended is None or os.WTERMSIG(ended) == signal.SIGXCPU
            why = f"not done after {SECONDS} s of processor time" if late else f"its process ended with status {ended}"
            Said(failed={"load": why}).save(answers / model_type)
        import_like(answers / MODULES)
        print(program, model_type, f"{time.monotonic() - begun:.1f} s", flush=True)


def versions(program: str) -> str:
    """Of the program, where it is another than this checkout, and of transformers."""
    return f"{version(program)} (transformers {version('transformers')})"


def ask(program: str, checkpoint: Path, answer: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    said = Said()
    try:
        PROGRAMS[program](checkpoint, Asked.load(checkpoint), said)
    except BaseException as error:  # whatever a program raises is its answer
        said.failed["load"] = in_a_line(error)  # type: ignore[arg-type]
    said.save(answer)
    (answer.parent / MODULES).write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")


def import_like(file: Path) -> None:
    """What the process of a model had to import, so that the next ones need not."""
    names = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for name in names:
        if name not in sys.modules and "." in name and not name.startswith("torchlens"):
            with contextlib.suppress(BaseException):
                importlib.import_module(name)


def wait(child: int, until: float) -> int | None:
    """Its status; None where it is not done in time, and is ended."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
