"""Maps, vectors, probes, dictionaries and captures go to a hub and come back: huggingface_hub, and a server here."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.hub_server import Hub, hub_on_this_machine
from support.raises import raises

from hookmap import SelectionError, light
from hookmap.activations import Activation, Sample
from hookmap.analysis.hub import from_pretrained, push_to_hub
from hookmap.stores.folder import FolderWriter
from hookmap.stores.manifest import manifest_of_run

MAKE = """
import sys
import torch
from hookmap import light
from hookmap.analysis import steering
from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.analysis.hub import from_pretrained, push_to_hub
from hookmap.analysis.probes import saved

steps = torch.arange(8.0)
key = ("resid_post", 3)
THINGS = {
    "map": light.load_map("Qwen3ForCausalLM"),
    "vector": steering.SteeringVector(
        steering.About(point="resid_post", method="pca", model="/home/me/model"), {3: steps}
    ),
    "probes": saved.Probes(saved.About(label="odd", method="ridge", pool="last", samples=9), {key: steps}, {key: 0.5}),
    "dictionary": Dictionary(torch.ones(4, 8), torch.ones(8, 4), steps, torch.zeros(4), about=About("resid_post", 3)),
}
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_on_this_machine() as found:
        yield found


def talk(hub: Hub, folder: Path, code: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: the client reads the hub's address once."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder), "HF_TOKEN": "hf_ours",
        "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    return subprocess.run([sys.executable, "-c", MAKE + code], capture_output=True, text=True, env=environment, cwd=cwd)


COMPARE = """
for name, thing in THINGS.items():
    print(push_to_hub(thing, f"me/{name}", folder="sub/dir" if name == "vector" else ""))
assert from_pretrained("me/map") == THINGS["map"]
vector = from_pretrained("me/vector", folder="sub/dir")
assert torch.equal(vector[3], steps) and vector.about == THINGS["vector"].about
probes = from_pretrained("me/probes")
assert torch.equal(probes.weights[key], steps) and probes.biases == {key: 0.5}
rows = torch.linspace(-1, 1, 12).reshape(3, 4)
assert torch.allclose(from_pretrained("me/dictionary").encode(rows), THINGS["dictionary"].encode(rows))
print("all came back")
"""


@pytest.mark.slow
def test_what_is_pushed_comes_back_the_same(hub: Hub, tmp_path: Path) -> None:
    done = talk(hub, tmp_path, COMPARE)
    assert done.stdout.splitlines()[-1:] == ["all came back"], done.stderr
    assert done.stdout.startswith(f"{hub.address}/me/map/commit/")
    assert {repo: sorted(files) for repo, files in hub.files.items()} == {
        "me/map": ["README.md", "map.json"],
        "me/vector": ["sub/dir/README.md", "sub/dir/vector.safetensors"],
        "me/probes": ["README.md", "probes.safetensors"],
        "me/dictionary": ["README.md", "cfg.json", "sae_weights.safetensors"],
    }
    assert json.loads(hub.files["me/map"]["map.json"]) == light.load_map("Qwen3ForCausalLM").to_document()
    assert b"/home/me" not in hub.files["me/vector"]["sub/dir/README.md"]
    assert hub.tokens == {"Bearer hf_ours"}


@pytest.mark.slow
def test_of_a_cross_layer_transcoder_one_layer_is_fetched(hub: Hub, tmp_path: Path) -> None:
    held = hub.files["me/clt"] = {}
    for layer in range(3):
        encoder = {
            f"W_enc_{layer}": torch.ones(8, 4),
            f"b_enc_{layer}": torch.zeros(8),
            f"b_dec_{layer}": torch.ones(4),
        }
        held[f"W_enc_{layer}.safetensors"] = save(encoder)
        held[f"W_dec_{layer}.safetensors"] = save({f"W_dec_{layer}": torch.ones(8, 3 - layer, 4)})
    done = talk(hub, tmp_path, "import hookmap\nprint(hookmap.load_dictionary('me/clt', layer=1))")
    assert done.stdout == "<Dictionary of resid_mid.1 -> mlp_out.1: 8 features, cross_layer_transcoder>\n", done.stderr
    fetched = {each.rpartition("/")[2] for each in hub.asked if each.startswith("GET") and each.endswith("tensors")}
    assert fetched == {"W_enc_1.safetensors", "W_dec_1.safetensors"}


KEY = ("resid_post", 3)


def fill(sink: Any, count: int) -> None:
    for number in range(count):
        sink.write(Activation(number, *KEY, 0, torch.arange(2 * 8.0).reshape(2, 8) + 100.0 * number))
        sink.finish(Sample(number, f"prompt {number}", "text", (1, 2, 3), 2, 2))


def written(folder: Path, count: int, finished: bool = True) -> Path:
    """A capture with a shard for each sample."""
    with FolderWriter.create(folder, manifest_of_run([KEY], model="owner/model", shard_tokens=2)) as writer:
        fill(writer, count)
        writer.close(finished=finished)
    return folder


CAPTURES = """
from hookmap import HookmapError, open_store

def same(found, store):
    assert found.verify() == [] and len(found) == len(store) and found.texts == store.texts
    assert torch.equal(found[key], store[key])
"""


@pytest.mark.slow
def test_a_capture_is_pushed_in_its_files_and_read_where_they_were_put(hub: Hub, tmp_path: Path) -> None:
    """Its shards by Git LFS; what is in the folder beside the capture stays here, and a shorter one leaves no shard."""
    whole = written(tmp_path / "whole", 3)
    written(tmp_path / "short", 1)
    written(tmp_path / "half", 2, finished=False)
    (whole / "notes.txt").write_text("mine")
    code = """
from hookmap.capture.result import Capture
from hookmap.stores.memory import MemoryStore

whole, short, half = map(open_store, ("whole", "short", "half"))
print(push_to_hub(whole, "me/runs", folder="a"))
same(from_pretrained("me/runs", folder="a", repo_type="dataset"), whole)
push_to_hub(short, "me/runs", folder="a")
same(from_pretrained("me/runs", folder="a", repo_type="dataset"), short)
push_to_hub(whole, "me/runs")
memory = MemoryStore([key])
whole.write_to(memory)
push_to_hub(Capture(memory, (), THINGS["map"], whole.manifest), "me/memory")
same(from_pretrained("me/memory", repo_type="dataset"), whole)
for wrong in (lambda: push_to_hub(half, "me/runs"), lambda: from_pretrained("me/runs")):
    try:
        wrong()
    except HookmapError as error:
        print(error)
"""
    done = talk(hub, tmp_path / "cache", CAPTURES + code, cwd=tmp_path)
    address, unfinished, elsewhere = done.stdout.splitlines() or [done.stderr] * 3
    assert address.startswith(f"{hub.address}/datasets/me/runs/commit/"), done.stderr
    assert "half is not finished" in unfinished and "--resume" in unfinished
    assert "no such repository" in elsewhere and 'repo_type="dataset"' in elsewhere
    names = ["manifest.json", "samples.jsonl", "shards.jsonl"]
    shards = [f"shards/00000{number}.safetensors" for number in range(3)]
    held = hub.files.pop("datasets/me/runs")
    assert sorted(hub.files.pop("datasets/me/memory")) == sorted(["README.md", *names, *shards])
    assert hub.files == {} and sorted(held) == sorted(
        ["README.md", *names, *shards, *(f"a/{name}" for name in ("README.md", *names, shards[0]))]
    )
    for name in (*names, *shards):
        assert held[name] == (whole / name).read_bytes()
    card = held["a/README.md"].decode()
    assert 'from_pretrained("me/runs", folder="a", repo_type="dataset")' in card and "of owner/model" in card


@pytest.mark.slow
def test_a_broken_or_hostile_capture_is_refused(hub: Hub, tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", 3)
    held = {str(file.relative_to(whole)): file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    hub.files["datasets/me/torn"] = {**held, "samples.jsonl": held["samples.jsonl"][:-40]}
    changed = held["shards/000001.safetensors"]
    hub.files["datasets/me/changed"] = {**held, "shards/000001.safetensors": changed[:-1] + b"\1"}
    hub.files["datasets/me/hostile"] = {**held, "shards/../../../x.safetensors": changed}
    code = """
for name in ("me/hostile", "me/torn"):
    try:
        from_pretrained(name, repo_type="dataset")
    except HookmapError as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
print(from_pretrained("me/changed", repo_type="dataset").verify())
"""
    done = talk(hub, tmp_path / "cache", CAPTURES + code)
    hostile, torn, verified = done.stdout.splitlines() or [done.stderr] * 3
    assert hostile.startswith("StoreError: cannot load me/hostile"), "the client itself refuses the path"
    assert torn.startswith("StoreError") and "samples.jsonl" in torn
    assert "000001.safetensors was changed" in verified
    assert list(tmp_path.rglob("x.safetensors")) == []


@pytest.mark.slow
def test_what_a_repository_should_not_hold_is_refused(hub: Hub, tmp_path: Path) -> None:
    """Nothing is got but files of known names; a hub that claims others, outside the folder, writes nothing there."""
    hub.files["me/empty"] = {"model.pkl": b"cos\nsystem\n", "README.md": b""}
    hub.files["me/broken"] = {"vector.safetensors": b"not this"}
    hub.files["me/both"] = {"map.json": b"{}", "probes.safetensors": b""}
    hub.lists_also = ("../../map.json", "/tmp/vector.safetensors")
    code = """
from hookmap import HookmapError
for name in ("me/empty", "me/broken", "me/both", "me/none"):
    try:
        from_pretrained(name)
    except HookmapError as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""
    done = talk(hub, tmp_path / "cache", code)
    empty, broken, both, none = done.stdout.splitlines()
    assert "expected map.json" in empty and "none of them" in empty
    assert broken.startswith("StoreError") and "vector.safetensors" in broken
    assert "map.json and probes.safetensors" in both and "folder=" in both
    assert none.startswith("StoreError") and "no such repository" in none
    assert not any("model.pkl" in asked or "/tmp" in asked for asked in hub.asked)
    assert not (tmp_path / "map.json").exists()


@pytest.mark.slow
def test_a_hub_that_forbids_it_is_an_error_with_what_to_type(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = True
    code = """
from hookmap import StoreError
try:
    push_to_hub(THINGS["vector"], "other/name")
except StoreError as error:
    print(error)
"""
    done = talk(hub, tmp_path, code)
    assert "cannot upload to other/name" in done.stdout, done.stderr


@pytest.mark.parametrize("folder", ["../up", "/etc", "a/../../b", "a\\b", "*"])
def test_a_folder_that_leads_elsewhere_is_refused(folder: str) -> None:
    with raises(SelectionError, repr(folder)):
        from_pretrained("me/map", folder=folder)
    with raises(SelectionError, repr(folder)):
        push_to_hub(light.load_map("Qwen3ForCausalLM"), "me/map", folder=folder)


@pytest.mark.parametrize("repo", ["../up", "a/b/c", "/etc/passwd", ""])
def test_what_is_no_repository_is_refused(repo: str) -> None:
    with raises(SelectionError, "owner/name"):
        from_pretrained(repo)


def test_another_kind_of_repository_is_refused() -> None:
    with raises(SelectionError, "'space'", "model, dataset"):
        from_pretrained("me/map", repo_type="space")  # type: ignore[arg-type]


def test_what_cannot_be_shared_is_refused() -> None:
    with raises(SelectionError, "Tensor", "hf upload"):
        push_to_hub(torch.zeros(3), "me/tensor")  # type: ignore[arg-type]
