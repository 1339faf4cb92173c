"""Layers that run several times, on the command line and over HTTP: `--calls`, `calls`, and what is shown of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from support.looped import LOOPED
from support.served import serving
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.analysis.grid import load_grid
from hookmap.cli.main import main
from hookmap.cli.parsing import parse_calls

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("own_folder"),
    pytest.mark.skipif("dory" not in LOOPED, reason="Dory is in transformers from 5.24 on"),
]
TEXT = "to be or not to be"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Dory of five layers: 2 and 3 run twice."""
    path = tmp_path_factory.mktemp("dory")
    LOOPED["dory"].build().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def run(*args: str) -> Result:
    done = CliRunner().invoke(main, list(args))
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize(
    ("text", "calls"), [("all", "all"), ("last", "last"), ("0,2", [0, 2]), ("0-2", [0, 1, 2]), ("-1", [-1])]
)
def test_calls_are_numbers_ranges_all_or_last(text: str, calls: Any) -> None:
    assert parse_calls(text) == calls


def test_what_is_no_call_is_wrong_usage(folder: str) -> None:
    for text, message in (("first", "'first' is no call: write 0,2"), ("3-1", "counts down"), (",", "no call given")):
        done = CliRunner().invoke(main, ["capture", folder, "--points", "resid_post", "--calls", text])
        assert done.exit_code == 2 and "--calls" in done.stderr and message in done.stderr
    done = CliRunner().invoke(main, ["capture", folder, "--points", "resid_post", "--calls", "2", "--prompt", TEXT])
    assert done.exit_code == 1 and "call 2 is out of range: layers 2–3 run 2 times" in done.stderr


def test_capture_takes_calls_and_inspect_shows_them(folder: str) -> None:
    asked = ("capture", folder, "--points", "resid_post", "--layers", "1,2", "--prompt", TEXT, "--max-new-tokens", "3")
    run(*asked, "-o", "all")
    assert hookmap.open_store("all").keys == (("resid_post", 1), ("resid_post", 2, 0), ("resid_post", 2, 1))
    done = run(*asked, "--calls", "last", "-o", "last")
    assert hookmap.open_store("last").keys == (("resid_post", 1), ("resid_post", 2, 1))
    assert "2 tensors" in done.stderr
    shown = run("inspect", "all")
    assert "call" in shown.stderr and not json.loads(run("inspect", "last", "--json").stdout)["tensors"][0].get("call")
    assert json.loads(run("inspect", "last", "--json").stdout)["tensors"][1]["call"] == 1
    run("store", "export", "all", "--to", "numpy", "--call", "1", "-o", "numpy")
    assert [file.name for file in Path("numpy").glob("resid*")] == ["resid_post.2.call1.npy"]


def test_hookmap_yaml_and_the_environment_give_calls(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("hookmap.yaml").write_text(f"model: {folder}\npoints: resid_mid\nlayers: 3\ncalls: last\nmax_new_tokens: 1\n")
    run("capture", "--prompt", TEXT, "-o", "file")
    assert hookmap.open_store("file").keys == (("resid_mid", 3, 1),)
    monkeypatch.setenv("HOOKMAP_CALLS", "0")
    run("capture", "--prompt", TEXT, "-o", "environment")
    assert hookmap.open_store("environment").keys == (("resid_mid", 3, 0),)
    monkeypatch.delenv("HOOKMAP_CALLS")
    Path("hookmap.yaml").write_text("calls: [first]\n")
    done = CliRunner().invoke(main, ["capture", folder, "--points", "embed"])
    assert (
        done.exit_code == 2
        and "calls: expected a list, or one text such as '0,2', '0-3', 'last' or 'all'" in done.stderr
    )


def test_lens_patch_steer_and_vector_take_calls(folder: str) -> None:
    said = json.loads(run("lens", folder, "--prompt", TEXT, "--calls", "last", "--json").stdout)
    assert (said["layers"], said["calls"]) == ([0, 1, 2, 3, 4], [None, None, 1, 1, None])
    assert "2 call 0" in run("lens", folder, "--prompt", TEXT).stderr
    Path("pairs.jsonl").write_text('{"positive": "to be", "negative": "or not"}\n')
    run("vector", "make", folder, "--pairs", "pairs.jsonl", "--layers", "2", "--calls", "0", "-o", "v.safetensors")
    steer = ("steer", folder, "--vector", "v.safetensors", "--strength", "9", "--prompt", TEXT, "--json")
    assert json.loads(run(*steer, "--max-new-tokens", "3").stdout)[0]["prompt"] == TEXT
    patch = ("patch", folder, "--clean", "to be", "--corrupted", "or not", "--point", "resid_post", "--layers", "2")
    same = run(*patch, "--calls", "1", "--max-new-tokens", "2").stdout
    other = run(*patch, "--calls", "1", "--source-calls", "0", "--max-new-tokens", "2").stdout
    hm = hookmap.open(folder)
    for said, source in ((same, {}), (other, {"calls": 0})):
        edit = {"do": "patch", "point": "resid_post", "layers": 2, "calls": 1, "source": {"prompt": "to be", **source}}
        expected = hm.generate("or not", [edit], max_new_tokens=2).texts[0]
        assert said.splitlines()[2].split(None, 1) == ["patched", expected]
    found = []
    for source in ("0", "1"):
        sweep = ("--sweep", "--target", "be", "--against", "to", "--calls", "1", "--source-calls", source)
        run(*patch, *sweep, "-o", source)
        found.append(load_grid(f"{source}.safetensors").values)
    expected_grid = hm.sweep("to be", "or not", "be", "to", point="resid_post", layers=[2], calls=1, source_calls=0)
    assert torch.allclose(found[0], expected_grid.effect.values, atol=1e-5) and not torch.allclose(*found, atol=1e-4)
    done = CliRunner().invoke(main, [*patch, "--source-calls", "first"])
    assert done.exit_code == 2 and "--source-calls: 'first' is no call" in done.stderr.replace("Invalid value for ", "")


def test_discover_says_which_layers_run_again(folder: str) -> None:
    assert "Layers 2–3 run 2 times in one forward pass, calls 0 to 1" in " ".join(
        run("discover", folder).stderr.split()
    )


def test_the_server_records_runs_and_edits_them(folder: str, tmp_path: Path) -> None:
    hm = hookmap.open(folder)
    with serving(tmp_path / "sessions", hm, points=("resid_post",), layers=(2,)) as served:
        asked: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0}
        plain = hm.capture([[5, 6, 7]], "resid_post", 2, max_new_tokens=3)
        meta = served.post("/v1/completions", **asked, store_activations=True).json()["activations_meta"]
        assert [each["call"] for each in meta["tensors"]] == [0, 1]
        for each in meta["tensors"]:
            (rows,) = safetensors.torch.load(served.get(each["where"]).content).values()
            assert torch.equal(rows, plain.read(0, "resid_post", 2, each["call"]))
        record = {"points": "resid_post", "layers": 2, "calls": "last"}
        last = served.post("/v1/completions", **asked, hookmap=record).json()["activations_meta"]
        assert [each["call"] for each in last["tensors"]] == [1]
        edit = {"do": "scale", "point": "resid_post", "layers": 2, "calls": 1, "factor": 3.0}
        changed = served.post("/v1/completions", **asked, hookmap={**record, "interventions": [edit]}).json()
        (rows,) = safetensors.torch.load(
            served.get(changed["activations_meta"]["tensors"][0]["where"]).content
        ).values()
        assert torch.allclose(rows[0], 3 * plain.read(0, "resid_post", 2, 1)[0], atol=1e-4)
        patch = {
            "do": "patch",
            "point": "resid_post",
            "layers": 2,
            "calls": 1,
            "source": {"prompt": [5, 6, 7], "calls": 0},
        }
        changed = served.post("/v1/completions", **asked, hookmap={**record, "interventions": [patch]}).json()
        (rows,) = safetensors.torch.load(
            served.get(changed["activations_meta"]["tensors"][0]["where"]).content
        ).values()
        assert torch.allclose(rows[:3], plain.read(0, "resid_post", 2, 0)[:3], atol=1e-5)
        wrong = served.post("/v1/completions", **asked, hookmap={**record, "calls": 2})
        assert wrong.status_code == 400 and "call 2 is out of range" in wrong.text
        figures = {"point": "resid_post", "layers": "all", "of": "norm"}
        told = served.post("/v1/completions", **asked, stream=True, hookmap={"return": "none", "summary": figures}).text
        line = next(line for line in told.splitlines() if '"calls"' in line)
        assert '"calls":[null,null,0,0,1,1,null]' in line.replace(" ", "")
