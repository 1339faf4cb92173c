"""Engines of vLLM in this process. They share vLLM's process groups, which end with the last of them.

vLLM 0.32 ends the groups with any of them, also when one that nobody holds any more is collected as garbage, while
another one runs or is being opened.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_HERE: list[object] = []
"""the cores of the engines that run here, and a mark for each that is being opened"""


@contextmanager
def opening() -> Iterator[None]:
    """Inside, an engine is opened here."""
    _HERE.append(mark := object())
    try:
        yield
    finally:
        _HERE.remove(mark)


def share_groups(client: Any) -> None:
    """Let the engine end without the others, by `end` or as garbage. `client`: vLLM's, of an engine just opened."""
    if runs_here(client):
        client._finalizer.detach()
        _HERE.append(client.engine_core)
        client._finalizer = weakref.finalize(client, _end, client.engine_core)


def runs_here(client: Any) -> bool:
    """Whether the engine is in this process."""
    return hasattr(client, "engine_core")


def end(client: Any) -> None:
    """End an engine, wherever it runs. A second time does nothing."""
    client._finalizer() if runs_here(client) else client.shutdown()


def _end(core: Any) -> None:
    _HERE.remove(core)
    if not _HERE:
        core.shutdown()
        return
    core.structured_output_manager.clear_backend()  # what `shutdown` does before it ends the groups
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
