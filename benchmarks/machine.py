"""One line that says where and with what a benchmark ran."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path


def describe() -> str:
    """Date, processor, cores and the versions that matter."""
    from hookmap import __version__  # of this checkout, and a peer's environment has none

    names = ("nnsight", "torch", "transformers")
    versions = ", ".join((f"hookmap {__version__}", *(f"{name} {version(name)}" for name in names)))
    return f"{date.today()}, {_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
