"""Whether vLLM's engine lives, where it is another process: vLLM 0.32 waits for ever for one that was killed."""

import threading
import weakref
from typing import Any

EVERY = 0.2
"""seconds between two looks"""


def wake_when_dead(core: Any) -> threading.Event:
    """Watch the client of an engine in another process; those who wait for it get EngineDeadError when it has died.

    The event that is returned ends the watch. An engine in this process has nothing to watch.
    """
    closed = threading.Event()
    if hasattr(core, "utility_results"):
        threading.Thread(
            target=_watch, args=(weakref.ref(core), closed), name="hookmap-vllm-alive", daemon=True
        ).start()
    return closed


def _watch(client: "weakref.ref[Any]", closed: threading.Event) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    while not closed.wait(EVERY):
        core = client()
        if core is None:
            return
        if core.resources.engine_dead:
            for waiting in list(core.utility_results.values()):
                if not waiting.done():
                    waiting.set_exception(EngineDeadError())
            core.outputs_queue.put_nowait(EngineDeadError())
            return
        del core
