"""The processes of Ray's workers, and how a test does something to them in the middle of a run."""

from collections.abc import Callable
from typing import Any

import psutil


def workers() -> list[psutil.Process]:
    """The processes of this test's workers."""
    mine = {process.pid for process in psutil.Process().children(recursive=True)}
    running = psutil.process_iter(["name"])  # leaves out what ends while it looks
    return [each for each in running if each.pid in mine and (each.info["name"] or "").startswith("ray::_Actor")]


def once(act: Callable[[], None]) -> Callable[[Any], None]:
    """Called with each step of a run, acts at the first."""
    done: list[bool] = []

    def show(progress: Any) -> None:
        if not done:
            done.append(True)
            act()

    return show
