"""`hookmap patch` with pairs: what is wrong is said before a model is loaded, and the files hold what Python gives."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import hookmap
from hookmap.analysis.grid import load_grid
from hookmap.cli.main import main
from hookmap.demo import MODEL_PATH

ROWS = [
    {"id": "a", "clean": "3+4=", "corrupted": "3+5=", "answer": "7", "wrong": "8"},
    {"id": "b", "clean": "2+6=", "corrupted": "2+1=", "answer": "8", "wrong": "3"},
]


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["patch", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def pairs(tmp_path: Path, own_folder: None) -> str:
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return str(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "--clean TEXT and --corrupted TEXT, or --pairs FILE"),
        (["--pairs", "FILE", "--clean", "x"], "or --pairs FILE"),
        (["--pairs", "FILE", "--target", "4"], "--target: of --clean and --corrupted"),
        (["--pairs", "FILE", "--resume"], "name it with -o FILE"),
        (["--pairs", "FILE", "--heads", "x"], "'x' is no head"),
        (["--pairs", "none.txt"], "none.txt"),
        (["--clean", "a", "--corrupted", "b", "--metric", "loss", "--noising"], "--metric, --noising: of a sweep"),
        (["--clean", "a", "--corrupted", "b", "--sweep"], "--target TOKEN"),
    ],
)
def test_wrong_usage_is_told_before_a_model_is_loaded(given: list[str], told: str, pairs: str) -> None:
    code, out, err = invoke("no/model", *(pairs if each == "FILE" else each for each in given))
    assert code == 2 and told in " ".join(err.split()) and not out, err


@pytest.mark.slow
def test_the_files_hold_what_python_gives_and_a_finished_sweep_leaves_no_other(pairs: str, tmp_path: Path) -> None:
    given = ["--pairs", pairs, "--point", "z", "--over", "heads", "--layers", "8,12", "--heads", "1-3", "--noising"]
    code, out, err = invoke(*given, "--to", "logits", "--not-through-mlps", "-o", str(tmp_path / "s"))
    assert code == 0 and out.strip() == str(tmp_path / "s.safetensors"), err
    assert "95 % interval" in err and "means of 2 pairs" in err and "not through MLPs" in err
    want = hookmap.open(MODEL_PATH).sweep(
        pairs, point="z", over="heads", layers=[8, 12], heads=[1, 2, 3], noising=True, to="logits", through_mlps=False
    )
    grid = load_grid(tmp_path / "s")
    assert grid.positions == (1, 2, 3) and grid.column == "head"
    assert float((grid.values - want.effect.values).abs().max()) < 1e-4
    found = json.loads((tmp_path / "s.json").read_text())
    assert [each["id"] for each in found["pairs"]] == ["a", "b"] and found["path"] == want.path
    assert not list(tmp_path.glob("*.sweep.jsonl"))
