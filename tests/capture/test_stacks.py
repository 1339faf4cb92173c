"""Stacks are held against the tensors one by one, and sums of branches against the model's own stream."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.opened import EACH_STRUCTURE, RAGGED, opened
from support.raises import raises

import hookmap

EVEN = [[5, 17, 3, 60], [11, 2, 33, 9]]
POINTS = ["resid_pre", "mixer_out", "mlp_out", "resid_post"]


def stream_of(hm: Any, ids: list[int], number: int) -> torch.Tensor:
    """What plain hooks see leave or enter the block `number` of the layer list; the last one leaves."""
    seen: list[torch.Tensor] = []
    layers = hm.model.get_submodule(hm.map.layers_path.rpartition(".")[0])
    if number < len(layers):
        handle = layers[number].register_forward_pre_hook(lambda module, args, kwargs: seen.append(
            args[0] if args else kwargs["hidden_states"]), with_kwargs=True)  # fmt: skip
    else:
        handle = layers[-1].register_forward_hook(lambda module, args, output: seen.append(
            output[0] if isinstance(output, tuple) else output))  # fmt: skip
    with torch.no_grad():
        hm.model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0].reshape(len(ids), -1)


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_the_parts_of_the_stream_sum_to_what_hooks_see_of_it(name: str) -> None:
    hm = opened(name)
    points = [point for point in POINTS if point in hm.map.points]
    run: Any = hm.capture(EVEN, points, max_new_tokens=0)
    if name == "bert":  # its stream is normed itself
        with raises(hookmap.SelectionError, "norm the stream itself", "accumulated_resid"):
            run.decompose_resid()
        return
    for layer in (0, 2, None):
        labels, values = run.decompose_resid(layer)
        assert isinstance(values, torch.Tensor) and len(labels) == len(values)
        assert labels[0] == "resid_pre[0]"
        for number, ids in enumerate(EVEN):
            stream = stream_of(hm, ids, 3 if layer is None else layer)
            torch.testing.assert_close(values[:, number].sum(0), stream, atol=1e-4, rtol=1e-4)
        for part, tensor in zip(labels, values, strict=True):
            point, _, place = part.partition("[")
            assert torch.equal(tensor, run[point, int(place.rstrip("]"))])


@pytest.mark.parametrize("name", ["gpt2", "bert", "falcon_7b"])
def test_the_stream_is_stacked_as_it_grows(name: str) -> None:
    hm = opened(name)
    labels, values = hm.capture(EVEN, ["resid_pre", "resid_post"], max_new_tokens=0).accumulated_resid()
    assert labels == ("resid_pre[0]", "resid_pre[1]", "resid_pre[2]", "resid_post[2]")
    for number, ids in enumerate(EVEN):
        for layer in range(4):
            assert torch.allclose(values[layer][number], stream_of(hm, ids, layer), atol=1e-5)


def test_the_middle_of_each_block_is_stacked_between() -> None:
    run = opened("gpt2").capture(RAGGED, ["resid_pre", "resid_mid", "resid_post"], max_new_tokens=0)
    labels, values = run.accumulated_resid(mid=True)
    assert labels[:3] == ("resid_pre[0]", "resid_mid[0]", "resid_pre[1]")
    assert [tuple(each.shape) for each in values] == [(7, len(ids), 32) for ids in RAGGED]
    assert torch.equal(values[1][3], run.read(1, "resid_mid", 1))


def test_what_is_missing_is_named_with_what_to_capture() -> None:
    run = opened("gpt2").capture(EVEN, ["mixer_out", "resid_post"], [1, 2], max_new_tokens=0)
    with raises(
        hookmap.SelectionError, "resid_pre[0]", "mlp_out[0]", "['resid_pre', 'mixer_out', 'mlp_out', 'resid_post']"
    ):
        run.decompose_resid()
    with raises(hookmap.SelectionError, "accumulated_resid needs resid_pre too"):
        run.accumulated_resid()
    with raises(hookmap.SelectionError, "layer 3", "0 to 2"):
        opened("gpt2").capture(EVEN, POINTS, max_new_tokens=0).decompose_resid(3)


def test_a_stream_that_its_branches_do_not_give_is_refused() -> None:
    """As a factor on the stream would have it, which no point shows."""
    run = opened("gpt2").capture(EVEN, POINTS, max_new_tokens=0)
    edit = {"do": "steer", "point": "resid_mid", "layers": 1, "vector": torch.ones(32), "strength": 5}
    pushed = opened("gpt2").capture(EVEN, POINTS, max_new_tokens=0, interventions=[edit])
    assert run.decompose_resid().labels
    with raises(hookmap.SelectionError, "not the sum of what the branches add"):
        pushed.decompose_resid()


def test_a_point_alone_is_every_layer_stacked_here_and_on_disk(tmp_path: Path) -> None:
    hm = opened("llama")
    run: Any = hm.capture(EVEN, ["resid_post", "z", "pattern", "logits"], max_new_tokens=0)
    run.save(tmp_path / "run")
    held: Any
    for held in (run, hookmap.open_store(tmp_path / "run")):
        for point in ("resid_post", "z", "pattern", "layers_output"):
            found = held[point]
            assert found.shape[0] == 3
            assert all(torch.equal(found[layer], held[point, layer]) for layer in range(3))
        assert held["logits"].shape == (2, 4, 97)
    some: Any = hm.capture(EVEN, "resid_post", [0, 2], max_new_tokens=0)
    assert torch.equal(some["resid_post"][1], some["resid_post", 2])
    ragged = hm.capture(RAGGED, "resid_post", max_new_tokens=0)
    assert [tuple(each.shape) for each in ragged["resid_post"]] == [(3, len(ids), 32) for ids in RAGGED]
    assert torch.equal(ragged["resid_post"][2][1], ragged.read(2, "resid_post", 1))
    with raises(hookmap.SelectionError, "does not hold mlp_out"):
        ragged["mlp_out"]


def test_rows_of_all_samples_lie_behind_each_other_here_and_on_disk(tmp_path: Path) -> None:
    run = opened("llama").capture(RAGGED, ["resid_post", "z", "pattern"], max_new_tokens=0)
    run.save(tmp_path / "run")
    for held in (run, hookmap.open_store(tmp_path / "run")):
        for point in ("resid_post", "z"):
            values, offsets = held.rows(point, -1)
            assert offsets == (0, 6, 9, 18) and len(values) == 18
            for number in range(3):
                assert torch.equal(values[offsets[number] : offsets[number + 1]], held.read(number, point, 2))
        with raises(hookmap.SelectionError, "pattern", "sample by sample"):
            held.rows("pattern", 0)
        with raises(hookmap.SelectionError, "say which"):
            held.rows("z")
