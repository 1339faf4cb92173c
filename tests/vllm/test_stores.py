"""Captures on vLLM in folders: the same format, resumed where they were interrupted, and safe against a kill."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.on_vllm import POINTS, Plain, held_against, prompts

import hookmap
from hookmap.errors import StoreError


def test_a_folder_holds_what_memory_does(on_vllm: Any, tmp_path: Path) -> None:
    asked = prompts(5, 9)
    held = on_vllm.capture(asked, ["resid_post"], max_new_tokens=4)
    run = on_vllm.capture(asked, ["resid_post"], max_new_tokens=4, store=tmp_path / "run")
    again = hookmap.open_store(tmp_path / "run")
    assert again.manifest.finished and again.manifest.settings["engine"] == "vllm"
    assert again.manifest.settings["weights"]["sha256"] == on_vllm.engine_of_vllm.weights["sha256"]
    assert again.tokens == held.tokens == run.tokens
    for sample in range(5):
        torch.testing.assert_close(again.read(sample, "resid_post", 2), held.read(sample, "resid_post", 2))


def test_an_interrupted_capture_goes_on(on_vllm: Any, plain: Plain, tmp_path: Path) -> None:
    asked, done = prompts(20, 9), 0

    class Interrupted(Exception):
        pass

    def stop(progress: Any) -> None:
        nonlocal done
        done = progress.samples_done
        if done >= 6:
            raise Interrupted

    from hookmap.vllm import run as module

    held, module.HELD_BYTES = module.HELD_BYTES, 1
    try:
        with pytest.raises(Interrupted):
            on_vllm.capture(asked, POINTS, max_new_tokens=4, store=tmp_path / "run", progress=stop)
    finally:
        module.HELD_BYTES = held
    half = hookmap.open_store(tmp_path / "run")
    assert not half.manifest.finished and 6 <= len(half) < 20
    seen: list[int] = []
    run = on_vllm.capture(
        asked, POINTS, max_new_tokens=4, store=tmp_path / "run", resume=True,
        progress=lambda progress: seen.append(progress.samples_done),
    )  # fmt: skip
    assert seen[0] == len(half) and len(run) == 20
    held_against(plain, run)
    with pytest.raises(StoreError, match="cannot be resumed"):
        on_vllm.capture(asked, POINTS, max_new_tokens=5, store=tmp_path / "run", resume=True)


CLIENT = """
import sys
import hookmap
from support.on_vllm import POINTS, SETTINGS, prompts
from hookmap.vllm import run

run.HELD_BYTES = 1
folder, store, executor = sys.argv[1:]
how = {"processes": True, "distributed_executor_backend": executor}
with hookmap.open_on_vllm(folder, eager=True, max_num_seqs=4, **how, **SETTINGS) as model:
    model.capture(prompts(400, 9), POINTS, max_new_tokens=8, store=store)
"""
WHOM = {"engine": b"EngineCore", "worker": b"Worker"}
"""what vLLM calls these processes"""


def children(process: int) -> list[int]:
    """The processes that it started, and theirs."""
    found = [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return [*found, *(each for child in found for each in children(child))]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["worker", "engine", "client"])
def test_a_kill_loses_nothing_that_is_finished(checkpoint: Path, plain: Plain, tmp_path: Path, whom: str) -> None:
    folder, tests = tmp_path / "run", Path(__file__).parent.parent
    log = tmp_path / "log"  # a pipe would be full of vLLM's words, and who writes to it would wait for ever
    with log.open("w") as said:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(checkpoint), str(folder), "mp" if whom == "worker" else "uni"],
            cwd=tests, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True,
        )  # fmt: skip
    workers: list[int] = []
    try:
        until = time.monotonic() + 300
        while not (folder / "samples.jsonl").exists() or (folder / "samples.jsonl").read_text().count("\n") < 12:
            assert client.poll() is None and time.monotonic() < until, log.read_text(errors="replace")[-3000:]
            time.sleep(0.02)
        workers = children(client.pid)
        named = [each for each in workers if WHOM.get(whom, b"?") in Path(f"/proc/{each}/cmdline").read_bytes()]
        os.kill(client.pid if whom == "client" else named[0], signal.SIGKILL)
        client.wait(timeout=120)
    finally:
        for each in [client.pid, *workers]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
    if whom != "client":
        assert "vLLM's engine has died" in log.read_text(errors="replace")
    half = hookmap.open_store(folder)
    assert not half.manifest.finished and 12 <= len(half) < 400
    assert list(half.verify()) == []
    held_against(plain, half)


def test_the_command_line_captures_on_vllm(checkpoint: Path, plain: Plain, tmp_path: Path) -> None:
    from hookmap.cli.main import main

    made = CliRunner().invoke(
        main,
        ["capture", str(checkpoint), "--engine", "vllm", "--eager", "--points", "resid_post@2,mlp_out@0", "--dtype",
         "float32", "--prompt", "to be or not", "--max-new-tokens", "4", "-o", str(tmp_path / "run")],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    store = hookmap.open_store(tmp_path / "run")
    assert store.keys == (("mlp_out", 0), ("resid_post", 2))
    [sample] = store.samples
    assert sample.token_ids == plain.generated(list(sample.token_ids[: sample.prompt_tokens]), 4)
    wrong = CliRunner().invoke(
        main, ["capture", str(checkpoint), "--eager", "--points", "resid_post", "--prompt", "to"]
    )
    assert wrong.exit_code == 2 and "--eager needs --engine vllm" in wrong.output


def test_the_command_line_sums_up_on_vllm(checkpoint: Path, plain: Plain) -> None:
    from hookmap.cli.main import main

    made = CliRunner().invoke(
        main,
        ["stats", str(checkpoint), "--engine", "vllm", "--eager", "--points", "resid_post", "--layers", "1", "--dtype",
         "float32", "--prompt", "to be or not", "--reductions", "mean", "--by", "position", "--json"],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    [ids] = [prompt.token_ids for prompt in hookmap.open(checkpoint, check=False).encode("to be or not")]
    [tensor] = json.loads(made.stdout)["tensors"]
    rows = plain.rows(ids)["resid_post", 1]
    for position, group in enumerate(tensor["by"]["position"]):
        torch.testing.assert_close(torch.tensor(group["mean"]), rows[position], rtol=1e-4, atol=1e-4)
    assert len(tensor["by"]["position"]) == len(ids) > 2
