"""`hookmap circuit` and `hookmap saliency`: what they print and write is what Python gives."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from support import plain_hooks
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_folder")]
PAIR = {"clean": "to be or not", "corrupted": "to be or be", "answer": "to", "wrong": "not"}
ONE = ("--clean", PAIR["clean"], "--corrupted", PAIR["corrupted"], "--target", "to", "--against", "not")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    plain_hooks.build("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def run(*args: str, code: int = 0) -> Result:
    done = CliRunner().invoke(main, list(args))
    assert done.exit_code == code, done.output
    return done


def told(*args: str) -> Any:
    return json.loads(run(*args, "--json").stdout)


def test_nodes_are_those_of_python(folder: str) -> None:
    hm = hookmap.open(folder)
    found = hm.attribution_patch([PAIR], check=4)
    Path("pairs.jsonl").write_text(json.dumps(PAIR))
    for given in (ONE, ("--pairs", "pairs.jsonl")):
        said = told("circuit", folder, *given, "--compare", "4")
        assert said["nodes"][0]["node"] == found.nodes()[0][0]
        assert said["nodes"][0]["mean"] == pytest.approx(float(found.nodes()[0][1].mean()), rel=1e-4)
    done = run("circuit", folder, *ONE, "--compare", "4", "-o", "nodes", "--png", "nodes.png")
    assert done.stdout == "nodes.safetensors\n" and Path("nodes.png").stat().st_size and "correlation" in done.stderr
    assert set(load_file("nodes.safetensors")) == {
        f"{point}.{layer}" for point in ("z", "mlp_out") for layer in range(3)
    }


def test_edges_and_their_circuits_are_those_of_python(folder: str) -> None:
    found = hookmap.open(folder).edge_attribution([PAIR], check=4, noising=True)
    said = told("circuit", folder, *ONE, "--edges", "--compare", "4", "--noising", "--faithfulness")
    assert said["edges"] == found.edges and said["noising"]
    assert [(each["from"], each["to"]) for each in said["top"][:3]] == [edge[:2] for edge in found.top(3)]
    assert said["faithfulness"]["signed"]["values"][-1] == pytest.approx(1.0, abs=1e-3)
    shown = run("circuit", folder, *ONE, "--edges", "--compare", "4", "--faithfulness", "--top", "2")
    assert "CPR" in shown.stderr and "CMD" in shown.stderr and "→" in shown.stderr


def test_saliency_is_that_of_python(folder: str) -> None:
    hm = hookmap.open(folder)
    found = hm.saliency([PAIR["clean"]], hookmap.metrics.logit_difference("to", "not"))
    asked = ("saliency", folder, "--prompt", PAIR["clean"], "--target", "to")
    said = told(*asked, "--against", "not")
    assert said["prompts"][0]["scores"] == pytest.approx(found.scores[0].tolist(), rel=1e-4)
    assert "of it is missed" in run(*asked).stderr


def test_a_logit_is_split_into_experts_as_in_python(tmp_path: Path) -> None:
    folder = str(tmp_path / "moe")
    plain_hooks.build("qwen3_moe").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    found = hookmap.open(folder).attribute(PAIR["clean"], "to", experts=[1])
    said = told("attribute", folder, "--prompt", PAIR["clean"], "--target", "to", "--experts", "1")
    assert said["parts"] == list(found.parts) and sum("expert" in part for part in found.parts) > 1
    assert [each[0] for each in said["values"]] == pytest.approx(found.values[:, 0].tolist(), rel=1e-4, abs=1e-6)
    refused = run("attribute", folder, "--prompt", PAIR["clean"], "--target", "to", "--experts", "9", code=1)
    assert "9" in refused.stderr and "Traceback" not in refused.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "--pairs FILE, or one pair"),
        (("--pairs", "pairs.jsonl", "--target", "to"), "of one pair"),
        ((*ONE, "--faithfulness"), "add --edges"),
        ((*ONE, "--edges", "--points", "q"), "of nodes"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(folder: str, args: tuple[str, ...], words: str) -> None:
    assert words in run("circuit", folder, *args, code=2).stderr
