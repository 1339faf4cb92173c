"""What each expert writes is held against a loop over the stored rows of a whole capture."""

import pytest
import torch
from support.opened import RAGGED, opened
from support.raises import raises

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


def test_a_dense_model_has_none() -> None:
    with raises(SelectionError, "no mixture of experts"):
        opened("gpt2").expert_outliers(RAGGED)
