"""What each expert writes is held against a loop over the stored rows of a whole capture."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support import plain_hooks
from support.opened import RAGGED, opened
from support.raises import raises
from support.tiny_tokenizer import WORDS, tiny_tokenizer

import hookmap
from hookmap.analysis import charts
from hookmap.analysis.expert_outliers import _of_rows
from hookmap.cli.main import main
from hookmap.errors import SelectionError


def test_each_experts_writes_are_those_of_the_rows() -> None:
    hm = opened("mixtral")
    points = ["expert_out", "router_indices", "router_weights", "mlp_out"]
    run = hm.capture(RAGGED, points, max_new_tokens=0)
    found = hm.expert_outliers(RAGGED, batch_size=1)
    assert [*found] == [*range(hm.map.num_layers)]
    for layer, own in found.items():
        chosen: dict[int, list[float]] = {}
        largest: dict[int, torch.Tensor] = {}
        for number in range(len(RAGGED)):
            out, indices, weights, whole = (run.read(number, name, layer).double() for name in points)
            torch.testing.assert_close((out * weights[..., None]).sum(1), whole, atol=1e-5, rtol=1e-5)
            for row in range(len(out)):
                for place, expert in enumerate(indices[row].int().tolist()):
                    wrote = (out[row, place] * weights[row, place]).abs()
                    chosen.setdefault(expert, []).append(float(weights[row, place]))
                    largest[expert] = torch.maximum(largest.get(expert, wrote), wrote)
        assert own.tokens == sum(map(len, RAGGED)) and float(own.share.sum()) == pytest.approx(indices.shape[1])
        for expert in range(len(own.chosen)):
            mine = chosen.get(expert, [])
            assert int(own.chosen[expert]) == len(mine)
            assert float(own.weight[expert]) == pytest.approx(sum(mine) / len(mine) if mine else 0, rel=1e-5)
            if mine:
                torch.testing.assert_close(own.largest[expert], largest[expert], atol=1e-5, rtol=1e-5)
        best = max(largest, key=lambda expert: float(largest[expert][5]))
        assert own.of(5)[0] == (best, pytest.approx(float(largest[best][5]), rel=1e-5))
        assert own.as_json()[best]["expert"] == best
        with raises(SelectionError, "feature 99999"):
            own.of(99999)


def test_a_planted_expert_is_found_and_drawn() -> None:
    """One expert of one layer writes large numbers to one feature: table, picture and outlier features say which."""
    model = plain_hooks.build("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 5] *= 1e5
    hm = hookmap.open(model, tokenizer=tiny_tokenizer())
    texts = [[(7 * n + 3 * m) % 90 + 1 for m in range(12)] for n in range(12)]
    found = hm.expert_outliers(texts)
    (expert, size), (_, next_size) = found[1].of(5, top=2)
    assert expert == 2 and size > 1000 * next_size and 0 < float(found[1].share[2]) < 1
    assert all(float(own.largest.max()) < size / 1000 for layer, own in found.items() if layer < 1)
    best = max(charts.expert_outliers(found).to_dict()["data"]["values"], key=lambda row: row["value"])
    assert (best["layer"], best["expert"], best["feature"]) == ("1", 2, 5)
    features = hm.outliers(texts).features
    assert features[0].feature == 5 and features[0].massive


def test_a_dense_model_has_none() -> None:
    with raises(SelectionError, "no mixture of experts"):
        opened("gpt2").expert_outliers(RAGGED)


def test_tokens_that_are_not_finite_are_left_out() -> None:
    out, indices, weights = torch.ones(3, 2, 4), torch.tensor([[0, 1], [1, 2], [0, 2]]), torch.full((3, 2), 0.5)
    out[1, 0, 2] = torch.nan
    found = _of_rows(out, indices, weights)
    assert found.tokens == 2 and found.chosen.tolist() == [2, 1, 1] and bool((found.largest == 0.5).all())
    nothing = _of_rows(out[1:2], indices[1:2], weights[1:2])
    assert nothing.tokens == 0 and nothing.as_json() == [] and nothing.share.tolist() == []


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_the_command_tells_of_experts(tmp_path: Path) -> None:
    plain_hooks.build("mixtral").save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    run = ["outliers", str(tmp_path / "m"), "--prompt", " ".join(WORDS[:8]), "--experts"]
    printed = CliRunner().invoke(main, [*run, "--json"])
    assert printed.exit_code == 0, printed.output
    by = json.loads(printed.stdout)["experts"]
    assert {*by} == {str(layer) for layer in range(len(by))} and len(by) > 1
    largest = max((each["largest"], layer, each["expert"]) for layer, own in by.items() for each in own)
    shown = CliRunner().invoke(main, [*run, "--top", "1"])
    row = next(line for line in shown.stderr.splitlines() if f"{largest[0]:.5g}" in line)
    assert row.split()[:2] == [largest[1], str(largest[2])] and "more: --top" in shown.stderr
    plain_hooks.build("gpt2").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    dense = CliRunner().invoke(main, ["outliers", str(tmp_path / "dense"), *run[2:]])
    assert dense.exit_code == 1 and "no mixture of experts" in dense.stderr
    pytest.importorskip("vl_convert")
    drawn = CliRunner().invoke(main, [*run, "--svg", "e.svg"])
    assert drawn.exit_code == 0 and "expert" in (tmp_path / "e.svg").read_text()
