"""A capture folder survives what happens to long runs: a kill, an interrupt, a full disk, a reader beside the writer.

The measure is always the same: what is in the table is right to the bit, and the resumed run's folder is, byte for
byte, that of a run that nothing disturbed.
"""

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support.store_runs import Run, demo_run, resid, tree, write_or_resume

import hookmap.stores
from hookmap.errors import StoreError
from hookmap.stores import open_store
from hookmap.stores.background import BackgroundWriter
from hookmap.stores.folder import FolderWriter

pytestmark = pytest.mark.slow

RUN = demo_run()
STORES = str(Path(hookmap.stores.__file__).parent)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed") / "capture"
    write_or_resume(path, RUN)
    assert open_store(path).verify() == []
    return tree(path)


def child(target: Callable[..., None], *args: Any) -> Any:
    """A process that has torch imported already and is a fork of nobody's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hookmap.stores.reader"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def finished_and_right(path: Path, run: Run = RUN) -> set[int]:
    """The samples that a reader sees, every row of them held against the run's."""
    if not (path / "manifest.json").exists():
        return set()
    store = open_store(path)
    for sample in store.samples:
        assert sample == run.samples[sample.sample]
        for key in run.keys:
            assert torch.equal(store.read(sample.sample, *key), run.rows(sample.sample, key))
    return {sample.sample for sample in store.samples}


# --- killed ----------------------------------------------------------------------------------------------------------


class Lines:
    """Calls `act` when the n-th line of the stores' own code is about to run."""

    def __init__(self, n: float, act: Callable[[], None]) -> None:
        self.n, self.act, self.seen = n, act, 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> "Lines | None":
        if not frame.f_code.co_filename.startswith(STORES):
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.n:
                self.act()
        return self


@contextlib.contextmanager
def traced(lines: Lines, threads: bool = False) -> Iterator[None]:
    """`threads`: those that begin inside too. (An interrupt comes to the main one only.)"""
    before = sys.gettrace()
    sys.settrace(lines)
    if threads:
        threading.settrace(lines)
    try:
        yield
    finally:
        sys.settrace(before)
        threading.settrace(None)


def slow_writer(path: Path, background: bool) -> None:
    write_or_resume(path, RUN, background)


def killed_at_line(path: Path, lines: list[int], background: bool) -> None:
    """For each of `lines`, a fork of this process is killed there; the folders are PATH/N."""
    for n in lines:
        pid = os.fork()
        if not pid:
            with traced(Lines(n, lambda: os.kill(os.getpid(), signal.SIGKILL)), threads=True):
                write_or_resume(path / str(n), KILLED, background)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        # Two threads do not take the same number of lines each time: there the last of them may not be reached.
        assert os.WTERMSIG(status) == signal.SIGKILL or (background and status == 0)


KILLED = Run(resid(), [[(0, 3, 7), (1, 5, 6)], [(2, 2, 30)], [(3, 1, 4), (4, 2, 2), (5, 4, 9)]], shard_tokens=12)


IN_TURN = pytest.mark.parametrize("background", [False, True], ids=["direct", "background"])
"""the writer itself, and the thread around it"""


@IN_TURN
def test_killed_at_random_moments_a_run_loses_nothing_finished(
    tmp_path: Path, undisturbed: dict[str, bytes], background: bool
) -> None:
    # Not a test that can fail by chance: however the kills fall, every assertion must hold.
    chance, before, kills = random.Random(), set[int](), 0
    for _ in range(1000):
        process = child(slow_writer, tmp_path / "c", background)
        process.join(chance.uniform(0.05, 0.5) if kills < 20 else None)
        ended = process.exitcode == 0
        process.kill()
        process.join()
        found = finished_and_right(tmp_path / "c")
        assert found >= before
        before = found
        if ended and kills >= 20:
            break
        if ended:  # again from the start, until there were 20 kills
            assert tree(tmp_path / "c") == undisturbed
            shutil.rmtree(tmp_path / "c")
            before = set()
        else:
            kills += 1
    assert tree(tmp_path / "c") == undisturbed


@IN_TURN
def test_killed_at_any_line_of_its_code_a_run_loses_nothing_finished(fast_path: Path, background: bool) -> None:
    counter = Lines(float("inf"), lambda: None)
    with traced(counter, threads=True):
        write_or_resume(fast_path / "whole", KILLED, background)
    whole = tree(fast_path / "whole")
    lines = random.Random(0).sample(range(1, counter.seen), 30 if background else 80)
    process = child(killed_at_line, fast_path, lines, background)
    process.join()
    assert process.exitcode == 0
    seen = set()
    for n in lines:
        seen.add(len(finished_and_right(fast_path / str(n), KILLED)))
        write_or_resume(fast_path / str(n), KILLED, background)
        assert tree(fast_path / str(n)) == whole, f"killed at line {n}"
    assert seen == {0, 2, 3, 6}  # whole batches, and all of these were met


# Right before a `with` closes its file an interrupt leaves that to Python, which warns.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@IN_TURN
def test_interrupted_at_any_line_a_run_can_be_resumed(fast_path: Path, background: bool) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def run_until(path: Path, lines: Lines) -> None:
        writer = FolderWriter.create(path, KILLED.manifest)
        with BackgroundWriter(writer, in_flight=2000) if background else writer as sink, traced(lines):
            KILLED.write(sink)

    counter = Lines(float("inf"), lambda: None)
    run_until(fast_path / "whole", counter)
    whole = tree(fast_path / "whole")
    for n in random.Random(0).sample(range(1, counter.seen), 30 if background else 80):
        path = fast_path / str(n)
        lines = Lines(n, interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            run_until(path, lines)
        if background and lines.seen < n:  # it waited less often than when the lines were counted
            assert tree(path) == whole
            continue
        assert lines.seen >= n
        assert finished_and_right(path, KILLED) in (set(), {0, 1}, {0, 1, 2}, {0, 1, 2, 3, 4, 5})
        store = open_store(path)
        assert not store.finished and store.verify() == []
        assert len(list((path / "shards").iterdir())) == store.manifest.counts.shards  # nothing is left over
        write_or_resume(path, KILLED)
        assert tree(path) == whole, f"interrupted at line {n}"


def test_a_table_torn_anywhere_is_read_up_to_its_last_whole_group(fast_path: Path) -> None:
    """After a power cut the tables may end anywhere, and hold no more than what was synced."""
    path = fast_path / "c"
    write_or_resume(fast_path / "whole", KILLED)
    with FolderWriter.create(fast_path / "on", KILLED.manifest) as writer:
        KILLED.write(writer)
        shutil.copytree(fast_path / "on", path)  # as it is on disk before the writer closes
    table = (path / "samples.jsonl").read_bytes()
    groups = [{number for number, _, _ in batch} for batch in KILLED.batches]
    ends = {0: set[int]()}
    for place, group in enumerate(groups):
        last = max(group)
        end = table.index(b"\n", table.index(b'{"sample": %d,' % last)) + 1
        ends[end] = set().union(*groups[: place + 1])
    for cut in (*ends, *random.Random(0).sample(range(len(table)), 40)):
        torn = fast_path / "torn"
        shutil.copytree(path, torn)
        (torn / "samples.jsonl").write_bytes(table[:cut])
        assert finished_and_right(torn, KILLED) == ends[max(end for end in ends if end <= cut)]
        write_or_resume(torn, KILLED)
        assert tree(torn) == tree(fast_path / "whole")
        shutil.rmtree(torn)


def test_leftovers_of_a_kill_are_removed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    path = tmp_path / "c"
    with pytest.raises(RuntimeError), FolderWriter.create(path, RUN.manifest):
        raise RuntimeError
    (path / "shards" / ".000000.safetensors.tmp").write_bytes(b"half")
    (path / "shards" / "000007.safetensors").write_bytes(b"not in the table")
    (path / "shards.jsonl").write_bytes(b'{"shard": 0, "bytes": 3')
    (path / ".manifest.json.tmp").write_bytes(b"{")
    assert open_store(path).verify() == []  # what a writer has in hand is no problem
    write_or_resume(path, RUN)
    assert tree(path) == undisturbed


# --- a full disk -----------------------------------------------------------------------------------------------------


def write_with_limit(path: Path, run: Run, limit: int, background: bool) -> None:
    """No file may grow beyond `limit` bytes: the kernel refuses the write, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write_or_resume(path, run, background)
    except StoreError as error:
        path.with_suffix(".error").write_text(str(error))


@IN_TURN
@pytest.mark.parametrize("limit", [1000, 2500, 9000])
def test_a_write_that_the_disk_refuses_keeps_what_is_finished(tmp_path: Path, limit: int, background: bool) -> None:
    run = Run(resid(), [[(number, 3, 7 + 8 * number)] for number in range(9)], shard_tokens=1000)
    write_or_resume(tmp_path / "whole", run)
    path = tmp_path / "c"
    process = child(write_with_limit, path, run, limit, background)
    process.join()
    message = path.with_suffix(".error").read_text()
    found = finished_and_right(path, run) if limit > 1000 else set()
    refused = f"cannot write to {path}: File too large. "
    if limit == 1000:  # not even the manifest: the folder is as good as new
        assert message == f"{refused}Nothing was written. Write to another folder: -o DIR"
        assert not (path / "manifest.json").exists()
    else:
        assert message.startswith(f"{refused}{len(found)} finished samples are kept")
        assert message.endswith(f"-o {path} --resume")
        assert 0 < len(found) < 9 and open_store(path).verify() == []
    write_or_resume(path, run)
    assert tree(path) == tree(tmp_path / "whole")


@IN_TURN
def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, undisturbed: dict[str, bytes], background: bool) -> None:
    """A real one of 300 kB, in a mount namespace of its own; skipped where the kernel grants none."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "mount -t tmpfs tmpfs /mnt"], check=False).returncode:
        pytest.skip("no unprivileged mounts here")
    program = f"{sys.executable} {Path(__file__).parents[1] / 'support' / 'store_runs.py'}"
    out, how = tmp_path / "out", "background" if background else ""
    script = (
        f"set -e; mount -t tmpfs -o size=300k tmpfs /mnt; {program} /mnt/c {how}; cp -r /mnt/c {out}; "
        f"mount -o remount,size=20m /mnt; {program} /mnt/c {how}; cp -r /mnt/c {out}-resumed"
    )
    # The package is not installed everywhere that its tests run: the program finds it where this process did.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*unshare, script], capture_output=True, text=True, check=True, env=environment)
    found = finished_and_right(out)
    assert f"cannot write to /mnt/c: No space left on device. {len(found)} finished samples are kept" in done.stdout
    assert 0 < len(found) < len(RUN.samples) and open_store(out).verify() == []
    assert done.stdout.endswith("finished\n") and tree(Path(f"{out}-resumed")) == undisturbed


# --- beside each other, and memory -----------------------------------------------------------------------------------


@IN_TURN
def test_a_reader_beside_the_writer_sees_only_finished_samples(tmp_path: Path, background: bool) -> None:
    process = child(slow_writer, tmp_path / "c", background)
    before, seen = set[int](), set[int]()
    while process.is_alive() or before != set(RUN.samples):
        found = finished_and_right(tmp_path / "c")
        assert found >= before
        before = found
        seen.add(len(found))
        assert process.is_alive() or process.exitcode == 0
        time.sleep(0.001)
    process.join()
    store = open_store(tmp_path / "c")
    assert store.finished and store.verify() == []


def peak_memory(path: Path, rows: int, report: Any) -> None:
    """Writes one sample of so many rows, 16 kB each; then reads it through; tells the peak of both, in bytes."""
    torch.set_num_threads(1)
    tensors = resid(layers=4, width=1024)
    keys = tuple(tensors)
    row = torch.ones(1, 1024, dtype=torch.bfloat16)
    run = Run(tensors, [[(0, 1, 1)]], shard_tokens=256, shard_bytes=2 << 20)
    write_rows(path / "warm", run, keys, row, 3000)
    open_store(path / "warm").norms("resid_mid", 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_rows(path / "c", run, keys, row, rows)
    open_store(path / "c").norms("resid_mid", 3)
    report.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def write_rows(path: Path, run: Run, keys: Any, row: torch.Tensor, rows: int) -> None:
    from hookmap.activations import Activation, Sample

    with FolderWriter.create(path, run.manifest) as writer:
        for start in range(rows):
            for point, layer in keys:
                writer.write(Activation(0, point, layer, start, row.clone()))
        writer.finish(Sample(0, "", "", (0,) * (rows + 1), 1, rows))


def test_memory_does_not_grow_with_the_tokens(fast_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = child(peak_memory, fast_path, 12_000, theirs)
    grown = ours.recv()
    process.join()
    assert (fast_path / "c" / "shards" / "000080.safetensors").exists()
    assert grown < 12e6  # after a run of 49 MB one of 197 MB: a store that holds its rows would need 148 MB more
