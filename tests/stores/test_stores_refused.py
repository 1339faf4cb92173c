"""What a folder, a disk or a name cannot give is said in words, and never served as something else."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.raises import raises
from support.store_runs import Run, demo_run, resid, tree, write_or_resume

from hookmap.cli.main import main
from hookmap.datasets import PromptRecord, load_prompts
from hookmap.errors import DataError, HookmapError, StoreError
from hookmap.stores import open_store
from hookmap.stores.copying import repair
from hookmap.stores.export import export
from hookmap.stores.folder import FolderWriter

RUN = Run(resid(), [[(0, 3, 7), (1, 5, 6)], [(2, 2, 30)]], shard_tokens=12)


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    write_or_resume(tmp_path / "c", RUN)
    return tmp_path / "c"


# --- a manifest that contradicts itself -------------------------------------------------------------------------------


def relabel(manifest: dict[str, Any]) -> None:
    """A layer's rows under another layer's number."""
    manifest["tensors"][2]["layer"] = 0


def rename(manifest: dict[str, Any]) -> None:
    manifest["tensors"][2]["name"] = "resid_mid.1"


def swap(manifest: dict[str, Any]) -> None:
    manifest["tensors"][0], manifest["tensors"][1] = manifest["tensors"][1], manifest["tensors"][0]


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another layer": (relabel, "expected the name resid_pre.0, of its point and layer, found resid_pre.1"),
    "another name": (rename, "expected the name resid_pre.1, of its point and layer, found resid_mid.1"),
    "another order": (
        swap,
        r"points are \['resid_pre', 'resid_mid'\], and its tensors say \['resid_mid', 'resid_pre'\]",
    ),
    "other layers": (lambda m: m.update(layers=[0, 2]), r"layers are \[0, 2\], and its tensors say \[0, 1\]"),
    "a point more": (lambda m: m["points"].append("embed"), "points are"),
    "a layer that is none": (lambda m: m.update(map={"num_layers": 1}), r"layers \[1\] are in none of the map's 1"),
    "twice": (lambda m: m["tensors"].append(m["tensors"][0]), "the tensor resid_pre.0 is there twice"),
    "half a row": (lambda m: m["tensors"][0].update(row_shape=None), "expected dtype and row_shape, or neither"),
    "a negative row": (lambda m: m["tensors"][0].update(row_shape=[-8]), r"numbers from 0 on, found \[-8\]"),
    "a negative count": (lambda m: m["counts"].update(rows=-1), r"counts\.rows: .*greater than or equal to 0"),
    "no checksums": (lambda m: m.update(sha256=None), "the sha256 of both tables"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused(capture: Path, tmp_path: Path, name: str) -> None:
    change, message = CONTRADICTIONS[name]
    manifest = json.loads((capture / "manifest.json").read_text())
    change(manifest)
    (capture / "manifest.json").write_text(json.dumps(manifest))
    for attempt in (open_store, lambda path: repair(path, tmp_path / "new")):
        with pytest.raises(StoreError, match=rf"manifest.json is broken:\n.*{message}"):
            attempt(capture)


def double_key(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace('"model": "tiny"', '"model": "other",\n  "model": "tiny"'))


def test_a_key_that_is_there_twice_is_refused_everywhere(capture: Path, tmp_path: Path) -> None:
    shutil.copytree(capture, tmp_path / "d")
    double_key(tmp_path / "d" / "manifest.json")
    with pytest.raises(StoreError, match=r"manifest.json is broken: .*'model' is there twice"):
        open_store(tmp_path / "d")
    shard = capture / "shards" / "000000.safetensors"
    data = shard.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip()
    doubled = header[:-1] + b',"resid_mid.1":' + json.dumps(json.loads(header)["resid_pre.0"]).encode() + b"}"
    shard.write_bytes(len(doubled).to_bytes(8, "little") + doubled + data[8 + int.from_bytes(data[:8], "little") :])
    with raises(StoreError, "'resid_mid.1' is there twice"):
        open_store(capture).read(0, "resid_mid", 1)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "id": "1", "prompt": "b"}\n')
    with raises(DataError, "line 1:", "'prompt' is there twice"):
        load_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("shape", [[-8], [-7, 16], [7.0, 16], ["7", 16], [True, 16]], ids=str)
def test_a_shard_whose_shape_is_none_is_refused(capture: Path, shape: list[Any]) -> None:
    shard = capture / "shards" / "000000.safetensors"
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["resid_mid.1"]["shape"] = shape
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with raises(StoreError, "safetensors header"):
        open_store(capture).read(0, "resid_mid", 1)


def test_a_table_nested_without_end_is_a_broken_line(capture: Path) -> None:
    table = (capture / "samples.jsonl").read_text()
    deep = "[" * 100_000
    (capture / "samples.jsonl").write_text(table.replace('"prompt": "', f'"x": {deep}, "prompt": "', 1))
    store = open_store(capture)
    with raises(StoreError, "line 1 is broken"):
        store.read(0, "resid_mid", 1)


# --- disks -----------------------------------------------------------------------------------------------------------


UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


def mounted(script: str) -> str:
    """What a script says in a mount namespace of its own; skipped where the kernel grants none."""
    if not shutil.which("unshare") or subprocess.run([*UNSHARE, "mount -t tmpfs tmpfs /mnt"], check=False).returncode:
        pytest.skip("no unprivileged mounts here")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*UNSHARE, script], capture_output=True, text=True, check=False, env=environment)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_going_on_where_nothing_can_be_written_says_so(tmp_path: Path) -> None:
    write_or_resume(tmp_path / "c", demo_run())
    program = f"{sys.executable} {Path(__file__).parents[1] / 'support' / 'store_runs.py'}"
    read = f"{sys.executable} -c 'import hookmap; print(hookmap.open_store(\"/mnt/c\").verify())'"
    told = mounted(
        f"mount -t tmpfs tmpfs /mnt && cp -r {tmp_path}/c /mnt && mount -o remount,ro /mnt && {program} /mnt/c; {read}"
    )
    kept = f"{len(demo_run().samples)} finished samples are kept"
    assert told.startswith(f"cannot write to /mnt/c: Read-only file system. {kept}") and told.endswith("[]\n"), told


@pytest.mark.parametrize("layout", ["pt", "numpy", "datasets", "saelens --layer 1 --context 6", "probelab"])
@pytest.mark.slow
def test_an_export_to_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path, layout: str) -> None:
    if layout[0] in "ds":
        pytest.importorskip("datasets")
    write_or_resume(tmp_path / "c", Run(resid(width=512), [[(0, 3, 400)]]))
    told = mounted(
        f"mount -t tmpfs -o size=200k tmpfs /mnt && {sys.executable} -m hookmap store export {tmp_path}/c "
        f"--to {layout} --point resid_mid -o /mnt/out; echo code $?; echo left: $(ls -A /mnt)"
    )
    assert "error: cannot write to /mnt/out: No space left on device." in told
    assert "code 1\nleft:\n" in told, told


# --- names -----------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


@pytest.mark.parametrize("name", [".", "..", "a" * 256, "a" * 252, "half\ud800pair", "zero\0byte"], ids=ascii)
def test_a_name_that_no_folder_can_have_is_refused(
    capture: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "side").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "side")
    store = open_store(capture)
    with pytest.raises(StoreError) as refused:
        export(store, "numpy", name)
    assert refused.value.args[0].count("\n") == 0 and not list((tmp_path / "in").glob("*/*"))
    for attempt in (open_store, lambda path: repair(path, "new")):
        with pytest.raises(StoreError):
            attempt(name)
    if name not in (".", "a" * 252):
        with pytest.raises(StoreError):
            FolderWriter.create(name, RUN.manifest)
        with pytest.raises(StoreError):
            FolderWriter.resume(name, RUN.manifest)
    if name.isascii() and name.isprintable():  # no other comes from a command line
        code, told = command("store", "export", capture, "--to", "numpy", "-o", name)
        assert code == 1 and "not an error that hookmap foresaw" not in told
        code, told = command("inspect", name)
        assert code == 1 and "not an error that hookmap foresaw" not in told


@pytest.mark.parametrize(
    "record", [{"id": "a\ud800"}, {"labels": {"x": "\udc80"}}, {"labels": {"\ud800": 1}}, {"labels": {"x": ["\ud800"]}}]
)
def test_half_a_surrogate_pair_in_a_record_is_refused(record: dict[str, Any]) -> None:
    with raises(DataError, "half a surrogate pair"):
        PromptRecord("a prompt", **record)


@pytest.mark.slow
def test_half_a_surrogate_pair_in_a_capture_is_shown_and_not_exported_as_utf8(tmp_path: Path) -> None:
    """A folder of another program may hold one: JSON can."""
    pytest.importorskip("datasets")
    with FolderWriter.create(tmp_path / "c", RUN.manifest) as writer:
        replace(RUN, batches=RUN.batches[1:]).write(Renamed(writer))
    with raises(StoreError, "half a surrogate pair"):
        export(open_store(tmp_path / "c"), "datasets", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(open_store(tmp_path / "c"), "numpy", tmp_path / "out")
    for arguments in (["inspect", "c"], ["inspect", "c", "--json"], ["store", "merge", "c", "c", "-o", "m"]):
        done = subprocess.run(
            [sys.executable, "-m", "hookmap", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout or "{}") == {} and "\\ud800" in done.stderr


class Renamed:
    """A sink that gives each sample an id which is no text."""

    def __init__(self, sink: Any) -> None:
        self.write, self._sink = sink.write, sink

    def finish(self, sample: Any) -> None:
        self._sink.finish(replace(sample, id="half\ud800"))


@pytest.mark.parametrize("damage", ["a folder in place of the table", "a file in place of the shards", "no shards"])
def test_what_stands_where_a_file_should_is_told(capture: Path, tmp_path: Path, damage: str) -> None:
    shards, table = capture / "shards", capture / "samples.jsonl"
    if damage == "a folder in place of the table":
        table.unlink()
        table.mkdir()
    else:
        shutil.rmtree(shards)
        if damage.startswith("a file"):
            shards.write_bytes(b"")
    before = tree(capture)

    def every_row(path: Path) -> None:
        store = open_store(path)
        for key in store.keys:
            store[key]

    problems = []
    for attempt in (
        every_row,
        lambda path: problems.extend(open_store(path).verify()),
        lambda p: open_store(p).describe(),
    ):
        try:
            attempt(capture)
        except HookmapError:
            problems.append("refused")
    assert problems and torch.is_tensor(RUN.rows(0, RUN.keys[0])) and tree(capture) == before
    with pytest.raises(HookmapError):
        every_row(capture)
    with pytest.raises(HookmapError):
        FolderWriter.resume(capture, RUN.manifest)


@pytest.mark.parametrize("shard", [1, 2, 3])
def test_a_shard_that_cannot_get_its_name_finishes_no_sample(tmp_path: Path, shard: int) -> None:
    """Shards get their names beside the writing: whichever of a group fails, the group does."""
    folder = tmp_path / "c"
    run = Run(resid(), [[(0, 3, 7)], [(1, 5, 6), (2, 2, 30)]], shard_tokens=12)
    with (
        raises(StoreError, "cannot write to", "1 finished sample"),
        FolderWriter.create(folder, run.manifest) as writer,
    ):
        replace(run, batches=run.batches[:1]).write(writer)
        (folder / "shards" / f"{shard:06d}.safetensors").mkdir()
        replace(run, batches=run.batches[1:]).write(writer)
    (folder / "shards" / f"{shard:06d}.safetensors").rmdir()
    assert len(open_store(folder)) == 1
    write_or_resume(folder, run)
    write_or_resume(tmp_path / "undisturbed", run)
    assert tree(folder / "shards") == tree(tmp_path / "undisturbed" / "shards")
