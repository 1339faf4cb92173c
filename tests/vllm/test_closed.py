"""A model that does not run any more says so, and says why."""

import json
import os
import signal
import threading
from multiprocessing import active_children
from pathlib import Path

import pytest
from support.on_vllm import SETTINGS

import hookmap
from hookmap.errors import CaptureError, SelectionError
from hookmap.services.server.models import Models
from hookmap.services.server.run import load_first
from hookmap.services.server.settings import Settings


def test_a_model_that_was_closed_is_refused_and_so_are_those_that_vllm_ends_with_it(checkpoint: Path) -> None:
    first, second = (hookmap.open_on_vllm(checkpoint, eager=True, **SETTINGS) for _ in range(2))
    assert [model.capture([[1, 2]], "resid_post", max_new_tokens=1).texts for model in (first, second)]
    second.close()
    second.close()
    with pytest.raises(CaptureError, match=r"it was closed\. Open it again"):
        second.capture([[1, 2]], "resid_post", max_new_tokens=1)
    with pytest.raises(CaptureError, match=r"vLLM ended it with another one in this process\. Open it again"):
        first.capture([[1, 2]], "resid_post", max_new_tokens=1)


@pytest.mark.parametrize("shared", [False, True])
def test_a_worker_that_is_killed_while_it_is_asked_is_an_engine_that_has_died(checkpoint: Path, shared: bool) -> None:
    """vLLM itself says only that this one call was cancelled."""
    how = {"processes": True, "shared": shared, "distributed_executor_backend": "mp"}
    with hookmap.open_on_vllm(checkpoint, eager=True, **how, **SETTINGS) as model:
        engine = model.engine_of_vllm
        worker = json.loads(engine.call("hookmap_describe"))["process"]
        os.kill(worker, signal.SIGSTOP)  # it takes no answer any more: the call waits for one
        kill = threading.Timer(1, os.kill, (worker, signal.SIGKILL))
        kill.start()
        for _ in range(2):
            with pytest.raises(CaptureError, match="vLLM's engine has died"):
                engine.call("hookmap_describe")
        kill.join()


def test_a_server_that_does_not_start_ends_its_engine(checkpoint: Path, tmp_path: Path) -> None:
    settings = Settings(tmp_path, engine="vllm", points=("pattern",), loads={"eager": True, **SETTINGS})
    with pytest.raises(SelectionError, match="have no pattern"):
        load_first(Models(settings), str(checkpoint), settings, None)
    for each in active_children():
        each.join(60)
        assert not each.is_alive()
