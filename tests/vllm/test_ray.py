"""vLLM in Ray's workers: the rows and tokens of one engine, whichever worker has a prompt, and whoever is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from support import own_functions
from support.on_vllm import POINTS, SCARCE, SETTINGS, Plain, held_against, prompts
from support.raises import raises
from support.ray_workers import once, workers
from support.vllm_edits import EDITS, asked

import hookmap
from hookmap.errors import CaptureError, InterventionError, SelectionError, TokenizerError
from hookmap.services.ray.model import shared_out

ray = pytest.importorskip("ray", reason='captures on Ray: pip install "hookmap[scale]"')

pytestmark = pytest.mark.slow

MANY = [*prompts(24, 9), *prompts(8, 30, seed=1)]
"""more than two workers run together, so that batches join those that run"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """With room for one worker more than `hm` has. Its workers import what the tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]), prepend=":")
        patch.delenv("VLLM_CPU_OMP_THREADS_BIND")  # workers set it themselves
        ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def hm(cluster: None, checkpoint: Path) -> Iterator[Any]:
    """Two workers with the little room that `on_vllm` has: chunks, preemptions and hits of the prefix cache."""
    settings = {**SETTINGS, **SCARCE, "functions": [own_functions.TURNED]}
    with hookmap.open_on_ray(checkpoint, workers=2, engine="vllm", eager=True, **settings) as opened:
        yield opened


def assert_same(found: Any, expected: Any) -> None:
    """The samples are alike, and their rows to the last bits: what shares a step with a prompt decides these."""
    assert list(found.samples) == list(expected.samples)
    assert found.keys == expected.keys
    for key in expected.keys:
        for sample in range(len(expected.samples)):
            torch.testing.assert_close(found.read(sample, *key), expected.read(sample, *key), rtol=1e-5, atol=1e-5)


def test_two_workers_give_the_rows_of_plain_hooks_and_the_folder_of_one_engine(
    hm: Any, on_vllm: Any, plain: Plain, tmp_path: Path
) -> None:
    seen: list[int] = []
    run = hm.capture(MANY, POINTS, max_new_tokens=6, store=tmp_path, progress=lambda p: seen.append(p.samples_done))
    held_against(plain, run)
    alone = on_vllm.capture(MANY, POINTS, max_new_tokens=6)
    assert_same(run, alone)
    assert run.manifest.settings == alone.manifest.settings and run.manifest.map == alone.manifest.map
    assert run.manifest.finished and run.store.verify() == []
    assert seen == sorted(seen) and seen[-1] == len(MANY) and len(seen) > 2
    assert run.manifest.runs[-1]["why"] == "2 workers with vLLM"
    assert_same(hm.capture(MANY, POINTS, max_new_tokens=6), alone)


def test_both_workers_run(hm: Any, tmp_path: Path) -> None:
    before = {each.pid: sum(each.cpu_times()[:2]) for each in workers()}
    hm.capture(MANY * 3, ["resid_post"], max_new_tokens=30, store=tmp_path)
    after = {each.pid: sum(each.cpu_times()[:2]) for each in workers()}
    took = [after[pid] - before[pid] for pid in before]
    assert len(took) == 2 and min(took) > 0.25 * max(took), took


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.3, "seed": 5, "num_return_sequences": 3},
        {"positions": "generated"},
        {"positions": "last", "every": 2},
        {"mean": True, "features": 5, "keep_dtype": "bfloat16"},
        {"max_new_tokens": 0},
        {"stop": "be"},
        {"points": {"resid_post": [0], "z": [1, 2]}},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_a_capture_are_those_of_one_engine(hm: Any, on_vllm: Any, options: dict[str, Any]) -> None:
    how: dict[str, Any] = {"points": ["resid_mid", "mlp_out"], "max_new_tokens": 6} | options
    found, expected = (each.capture(MANY[:10], **how) for each in (hm, on_vllm))
    assert_same(found, expected)
    assert found.manifest.settings == expected.manifest.settings
    assert len(found.samples) == 10 * options.get("num_return_sequences", 1)


def test_a_seed_gives_the_same_tokens_again_and_another_one_others(hm: Any) -> None:
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.3}
    first, again, other = (hm.generate(MANY, seed=seed, **how).tokens for seed in (5, 5, 6))
    assert first == again != other


def test_edits_are_those_of_the_hooks_engine(hm: Any, checkpoint: Path) -> None:
    own = hookmap.open(checkpoint, dtype="float32", check=False)
    kept = {"points": ["resid_mid", "resid_post"]}
    free = own.generate(asked(), (), kept, max_new_tokens=6, batch_size=1)
    turned = hookmap.apply(own_functions.turned, "mlp_out", layers=[1])
    for name, edits in {**EDITS, "a function": [turned]}.items():
        expected = own.generate(asked(), edits, kept, max_new_tokens=6, batch_size=1)
        found = hm.generate(asked(), edits, kept, max_new_tokens=6)
        assert found.tokens == expected.tokens, name
        for key in expected.keys:
            for sample in range(len(asked())):
                rows = found.read(sample, *key)
                torch.testing.assert_close(rows, expected.read(sample, *key), rtol=1e-4, atol=1e-4, msg=name)
        assert any(
            not torch.equal(expected.read(sample, *key), free.read(sample, *key))
            for key in expected.keys for sample in range(len(asked()))
        ), name  # fmt: skip


def test_statistics_are_those_of_one_engine(hm: Any, on_vllm: Any) -> None:
    found, expected = (each.reduce(MANY, ["resid_post"], [1], reductions=["mean", "max"]) for each in (hm, on_vllm))
    assert found.complete and len(found.samples) == len(MANY)
    for name in ("mean", "max"):
        torch.testing.assert_close(found["resid_post", 1][name], expected["resid_post", 1][name])


def test_what_vllm_or_ray_does_not_serve_is_refused_before_anything_runs(
    hm: Any, checkpoint: Path, tmp_path: Path
) -> None:
    ask: dict[str, Any] = {"points": ["resid_post"], "max_new_tokens": 2, "store": tmp_path / "run"}
    for options, kind, text in (
        ({"before": True}, InterventionError, "before"),
        ({"use_cache": False}, CaptureError, "use_cache"),
        ({"engine": "hooks"}, CaptureError, "runs on vLLM"),
        ({"points": ["pattern"]}, SelectionError, "pattern"),
        ({"no_repeat_ngram_size": 2}, CaptureError, "no_repeat_ngram_size"),
        ({"prompts": [[10**6]]}, TokenizerError, "vocabulary"),
        ({"interventions": [hookmap.apply(own_functions.broken, "mlp_out")]}, InterventionError,
         r'functions=\["support.own_functions:broken"\]'),
        ({"interventions": [hookmap.apply(lambda rows, at: rows, "mlp_out")]}, InterventionError, "would have to be"),
        ({"interventions": [hookmap.watch(own_functions.TURNED, "mlp_out")]}, InterventionError, "hookmap.watch"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            hm.capture(**{"prompts": [[1, 2]], **ask, **options})
        assert not (tmp_path / "run").exists()
    for options, text in (
        ({"map": "LlamaForCausalLM"}, "map"),
        ({"shared": True}, "shared"),
        ({"data_parallel_size": 2}, "data_parallel_size"),
        ({"engine": "sglang"}, "sglang"),
    ):
        with raises(CaptureError, text):
            hookmap.open_on_ray(checkpoint, **{"engine": "vllm", **options})


def test_a_killed_worker_is_replaced_and_its_batches_run_again(hm: Any, plain: Plain, tmp_path: Path) -> None:
    asked = MANY * 3
    killed = once(lambda: workers()[0].kill())
    run = hm.capture(asked, POINTS, max_new_tokens=12, store=tmp_path / "run", progress=killed)
    assert len(run.manifest.runs[-1]["lost"]) == 1 and run.store.verify() == []
    assert [sample.sample for sample in run.samples] == list(range(len(asked)))
    held_against(plain, run)


def test_a_failed_prompt_fails_the_run_and_leaves_the_workers_running(hm: Any, plain: Plain, tmp_path: Path) -> None:
    too_long = [*MANY, prompts(1, 97)[0]]
    with pytest.raises(CaptureError, match="prompt 32"):
        hm.capture(too_long, POINTS, max_new_tokens=6, store=tmp_path / "run")
    held_against(plain, hm.capture(MANY[:4], POINTS, max_new_tokens=6))


DRIVER = """
import sys, hookmap
from support.on_vllm import POINTS, SCARCE, SETTINGS, prompts
with hookmap.open_on_ray(sys.argv[1], workers=1, engine="vllm", eager=True, **SETTINGS, **SCARCE) as hm:
    hm.capture(prompts(200, 9), POINTS, max_new_tokens=12, store=sys.argv[2])
"""


def test_a_killed_driver_leaves_what_was_finished_and_others_go_on(
    hm: Any, on_vllm: Any, checkpoint: Path, plain: Plain, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    log = tmp_path / "log"
    with log.open("w") as said:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(checkpoint), str(folder)], cwd=Path(__file__).parent.parent,
            stdout=subprocess.DEVNULL, stderr=said, start_new_session=True,
        )  # fmt: skip
    started = psutil.Process(driver.pid)
    below: list[psutil.Process] = []
    try:
        until = time.monotonic() + 240
        while not (folder / "samples.jsonl").exists() or (folder / "samples.jsonl").read_text().count("\n") < 12:
            assert driver.poll() is None and time.monotonic() < until, log.read_text(errors="replace")[-3000:]
            time.sleep(0.02)
        below = started.children(recursive=True)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        for each in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    half = hookmap.open_store(folder)
    assert not half.manifest.finished and 12 <= len(half) < 200
    held_against(plain, half)
    seen: list[int] = []

    def stop(progress: Any) -> None:
        seen.append(progress.samples_done)
        raise KeyboardInterrupt

    how: dict[str, Any] = {"max_new_tokens": 12, "store": folder, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        hm.capture(prompts(200, 9), POINTS, progress=stop, **how)
    assert len(half) < seen[0] == len(hookmap.open_store(folder)) < 200
    run = on_vllm.capture(prompts(200, 9), POINTS, **how)
    assert len(run.samples) == 200
    assert [each for each in run.store.verify() if "left over" not in str(each)] == []  # of batches that hm left
    held_against(plain, run)


def test_a_dead_engine_in_a_process_of_its_own_is_replaced(
    cluster: None, checkpoint: Path, plain: Plain, tmp_path: Path
) -> None:
    bound: list[set[int]] = []

    def kill_engine() -> None:
        below = psutil.Process().children(recursive=True)
        of_vllm = {name: each for each in below if (name := "".join(each.cmdline())).startswith("VLLM::")}
        for thread in [int(each) for process in of_vllm.values() for each in os.listdir(f"/proc/{process.pid}/task")]:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                if (cores := os.sched_getaffinity(thread)) != os.sched_getaffinity(0):
                    bound.append(cores)
        of_vllm["VLLM::EngineCore"].kill()

    settings = {**SETTINGS, "processes": True, "max_num_seqs": 4}
    asked = prompts(200, 9)
    with hookmap.open_on_ray(checkpoint, engine="vllm", eager=True, **settings) as own:
        run = own.capture(asked, POINTS, max_new_tokens=20, store=tmp_path / "run", progress=once(kill_engine))
    assert bound == []  # the threads of another worker's engine would be bound to the same cores
    assert len(run.manifest.runs[-1]["lost"]) == 1 and run.store.verify() == []
    assert [sample.sample for sample in run.samples] == list(range(len(asked)))
    held_against(plain, run)


def test_the_command_line_gives_workers_vllm(cluster: None, checkpoint: Path, plain: Plain, tmp_path: Path) -> None:
    from hookmap.cli.main import main

    made = CliRunner().invoke(
        main,
        ["capture", str(checkpoint), "--engine", "vllm", "--workers", "1", "--eager", "--vllm", "max_model_len=64",
         "--points", "resid_post@2,mlp_out@0", "--dtype", "float32", "--prompt", "to be or not",
         "--max-new-tokens", "4", "-o", str(tmp_path / "run")],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "engine: ray (1 worker with vLLM)" in made.stderr and made.stdout == f"{tmp_path / 'run'}\n"
    store = hookmap.open_store(tmp_path / "run")
    assert store.keys == (("mlp_out", 0), ("resid_post", 2)) and store.manifest.settings["engine"] == "vllm"
    [sample] = store.samples
    assert sample.token_ids == plain.generated(list(sample.token_ids[: sample.prompt_tokens]), 4)


@pytest.mark.parametrize(
    ("numbers", "workers", "in_flight", "sizes"),
    [(0, 2, 256, []), (3, 2, 256, [1] * 3), (64, 2, 256, [4] * 16), (10_000, 8, 256, [64] * 156 + [16])],
)
def test_prompts_are_shared_out_so_that_each_worker_is_full(
    numbers: int, workers: int, in_flight: int, sizes: list[int]
) -> None:
    found = shared_out(range(numbers), workers, in_flight)
    assert [len(batch) for batch in found] == sizes
    assert [number for batch in found for number in batch] == list(range(numbers))
