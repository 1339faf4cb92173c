"""Captures on Ray: the same bytes as on one machine, each sample once, whoever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.raises import raises
from support.ray_workers import once, workers

import hookmap
from hookmap.demo import DICTIONARY_PATH, MODEL_PATH
from hookmap.errors import (
    CaptureError,
    InterventionError,
    MapNotFoundError,
    ModelError,
    SelectionError,
    StoreError,
)
from hookmap.services.ray.pool import check_listens
from hookmap.services.ray.worker import RunningCapture, Worker
from hookmap.stores import open_store
from hookmap.stores.folder import FolderWriter
from hookmap.stores.group_writer import Group

ray = pytest.importorskip("ray", reason='captures on Ray: pip install "hookmap[scale]"')

pytestmark = pytest.mark.slow

PROMPTS = [f"Tom has {number} apples. He buys 4 more. How many apples does Tom have?" for number in range(12)]
CHOSEN: dict[str, Any] = {"points": ["resid_mid", "resid_pre"], "layers": [8], "max_new_tokens": 12, "batch_size": 2}
SAMPLED = CHOSEN | {"do_sample": True, "temperature": 2.0, "seed": 3}


@pytest.fixture(scope="module")
def alone() -> hookmap.Capture:
    """What one machine makes of it."""
    return hookmap.open(MODEL_PATH).capture(PROMPTS, **SAMPLED)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """With room for one worker more than `hm` has."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def hm(cluster: None) -> Iterator[Any]:
    with hookmap.open_on_ray(MODEL_PATH, workers=2) as opened:
        yield opened


def assert_same(found: Any, expected: Any) -> None:
    """Each sample once, and each of its bytes."""
    assert [sample.sample for sample in found.samples] == list(range(len(expected.samples)))
    for one, other in zip(found.samples, expected.samples, strict=True):
        assert one == other
        for point, layer in expected.keys:
            assert torch.equal(found.read(one.sample, point, layer), expected.read(one.sample, point, layer))


def assert_nothing_torn(folder: Path, shards: int) -> None:
    """By the safetensors package's own reader, and by the names of the files."""
    from safetensors.torch import load_file

    names = sorted(file.name for file in (folder / "shards").iterdir())
    assert names == [f"{number:06d}.safetensors" for number in range(shards)]
    for name in names:
        load_file(folder / "shards" / name)
    assert json.loads((folder / "manifest.json").read_text())["finished"] is True


def test_two_workers_make_what_one_machine_makes(hm: Any, alone: hookmap.Capture, tmp_path: Path) -> None:
    seen: list[int] = []
    run = hm.capture(PROMPTS, **SAMPLED, store=tmp_path / "run", progress=lambda p: seen.append(p.samples_done))
    assert_same(run, alone)
    assert seen == [2, 4, 6, 8, 10, 12]
    assert_nothing_torn(tmp_path / "run", 6)
    assert run.manifest.settings == alone.manifest.settings
    assert run.manifest.map == alone.manifest.map
    assert [s.forward_index for s in run.selectors] == [s.forward_index for s in alone.selectors]


def test_without_a_folder_it_comes_back_in_memory(hm: Any, alone: hookmap.Capture) -> None:
    assert_same(hm.capture(PROMPTS[:4], **SAMPLED), hookmap.open(MODEL_PATH).capture(PROMPTS[:4], **SAMPLED))


def test_interventions_and_harvests_run_on_workers_too(hm: Any) -> None:
    steer = {"do": "ablate", "point": "mlp_out", "layers": [3], "to": "zero"}
    one = hookmap.open(MODEL_PATH)
    plain, ablated = (one.capture(PROMPTS[:4], **CHOSEN, interventions=each) for each in ([], [steer]))
    assert not torch.equal(plain.read(0, "resid_mid", 8), ablated.read(0, "resid_mid", 8))
    assert_same(hm.capture(PROMPTS[:4], **CHOSEN, interventions=[steer]), ablated)
    harvest = CHOSEN | {"max_new_tokens": 0}
    assert_same(hm.capture(PROMPTS[:4], **harvest), one.capture(PROMPTS[:4], **harvest))


def test_two_workers_sum_up_what_one_machine_sums_up(hm: Any, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "reductions": ["mean", "kurtosis", "covariance", "max"],
        "by": ["sink", "token"],
        "batch_size": 1,
    }
    seen: list[int] = []
    found = hm.reduce(
        PROMPTS, "resid_post", [8], **how, store=tmp_path / "s", progress=lambda p: seen.append(p.samples_done)
    )
    alone = hookmap.open(MODEL_PATH).reduce(PROMPTS, "resid_post", [8], **how)
    assert found.complete and len(found.samples) == len(PROMPTS) and seen[-1] == len(PROMPTS) and len(seen) > 1
    one, other = found["resid_post", 8], alone["resid_post", 8]
    for name in other.names:
        torch.testing.assert_close(one[name], other[name])
        tables = [each.by("token") for each in (one, other)]
        assert tables[0].groups == tables[1].groups
        torch.testing.assert_close(tables[0][name], tables[1][name], equal_nan=True)
    assert hookmap.open_statistics(tmp_path / "s").complete
    with pytest.raises(SelectionError, match="no position"):
        hm.reduce(PROMPTS, "resid_post", [8], by="position", mean=True)


def test_workers_read_and_sum_up_features_of_dictionaries(hm: Any, tmp_path: Path) -> None:
    sae, one = hookmap.load_dictionary(DICTIONARY_PATH), hookmap.open(MODEL_PATH)
    how: dict[str, Any] = {"max_new_tokens": 0, "dictionaries": [sae], "batch_size": 2}
    run, alone = (each.capture(PROMPTS, ["features", "resid_post"], [8], **how) for each in (hm, one))
    assert run.keys == alone.keys and run.manifest.settings["dictionaries"] == alone.manifest.settings["dictionaries"]
    folder = hm.capture(PROMPTS, "features", store=tmp_path / "run", **how)
    assert folder.selectors == () and folder.store.verify() == []
    for number in range(len(PROMPTS)):
        expected = alone.read(number, "features", 8).to_dense()
        assert torch.equal(run.read(number, "features", 8).to_dense(), expected)
        assert torch.equal(folder.read(number, "features", 8).to_dense(), expected)
    sums = [each.reduce(PROMPTS, "features", reductions=["mean", "max"], **how)["features", 8] for each in (hm, one)]
    for name in ("mean", "max"):
        torch.testing.assert_close(sums[0][name], sums[1][name])


def test_an_error_of_a_worker_is_the_error_that_one_machine_raises(hm: Any, tmp_path: Path) -> None:
    for options, kind, text in (
        ({"points": ["resid_mdi"]}, SelectionError, "resid_mid"),
        ({"points": ["resid_mid"], "layers": [99]}, SelectionError, "0 to 19"),
        ({"points": ["resid_mid"], "batch_size": 0}, CaptureError, "batch_size"),
    ):
        with pytest.raises(kind) as here:
            hookmap.open(MODEL_PATH).capture(PROMPTS[0], **options)
        with pytest.raises(kind, match=text) as there:
            hm.capture(PROMPTS[0], **options, store=tmp_path / "run")
        assert str(there.value) == str(here.value)
    assert_same(hm.capture(PROMPTS[:2], **CHOSEN), hookmap.open(MODEL_PATH).capture(PROMPTS[:2], **CHOSEN))


def test_a_killed_worker_is_replaced(hm: Any, alone: hookmap.Capture, tmp_path: Path) -> None:
    run = hm.capture(PROMPTS, **SAMPLED, store=tmp_path / "run", progress=once(lambda: workers()[0].kill()))
    assert_same(run, alone)
    assert_nothing_torn(tmp_path / "run", 6)
    assert len(run.manifest.runs[-1]["lost"]) == 1


def test_a_run_that_ends_early_is_gone_on_with_by_any_engine(hm: Any, alone: hookmap.Capture, tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    for number, other in enumerate((hookmap.open(MODEL_PATH), hm)):
        folder = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            hm.capture(PROMPTS, **SAMPLED, store=folder, progress=once(stop))
        assert len(open_store(folder)) == 2
        assert_same(other.capture(PROMPTS, **SAMPLED, store=folder, resume=True), alone)
        assert_nothing_torn(folder, 6)


def test_threads_share_the_workers_one_after_another(hm: Any) -> None:
    """Without turns, most of these ended in KeyError or ValueError: a thread took what another's worker gave."""
    options = CHOSEN | {"max_new_tokens": 3}
    expected = [hookmap.open(MODEL_PATH).capture(PROMPTS[n : n + 4], **options) for n in range(3)]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda n: hm.capture(PROMPTS[n % 3 : n % 3 + 4], **options), range(9)))
    for number, run in enumerate(found):
        assert_same(run, expected[number % 3])


def test_a_capture_inside_the_progress_of_another_is_refused(hm: Any, tmp_path: Path) -> None:
    def inside(_: Any) -> None:
        hm.capture(PROMPTS[0], **CHOSEN)

    with raises(CaptureError, "in the middle of a capture"):
        hm.capture(PROMPTS, **CHOSEN, store=tmp_path / "run", progress=inside)
    assert len(open_store(tmp_path / "run")) == 2
    hm.capture(PROMPTS, **CHOSEN, store=tmp_path / "run", resume=True)


SHUT_DOWN = """
import sys, ray, hookmap
from hookmap.demo import DICTIONARY_PATH, MODEL_PATH
with hookmap.open_on_ray(MODEL_PATH, workers=1) as hm:
    for _ in range(2):
        try:
            hm.capture({prompts}, **{options}, store=sys.argv[1], progress=lambda _: ray.shutdown(), resume=_ > 0)
        except hookmap.CaptureError as error:
            print(error)
    assert not ray.is_initialized()
"""


def test_ray_that_is_shut_down_in_the_middle_is_told(tmp_path: Path) -> None:
    script = SHUT_DOWN.format(prompts=PROMPTS[:6], options=CHOSEN)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("Ray was shut down while its workers were needed") and first.endswith("resume=True.")
    assert "Open the model on Ray again" in second
    assert len(open_store(tmp_path / "run")) == 2


def test_a_model_that_cannot_be_opened_is_told_at_once(cluster: None) -> None:
    with hookmap.open_on_ray("no/such-model", workers=1) as opened:
        with raises(ModelError, "no/such-model"):
            opened.capture(PROMPTS[0], **CHOSEN)
        with raises(CaptureError, "no worker is left"):  # it waited for one, without end
            opened.capture(PROMPTS[0], **CHOSEN)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no-such-host.invalid:6379", "127.0.0.1:99999"]
)
def test_a_cluster_that_is_not_there_is_told_at_once(address: str) -> None:
    with pytest.raises(CaptureError, match=f"cannot reach a Ray cluster at {address}"):
        check_listens(address)


def test_a_folder_is_found_from_where_the_driver_is(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(MODEL_PATH, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    with hookmap.open_on_ray("mine") as opened:
        assert opened.capture(PROMPTS[0], **CHOSEN).manifest.model == "mine"


def test_a_model_that_was_closed_is_told(cluster: None) -> None:
    closed = hookmap.open_on_ray(MODEL_PATH, workers=1)
    closed.close()
    with raises(CaptureError, "no worker is left"):
        closed.capture(PROMPTS[0], **CHOSEN)


def test_too_many_workers_are_refused(cluster: None) -> None:
    with raises(CaptureError, "need 2, the cluster has 0"):
        hookmap.open_on_ray(MODEL_PATH, workers=2, gpus_per_worker=1)


def test_what_cannot_be_run_on_workers_is_told_before_any_starts(hm: Any, tmp_path: Path) -> None:
    for x, options, kind, text in (
        (torch.nn.Linear(1, 1), {}, ModelError, "cannot send a Linear"),
        (MODEL_PATH, {"workers": 0}, CaptureError, "workers"),
        (MODEL_PATH, {"cpus_per_worker": float("nan")}, CaptureError, "cpus_per_worker"),
        (MODEL_PATH, {"gpus_per_worker": -1}, CaptureError, "gpus_per_worker"),
        (MODEL_PATH, {"map": tmp_path / "no.json"}, MapNotFoundError, "no.json"),
    ):
        with pytest.raises(kind, match=text):
            hookmap.open_on_ray(x, **options)
    for options, kind, text in (
        ({"resume": True}, CaptureError, "needs the folder"),
        ({"points": (), "store": tmp_path / "run"}, StoreError, "at least one tensor"),
        ({"before": True}, InterventionError, "one machine only"),
        ({"interventions": str(tmp_path / "no.yaml")}, InterventionError, "no.yaml"),
        ({"interventions": [hookmap.watch(print, "resid_post")]}, InterventionError, "would have to be pickled"),
    ):
        with pytest.raises(kind, match=text):
            hm.capture(PROMPTS[0], **options)


def test_a_machine_that_does_not_share_the_disk_is_told(tmp_path: Path) -> None:
    capture = RunningCapture("1", CHOSEN, str(tmp_path / "elsewhere"), "shards/.driver-0.tmp")
    with raises(StoreError, "all machines share"):
        Worker(str(MODEL_PATH), {}).run(capture, (), [0], [0])


def test_only_parts_are_adopted(alone: hookmap.Capture, tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_text("mine")
    writer = FolderWriter.create(tmp_path / "run", alone.manifest)
    with writer, raises(StoreError, "no part of a capture"):
        writer.adopt(Group((), (), ("../../precious",), {}))
    assert outside.read_text() == "mine"


DRIVER = """
import sys, hookmap
from hookmap.demo import DICTIONARY_PATH, MODEL_PATH
with hookmap.open_on_ray(MODEL_PATH, workers=2) as hm:
    hm.capture({prompts}, **{options}, store=sys.argv[1])
"""


def test_a_killed_driver_leaves_what_was_finished(alone: hookmap.Capture, tmp_path: Path) -> None:
    """The local engine goes on with it; that Ray's does too is shown above."""
    folder = tmp_path / "run"
    options = SAMPLED | {"max_new_tokens": 12}
    script = DRIVER.format(prompts=PROMPTS, options=options)
    driver = subprocess.Popen([sys.executable, "-c", script, str(folder)], start_new_session=True)
    try:
        table, end = folder / "samples.jsonl", time.monotonic() + 240
        while not (table.exists() and table.stat().st_size) and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    kept = len(open_store(folder))
    assert kept >= 2
    run = hookmap.open(MODEL_PATH).capture(PROMPTS, **SAMPLED, store=folder, resume=True)
    assert_same(run, alone)
    assert_nothing_torn(folder, 6)


NODES = """
import sys, hookmap
from ray.cluster_utils import Cluster
from hookmap.demo import DICTIONARY_PATH, MODEL_PATH
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1}})
others = [cluster.add_node(num_cpus=1) for _ in range(2)]
killed = []

def show(progress):
    if not killed:
        killed.append(others[0])
        cluster.remove_node(others[0], allow_graceful=False)

with hookmap.open_on_ray(MODEL_PATH, workers=3, address=cluster.address) as hm:
    run = hm.capture({prompts}, **{options}, store=sys.argv[1], progress=show)
    print("lost", run.manifest.runs[-1]["lost"])
cluster.shutdown()
"""


def test_a_node_that_dies_whole_is_done_without(alone: hookmap.Capture, tmp_path: Path) -> None:
    """Three raylets on this machine; one is killed with everything on it."""
    script = NODES.format(prompts=PROMPTS, options=SAMPLED)
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ,
    )
    assert found.returncode == 0, found.stderr
    assert_same(open_store(tmp_path / "run"), alone)
    assert_nothing_torn(tmp_path / "run", 6)
