"""A capture is read where it lies, by ranges: out of an object store (fsspec's memory), an archive, a URL."""

import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from support.store_runs import Run, resid, write_or_resume

import hookmap
from hookmap.errors import StoreError

pytestmark = pytest.mark.slow

RUN = Run(resid(width=256), [[(0, 3, 7), (1, 5, 6)], [(2, 2, 30)]], shard_tokens=12)


def url(kind: str, folder: Path) -> str:
    if kind == "file":
        return f"file://{folder}"
    if kind == "zip":
        shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
        return f"zip://{folder.name}::{folder}.zip"
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.put(str(folder), "/bucket/", recursive=True)
    return f"memory://bucket/{folder.name}"


@pytest.mark.parametrize("kind", ["file", "memory", "zip"])
def test_a_remote_capture_is_read_as_one_here(tmp_path: Path, kind: str) -> None:
    write_or_resume(tmp_path / "c", RUN)
    store, here = hookmap.open_store(url(kind, tmp_path / "c")), hookmap.open_store(tmp_path / "c")
    assert list(store.samples) == list(here.samples) and store.finished and store.verify() == []
    for number in RUN.samples:
        for key in RUN.keys:
            assert torch.equal(store.read(number, *key), RUN.rows(number, key))
    assert torch.equal(store.read(2, "resid_mid", 1, tokens=[3, 20]), RUN.rows(2, ("resid_mid", 1))[[3, 20]])
    found, expected = store.describe(), here.describe()
    assert found.pop("path") != expected.pop("path") and found == expected


def test_problems_of_a_remote_capture_are_told(tmp_path: Path) -> None:
    write_or_resume(tmp_path / "c", RUN)
    where = url("memory", tmp_path / "c")
    system = fsspec.filesystem("memory")
    data = bytearray(system.cat("/bucket/c/shards/000001.safetensors"))
    data[-1] ^= 1
    system.pipe("/bucket/c/shards/000001.safetensors", bytes(data))
    system.pipe("/bucket/c/shards/strange", b"?")
    problems = hookmap.open_store(where).verify()
    assert len(problems) == 2 and "memory://bucket/c/shards/000001.safetensors was changed" in problems[0]
    assert "memory://bucket/c/shards/strange is named by no table" in problems[1]


class Counting(MemoryFileSystem):
    """Counts the bytes that are asked for, as an object store would send them."""

    protocol = "counting"
    asked = 0

    def _open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        return Ranged(self, path, mode, **how)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        found: str = super()._strip_protocol(path.replace("counting://", "memory://"))
        return found


class Ranged(fsspec.spec.AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        data = self.fs.store[self.path].getvalue()[start:end]
        Counting.asked += len(data)
        return data


def test_a_slice_asks_for_its_bytes_and_a_header(tmp_path: Path) -> None:
    write_or_resume(tmp_path / "c", RUN)
    url("memory", tmp_path / "c")
    fsspec.register_implementation("counting", Counting, clobber=True)
    store = hookmap.open_store("counting:///bucket/c")
    store.sample(2)
    Counting.asked = 0
    rows = store.read(2, "resid_mid", 1, tokens=range(2))
    assert torch.equal(rows, RUN.rows(2, ("resid_mid", 1))[:2])
    assert rows.nbytes <= Counting.asked <= rows.nbytes + 1000, "a shard has 24 kB"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("memory://nothing/here", "memory://nothing/here is not a capture: expected a folder, found nothing there"),
        ("nosuch://x/y", "cannot read nosuch://x/y: Protocol not known: nosuch"),
        ("zip://c::/no/such.zip", "no such"),
    ],
)
def test_what_cannot_be_reached_is_told(where: str, message: str) -> None:
    with pytest.raises(StoreError, match=f"(?i){message}"):
        hookmap.open_store(where)


def test_importing_hookmap_does_not_import_fsspec() -> None:
    import subprocess
    import sys

    code = "import hookmap, hookmap.stores, sys; assert 'fsspec' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
