"""A model that does not run any more says so, and says why."""

import json
import os
import signal
import threading
from multiprocessing import active_children
from pathlib import Path

import pytest
from support.on_vllm import POINTS, SETTINGS, Plain, held_against, prompts
from vllm.distributed.parallel_state import get_pp_group

import hookmap
from hookmap.errors import CaptureError, SelectionError
from hookmap.services.server.models import Models
from hookmap.services.server.run import load_first
from hookmap.services.server.settings import Settings
from hookmap.vllm.in_process import opening


def test_a_model_that_was_closed_is_refused_and_others_in_this_process_run_on(checkpoint: Path, plain: Plain) -> None:
    asked, how = prompts(3, 9), {"eager": True, "processes": False, **SETTINGS}
    first, second = (hookmap.open_on_vllm(checkpoint, **how) for _ in range(2))
    second.close()
    second.close()
    with pytest.raises(CaptureError, match=r"it was closed\. Open it again"):
        second.capture(asked, "resid_post", max_new_tokens=1)
    held_against(plain, first.capture(asked, POINTS, max_new_tokens=4))
    with opening():  # the loader collects garbage: models that nobody holds end then, as if they were closed
        first.close()
        assert get_pp_group().is_first_rank


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
