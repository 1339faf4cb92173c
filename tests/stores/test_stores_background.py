"""The thread that writes: the same bytes as without it, never more in flight than allowed, no error lost."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from support.raises import raises
from support.store_runs import Run, demo_run, resid, tree, write_or_resume

import hookmap
from hookmap.activations import Activation, Sample, Sink
from hookmap.errors import CaptureError, StoreError
from hookmap.stores import open_store
from hookmap.stores.background import BackgroundWriter
from hookmap.stores.folder import FolderWriter

pytestmark = pytest.mark.slow

RUN = Run(resid(), [[(0, 3, 7), (1, 5, 6)], [(2, 2, 30)], [(3, 1, 4)]], shard_tokens=12)


class SlowDisk(FolderWriter):
    """Writes as the other one does, and only while `gate` is open."""

    gate: threading.Event

    def write(self, activation: Activation) -> None:
        assert self.gate.wait(60)
        super().write(activation)


def slow(path: Path, in_flight: int) -> tuple[SlowDisk, BackgroundWriter]:
    writer = SlowDisk.create(path, RUN.manifest)
    writer.gate = threading.Event()
    return writer, BackgroundWriter(writer, in_flight)


def rows(sample: int, start: int, count: int = 1) -> list[Activation]:
    return [Activation(sample, *key, start, torch.ones(count, 16, dtype=torch.bfloat16)) for key in RUN.keys]


def a_sample(number: int, count: int) -> Sample:
    return Sample(number, "", "", (0,) * (count + 1), 1, count)


def ended_by(seconds: float, there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def writing() -> bool:
    return any(thread.name.startswith("writer of") for thread in threading.enumerate())


@pytest.mark.parametrize("interrupts", [1, 3])
def test_interrupts_while_it_closes_leave_a_sound_folder(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: int
) -> None:
    """On a slow disk. Python 3.11 took the thread for dead, and recovery ran beside it: 8 of 60 folders were broken."""
    write_or_resume(fast_path / "whole", RUN)
    chance, sync, left = random.Random(0), os.fsync, 0

    def slow_sync(file: int) -> None:
        time.sleep(0.002)
        sync(file)

    def interrupt(_: int, frame: FrameType | None) -> None:
        nonlocal left
        left -= 1
        if left:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, 0.01))
        while frame is not None and frame.f_code is not write.__code__:
            frame = frame.f_back
        if frame is not None:  # else it comes too late for this folder
            raise KeyboardInterrupt

    def write(path: Path) -> None:
        with BackgroundWriter(FolderWriter.create(path, RUN.manifest)) as writer:
            RUN.write(writer)
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, 0.04))

    monkeypatch.setattr(os, "fsync", slow_sync)
    before = signal.signal(signal.SIGALRM, interrupt)
    met = 0
    try:
        for number in range(30):
            path, left = fast_path / str(number), interrupts
            try:
                write(path)
            except KeyboardInterrupt:
                met += 1
            ended_by(60, lambda: signal.getitimer(signal.ITIMER_REAL)[0] == 0 and not writing())
            store = open_store(path)
            assert store.verify() == [] and all(sample == RUN.samples[sample.sample] for sample in store.samples)
            assert store.manifest.counts.samples == len(store)
            write_or_resume(path, RUN)
            assert tree(path) == tree(fast_path / "whole")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert met > 10


PLAIN = """
import random, signal, sys, threading, time
from hookmap.stores.background import BackgroundWriter

class Slow:
    folder, finished = "nowhere", frozenset()
    inside, calls, closed, errors = 0, 0, [], []
    def _take(self):
        self.inside += 1
        if self.inside > 1: self.errors.append("two at once")
        time.sleep(0.002)
        self.calls += 1
        self.inside -= 1
    def note(self, run): self._take()
    def close(self, finished):
        self._take()
        self.closed.append(finished)

chance = random.Random(0)
def interrupt(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
for number in range(100):
    disk = Slow()
    disk.closed, disk.errors = [], []
    try:
        with BackgroundWriter(disk) as writer:
            for _ in range(5): writer.note({})
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.001, 0.015), 0.003)
    except KeyboardInterrupt:
        pass
    while True:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            break
        except KeyboardInterrupt:
            pass
    while any(thread.name.startswith("writer of") for thread in threading.enumerate()): time.sleep(0.001)
    assert not disk.errors and disk.calls == 5 + len(disk.closed) and disk.closed in ([True], [False]), vars(disk)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_thread_ends_and_closes_alone_on_every_python(python: str) -> None:
    """The part without torch, which other versions may not have: the writer is a slow stand-in for the disk."""
    command = sys.executable if python == f"3.{sys.version_info.minor}" else f"python{python}"
    environment = os.environ | {"PYTHONPATH": str(Path(hookmap.__file__).parent.parent)}
    try:
        known = subprocess.run([command, "-c", "0"], capture_output=True, check=False).returncode == 0
    except OSError:
        known = False
    if not known:
        pytest.skip(f"no Python {python} here")
    done = subprocess.run([command, "-c", PLAIN], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_interrupt_while_the_thread_starts_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once stayed locked, by a thread that nobody could end, until Python ended."""
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        writer = FolderWriter.create(tmp_path / "c", RUN.manifest)
        with pytest.raises(KeyboardInterrupt):
            BackgroundWriter(writer)
    ended_by(60, lambda: threading.active_count() == before)
    with BackgroundWriter(FolderWriter.resume(tmp_path / "c", RUN.manifest)):
        pass


def test_it_is_a_sink(tmp_path: Path) -> None:
    with BackgroundWriter(FolderWriter.create(tmp_path / "c", RUN.manifest)) as writer:
        sink: Sink = writer
        RUN.write(sink)


@pytest.mark.parametrize("run", [RUN, demo_run()], ids=["small", "demo"])
def test_the_bytes_are_those_of_a_writer_without_a_thread(tmp_path: Path, run: Run) -> None:
    write_or_resume(tmp_path / "direct", run)
    write_or_resume(tmp_path / "background", run, background=True)
    assert tree(tmp_path / "background") == tree(tmp_path / "direct")


def test_the_caller_does_not_wait_for_a_disk_that_is_behind_for_a_moment(tmp_path: Path) -> None:
    writer, sink = slow(tmp_path / "c", 1 << 20)
    with sink:
        RUN.write(sink)  # would never come back if it waited: the gate is shut
        assert not writer.finished
        writer.gate.set()
    assert open_store(tmp_path / "c").verify() == []


def test_what_waits_is_bounded_in_bytes(tmp_path: Path) -> None:
    piece = rows(0, 0)[0].tensor.nbytes
    writer, sink = slow(tmp_path / "c", 6 * piece)
    handed = []

    def hand_over() -> None:
        for start in range(5):
            for activation in rows(0, start):
                sink.write(activation)
                handed.append(activation)

    with sink:
        caller = threading.Thread(target=hand_over)
        caller.start()
        deadline = time.monotonic() + 60
        while len(handed) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(handed) == 6  # the thread has one of them in hand
        writer.gate.set()
        caller.join()
        sink.finish(a_sample(0, 5))
    assert len(handed) == 20 and len(open_store(tmp_path / "c")) == 1


def test_a_piece_larger_than_all_that_may_wait_is_written_too(tmp_path: Path) -> None:
    write_or_resume(tmp_path / "direct", RUN)
    with BackgroundWriter(FolderWriter.create(tmp_path / "c", RUN.manifest), in_flight=1) as sink:
        RUN.write(sink)
    assert tree(tmp_path / "c") == tree(tmp_path / "direct")


def test_an_error_of_the_writer_reaches_the_caller_and_ends_the_writing(tmp_path: Path) -> None:
    wrong = "resid_pre.0 of sample 0: expected the rows from 1 on, got rows from 2 on"
    with (
        pytest.raises(CaptureError, match=wrong),
        BackgroundWriter(FolderWriter.create(tmp_path / "c", RUN.manifest)) as s,
    ):
        for start in (0, 2):
            for activation in rows(0, start):
                s.write(activation)
        s.wait()
    store = open_store(tmp_path / "c")
    assert len(store) == 0 and not store.finished and store.verify() == []


def test_an_error_after_the_last_call_is_told_at_the_end(tmp_path: Path) -> None:
    writer, sink = slow(tmp_path / "c", 1 << 20)
    with raises(CaptureError, "sample 0 should have 2 rows of each tensor"), sink:
        for activation in rows(0, 0):
            sink.write(activation)
        sink.finish(a_sample(0, 2))
        writer.gate.set()
    with raises(StoreError, "No such file"):  # and each call says it again
        broken = BackgroundWriter(FolderWriter.create(tmp_path / "d", RUN.manifest))
        for file in ("samples.jsonl", "shards.jsonl", "manifest.json"):
            (tmp_path / "d" / file).unlink()
        (tmp_path / "d" / "shards").rmdir()
        with broken:
            RUN.write(broken)
    for call in (lambda: broken.write(rows(0, 0)[0]), lambda: broken.finish(a_sample(0, 1)), broken.abandon):
        with raises(StoreError, "No such file"):
            call()


def test_a_caller_that_fails_keeps_every_sample_it_finished(tmp_path: Path) -> None:
    writer, sink = slow(tmp_path / "c", 1 << 20)
    with pytest.raises(KeyboardInterrupt), sink:
        RUN.write(sink)
        for activation in rows(4, 0):
            sink.write(activation)
        writer.gate.set()
        raise KeyboardInterrupt
    store = open_store(tmp_path / "c")
    assert [sample.sample for sample in store.samples] == [0, 1, 2, 3] and not store.finished
    assert not any(thread.name.startswith("writer of") for thread in threading.enumerate())
    with FolderWriter.resume(tmp_path / "c", RUN.manifest) as resumed:
        assert resumed.finished == {0, 1, 2, 3}


def test_abandoned_rows_come_again(tmp_path: Path) -> None:
    write_or_resume(tmp_path / "direct", RUN)
    with BackgroundWriter(FolderWriter.create(tmp_path / "c", RUN.manifest)) as sink:
        for activation in rows(0, 0, 3) + rows(1, 0, 5):
            sink.write(activation)
        sink.abandon()
        assert sink.finished == frozenset()
        RUN.write(sink)
        assert sink.finished == {0, 1, 2, 3}
    assert tree(tmp_path / "c") == tree(tmp_path / "direct")


def test_a_closed_one_takes_nothing(tmp_path: Path) -> None:
    with BackgroundWriter(FolderWriter.create(tmp_path / "c", RUN.manifest)) as sink:
        RUN.write(sink)
    with raises(StoreError, "is closed", "resume"):
        sink.write(rows(9, 0)[0])
