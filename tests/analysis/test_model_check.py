"""`hookmap check`: right models pass, and what is wrong is found out and named."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support import plain_hooks
from support.opened import opened

import hookmap
from hookmap.analysis.model_check import Finding, ModelCheck, check_model
from hookmap.cli.main import main
from hookmap.demo import MODEL_PATH
from hookmap.model import HookedModel

TEXTS = [[5, 17, 3, 60, 5, 17, 9], [11, 2], [7, 7, 7, 90, 1, 7, 3, 4, 1, 30, 31]]
ASKED = ["map", "hooks", "dtype", "cache", "attention", "batch", "nnsight", "writes", "cost"]


def answers(hm: HookedModel) -> dict[str, Finding]:
    return {finding.about: finding for finding in check_model(hm, TEXTS, max_new_tokens=4)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", pytest.param("falcon_7b", marks=pytest.mark.slow)])
def test_a_right_model_passes_and_every_question_is_answered(name: str) -> None:
    found = answers(opened(name))
    assert list(found) == ASKED
    assert {each.state for about, each in found.items() if about != "cost"} == {"right"}, found
    assert found["dtype"].figures["distance"] < 1e-4 and found["dtype"].figures["other"] == 0
    assert not any("not answered" in each.found for each in found.values())


@pytest.mark.slow
def test_bfloat16_is_told_as_numbers_that_are_rounding() -> None:
    found = answers(hookmap.open(plain_hooks.build("llama").to(torch.bfloat16)))
    assert 1e-3 < found["dtype"].figures["distance"] < 0.2 and found["dtype"].state == "note"
    assert found["map"].state == "right"  # checked in float64
    assert found["cache"].figures["distance"] < 2 * found["dtype"].figures["distance"]


@pytest.mark.slow
def test_a_wrong_map_is_found_out(tmp_path: Path) -> None:
    hm = hookmap.open(plain_hooks.build("llama"))
    hm.map.save(tmp_path / "map.json")
    right = (tmp_path / "map.json").read_text()
    wrong = right.replace("post_attention_layernorm", "input_layernorm")
    assert wrong != right
    (tmp_path / "map.json").write_text(wrong)
    hm.map = hookmap.load_map(tmp_path / "map.json")  # `open` refuses it
    found = answers(hm)
    assert found["map"].state == "wrong" and found["map"].figures["failed"]
    assert found["hooks"].state == "right"  # a capture reads what the map names


@pytest.mark.slow
def test_the_command_answers_for_the_bundled_model() -> None:
    done = CliRunner().invoke(main, ["check", str(MODEL_PATH), "--max-new-tokens", "2", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["passed"] is True and [each["about"] for each in told["findings"]] == ASKED
    assert "float32 on" in told["setting"]


def test_an_answer_fits_a_line_each() -> None:
    result = ModelCheck(
        "m", "float32 on cpu", (Finding("map", "right", "all checks pass"), Finding("hooks", "wrong", "no"))
    )
    assert repr(result) == "m (float32 on cpu)\nok map: all checks pass\nNO hooks: no" and not result.passed
