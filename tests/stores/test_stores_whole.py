"""A folder that is a capture at the end only: the same bytes as another writer's, and nothing before."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from support.raises import raises
from support.store_runs import Run, resid, tree

from hookmap.activations import Activation
from hookmap.errors import StoreError
from hookmap.stores import open_store
from hookmap.stores.background import BackgroundWriter
from hookmap.stores.folder import FolderWriter
from hookmap.stores.whole_writer import WholeWriter

RUN = Run(resid(), [[(0, 3, 7), (1, 5, 6)], [(2, 2, 30)], [(3, 1, 4)]], shard_tokens=12)


@pytest.mark.parametrize("behind", [False, True], ids=["itself", "in a thread"])
def test_the_folder_is_that_of_the_writer_that_can_resume_byte_for_byte(tmp_path: Path, behind: bool) -> None:
    for name, made in (("steps", FolderWriter.create), ("whole", WholeWriter)):
        writer: Any = made(tmp_path / name, RUN.manifest)
        with BackgroundWriter(writer) if behind else writer as sink:
            RUN.write(sink)
            assert sink.finished == {0, 1, 2, 3}
            sink.note({"engine": "hooks"})
    assert tree(tmp_path / "whole") == tree(tmp_path / "steps") and len(tree(tmp_path / "whole")) > 4


def test_what_is_not_closed_or_left_by_an_error_is_no_capture(tmp_path: Path) -> None:
    class LeftError(Exception):
        pass

    with pytest.raises(LeftError), WholeWriter(tmp_path / "a", RUN.manifest) as writer:
        RUN.write(writer)
        with raises(StoreError, "manifest.json"):
            open_store(tmp_path / "a")
        raise LeftError
    with raises(StoreError, "manifest.json"):
        open_store(tmp_path / "a")
    with raises(StoreError, "closed"):
        RUN.write(writer)
    with raises(StoreError, "not empty"):
        WholeWriter(tmp_path / "a", RUN.manifest)


def test_samples_that_are_not_finished_are_forgotten_or_refused(tmp_path: Path) -> None:
    writer = WholeWriter(tmp_path / "a", RUN.manifest)
    for start in (0, 10, 20):
        for key in RUN.keys:
            writer.write(Activation(2, *key, start, RUN.rows(2, key)[start : start + 10].clone()))
    assert list((tmp_path / "a" / "shards").iterdir()), "a shard was full"
    with raises(StoreError, "samples"):
        writer.close(finished=True)
    writer.abandon()
    assert not list((tmp_path / "a" / "shards").iterdir()), "their shards went too"
    RUN.write(writer)
    writer.close(finished=True)
    assert open_store(tmp_path / "a").read(2, *RUN.keys[0]).equal(RUN.rows(2, RUN.keys[0]))


@pytest.mark.parametrize("which", [0, 3, 9, "last"])
def test_a_disk_that_refuses_is_told_and_leaves_no_capture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: Any
) -> None:
    """Whichever sync fails: of a shard, of a folder, of a table, of the manifest."""
    sync, calls = os.fsync, list[int]()

    def count(file: int) -> None:
        calls.append(file)
        sync(file)

    monkeypatch.setattr(os, "fsync", count)
    with WholeWriter(tmp_path / "a", RUN.manifest) as writer:
        RUN.write(writer)
    fails = len(calls) - 2 if which == "last" else which  # the very last is of the folder: the manifest is there
    calls.clear()

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) > fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with raises(StoreError, "No space left on device"), WholeWriter(tmp_path / "b", RUN.manifest) as writer:
        RUN.write(writer)
    with raises(StoreError, "manifest.json"):
        open_store(tmp_path / "b")
