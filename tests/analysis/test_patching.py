"""A sweep equals patches made one by one, and finds on the demo model where an operand's digit moves to the answer."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from support import plain_hooks
from support.raises import raises

import hookmap
from hookmap.analysis.grid import Grid, load_grid
from hookmap.analysis.patching import sweep
from hookmap.cli.main import main
from hookmap.demo import MODEL_PATH
from hookmap.model import HookedModel

CLEAN, CORRUPTED = [5, 17, 3, 60, 22], [5, 17, 40, 60, 22]


@cache
def demo() -> HookedModel:
    return hookmap.open(MODEL_PATH)


def asked(second: int, answer: str = "") -> str:
    question = f"Tom has 3 apples. He buys {second} more. How many apples does Tom have?"
    return demo().encode(question, True)[0].text + answer


@pytest.mark.slow
def test_a_sweep_is_its_patches_one_by_one() -> None:
    hm = hookmap.open(plain_hooks.build("llama"))
    shown: list[tuple[int, int]] = []
    found = sweep(hm, CLEAN, CORRUPTED, 7, 9, point="resid_mid", batch_size=3, progress=lambda *n: shown.append(n))
    assert found.grid.layers == (0, 1, 2) and found.grid.positions == (0, 1, 2, 3, 4)
    assert shown == [(3, 15), (5, 15), (8, 15), (10, 15), (13, 15), (15, 15)]
    for layer in found.grid.layers:
        for place in found.grid.positions:
            patch = {
                "do": "patch",
                "point": "resid_mid",
                "layers": layer,
                "positions": [place],
                "source": {"prompt": CLEAN},
            }
            logits = hm.capture(CORRUPTED, ["logits"], max_new_tokens=0, interventions=[patch]).read(0, "logits")[-1]
            torch.testing.assert_close(found.grid.values[layer, place], logits[7] - logits[9], rtol=1e-4, atol=1e-4)
    effect = found.effect.values
    assert effect[:, :2].abs().max() < 1e-4, "before the difference nothing differs"
    torch.testing.assert_close(effect[2, 4], torch.tensor(1.0), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_sweep_keeps_the_order_of_positions_and_refuses_those_that_are_not_there() -> None:
    hm = hookmap.open(plain_hooks.build("llama"))
    found, whole = (sweep(hm, CLEAN, CORRUPTED, 7, 9, positions=where) for where in ([3, -3], "all"))
    assert found.grid.positions == (3, 2)
    torch.testing.assert_close(found.grid.values, whole.grid.values[:, [3, 2]], rtol=1e-4, atol=1e-5)
    with raises(hookmap.SelectionError, "positions 5: no prompt has them:", "from -5 to 4"):
        sweep(hm, CLEAN, CORRUPTED, 7, 9, positions=[0, 5])


@pytest.mark.slow
def test_a_sweep_of_some_heads_is_their_patches_and_heads_that_are_none_are_refused() -> None:
    hm = hookmap.open(plain_hooks.build("llama"))
    found = sweep(hm, CLEAN, CORRUPTED, 7, 9, point="z", layers=1, positions=[4, 2], heads=[2, 0])
    for column, place in enumerate((4, 2)):
        where = {"point": "z", "layers": 1, "positions": [place], "heads": [2, 0]}
        patch = {"do": "patch", **where, "source": {"prompt": CLEAN}}
        logits = hm.capture(CORRUPTED, ["logits"], max_new_tokens=0, interventions=[patch]).read(0, "logits")[-1]
        torch.testing.assert_close(found.grid.values[0, column], logits[7] - logits[9], rtol=1e-4, atol=1e-4)
    for heads, point, told in (
        ([9], "z", "has 0 to 3"),
        ([0], "resid_pre", "has no heads"),
        ([1, 1], "z", "once"),
        ([], "z", "no heads"),
    ):
        with pytest.raises(hookmap.InterventionError, match=told):
            sweep(hm, CLEAN, CORRUPTED, 7, 9, point=point, heads=heads)


@pytest.mark.slow
def test_the_second_operand_moves_to_the_answer_in_layer_8() -> None:
    """Behind "Tom has 3+" comes the second operand. Until layer 8 it is at its own digit, and after it at the "+"."""
    clean, corrupted = asked(4, "Tom has 3+"), asked(5, "Tom has 3+")
    digit = len(demo().encode(corrupted.partition("5")[0], False)[0].token_ids)
    found = sweep(demo(), clean, corrupted, "4", "5", positions=[digit - 1, digit, digit + 1, -1], layers=range(20))
    assert found.grid.tokens[1] == "5" and found.grid.tokens[-1] == "+"
    assert found.clean > 5 > -5 > found.corrupted
    effect = found.effect.values
    for layer in range(20):
        here, there = (effect[layer, 1], effect[layer, 3]) if layer <= 8 else (effect[layer, 3], effect[layer, 1])
        assert here > 0.9 and abs(there) < 0.1, (layer, effect[layer])
        assert abs(effect[layer, 0]) < 0.1 and abs(effect[layer, 2]) < 0.1
    likely = sweep(demo(), clean, corrupted, "4", positions=[digit], layers=[0, 19])
    assert likely.clean > 0.95 and likely.corrupted < 0.05 and likely.effect.values[0, 0] > 0.95


@pytest.mark.slow
def test_a_patched_operand_changes_what_is_generated() -> None:
    """The corrupted prompt answers the clean question where the operand's place is patched before it is read."""
    patch = {
        "do": "patch",
        "point": "resid_pre",
        "positions": "text=5",
        "source": {"prompt": asked(4), "positions": "text=4"},
    }
    early, late = ([{**patch, "layers": layer}] for layer in (8, 12))
    assert demo().generate(asked(5), early, None, 12).texts[0].startswith("Tom has 3+4=")
    assert demo().generate(asked(5), late, None, 12).texts[0].startswith("Tom has 3+5=")


@pytest.mark.slow
def test_what_cannot_be_swept_is_refused() -> None:
    hm = hookmap.open(plain_hooks.build("opt"))
    for clean, corrupted, options, message in (
        (CLEAN, CORRUPTED[:3], {}, "has 5 tokens and the corrupted one 3"),
        (CLEAN, CLEAN, {}, "are the same"),
        (CLEAN, CORRUPTED, {"point": "attn_result"}, "the model holds no such tensor: write z"),
        ([CLEAN, CLEAN], CORRUPTED, {}, "one clean and one corrupted prompt, got 2"),
    ):
        with pytest.raises(hookmap.InterventionError, match=message):
            sweep(hm, clean, corrupted, 7, 9, **options)  # type: ignore[arg-type]
    with raises(hookmap.SelectionError, "'generated': none of the 5 tokens"):
        sweep(hm, CLEAN, CORRUPTED, 7, 9, positions="generated")
    with raises(hookmap.SelectionError, "'12' is 2 tokens"):
        sweep(demo(), asked(4), asked(5), "12", "5")
    with raises(hookmap.InterventionError, "nothing to bring back"):
        sweep(hm, CLEAN, CORRUPTED, 7, 7)


def test_a_sweep_is_saved_and_read_again(tmp_path: Path) -> None:
    hm = hookmap.open(plain_hooks.build("gpt2"))
    found = sweep(hm, CLEAN, CORRUPTED, 7, 9, layers=[0, 2])
    read = load_grid(found.save(tmp_path / "deep" / "run"))
    assert torch.equal(read.values, found.effect.values)
    assert (read.layers, read.positions, read.point) == ((0, 2), (0, 1, 2, 3, 4), "resid_pre")
    assert json.loads((tmp_path / "deep" / "run.json").read_text())["clean"] == found.clean
    assert (tmp_path / "deep" / "run.csv").read_text().startswith("layer,position,token,value\n0,0,")
    with raises(hookmap.StoreError, "no grid that hookmap wrote"):
        load_grid(tmp_path / "none")
    with raises(hookmap.CaptureError, "got [2, 2] for 1 layers"):
        Grid(torch.zeros(2, 2), (0,), (0, 1), ("a", "b"), "m", "resid_pre")


@pytest.mark.slow
def test_a_vector_of_contrast_pairs_steers_by_its_file(tmp_path: Path) -> None:
    made = demo().steering_vector([asked(4)], [asked(9)], layers=[4, 8])
    made.save(tmp_path / "v.safetensors")
    code, out, _ = invoke("steer", "--vector", str(tmp_path / "v.safetensors"), "--strength", "20", "--json")
    (row,) = json.loads(out)
    prompt = asked(4)
    assert code == 0 and row["with"] == demo().generate(prompt, made.interventions(20.0)).texts[0] != row["without"]


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.slow
def test_the_command_line_patches_sweeps_and_steers(tmp_path: Path) -> None:
    prompts = [f"Tom has 3 apples. He buys {n} more. How many apples does Tom have?" for n in (4, 5)]
    pair = ["--clean", prompts[0], "--corrupted", prompts[1], "--layers", "8"]
    pair.append("--chat")
    code, out, _ = invoke("patch", *pair, "--max-new-tokens", "12")
    assert code == 0 and "corrupted  Tom has 3+5=" in out and "patched    Tom has 3+4=" in out
    where = ["--answer", "Tom has 3+", "--positions", "-1,30,32", "-o", str(tmp_path / "s")]
    code, out, err = invoke("patch", *pair, *where, "--sweep", "--target", "4", "--against", "5")
    assert code == 0 and out.strip() == str(tmp_path / "s.safetensors") and "clean 11.69" in err
    code, _, err = invoke("patch", *pair, "--sweep")
    assert code == 2 and "--target TOKEN" in err

    save_file({"v": torch.ones(demo().map.d_model) * 40}, tmp_path / "v.safetensors")
    steer = [
        "--vector",
        str(tmp_path / "v.safetensors"),
        "--key",
        "v",
        "--layers",
        "8",
        "--max-new-tokens",
        "12",
        "--json",
    ]
    code, out, _ = invoke("steer", *steer)
    (row,) = json.loads(out)
    assert code == 0 and row["without"].startswith("Tom has 3+4") and row["with"] != row["without"]
    (tmp_path / "e.yaml").write_text(
        "- {do: steer, point: resid_post, layers: 8, vector: {file: v.safetensors, key: v}, strength: 0}"
    )
    code, out, _ = invoke("steer", "--intervene", str(tmp_path / "e.yaml"), "--max-new-tokens", "12", "--json")
    (same,) = json.loads(out)
    assert code == 0 and same["with"] == same["without"] == row["without"]
    code, out, _ = invoke(
        "capture", "--intervene", str(tmp_path / "e.yaml"), "--points", "resid_post", "--layers", "8",
        "--max-new-tokens", "2", "-o", str(tmp_path / "run"), "--before",
    )  # fmt: skip
    before = hookmap.open_store(tmp_path / "run" / "before")
    assert torch.equal(before.read(0, "resid_post", 8), hookmap.open_store(tmp_path / "run").read(0, "resid_post", 8))
    assert before.manifest.settings["before"] == "these rows"
    noted = hookmap.open_store(tmp_path / "run").manifest.settings["interventions"]
    assert code == 0 and noted[0]["do"] == "steer" and "sha256" in noted[0]["vector"]
    code, _, err = invoke("capture", "--before", "--points", "resid_post", "--layers", "8")
    assert code == 2 and "--intervene FILE" in err
    code, _, err = invoke("steer", "--intervene", str(tmp_path / "e.yaml"), "--strength", "4", "--keep-norm")
    assert code == 2 and "--strength, --keep-norm: of --vector" in err
    for more in (["--key", "v"], []):
        code, _, err = invoke("steer", "--vector", str(tmp_path / "none.safetensors"), *more)
        assert code == 1 and "there is no such file" in err
