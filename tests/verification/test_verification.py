"""Verification passes on a right map and fails on every wrong one."""

from pathlib import Path

import pytest
import torch
from support import plain_hooks
from support.opened import EACH_FAMILY
from support.raises import raises

from hookmap.discovery.discover import discover
from hookmap.errors import MapMismatchError, ModelError
from hookmap.maps.document import ArchitectureMap
from hookmap.verification.verify import Verification, redraw, verify


def _changed(found: ArchitectureMap, point: str, **term: object) -> ArchitectureMap:
    """The map with one point moved, as a careless edit would."""
    document = found.model_dump()
    for points in (document["model_points"], *(kind["points"] for kind in document["kinds"])):
        if point in points:
            points[point]["terms"][0].update(term)
    return ArchitectureMap.model_validate(document)


def _failed(verification: Verification) -> set[str]:
    return {check.name for check in verification.checks if not check.passed}


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH_FAMILY)
def test_a_right_map_passes(name: str) -> None:
    model = plain_hooks.build(name)
    redraw(model)
    result = verify(model)
    assert result.passed, [check for check in result.checks if not check.passed]
    names = {check.name for check in result.checks}
    assert {"hidden_states", "sum", "cause", "order", "shapes", "bare", "logits", "embed", "hand-over"} <= names
    assert ("final_norm" in names) == ("final_norm" in result.architecture_map.points)


@pytest.mark.slow
def test_a_model_in_bfloat16_is_verified_without_its_rounding() -> None:
    """Rounding hid a wrong tensor of a percent, and large activations of a trained model made a right map fail."""
    model = plain_hooks.build("llama").to(torch.bfloat16)
    result = verify(model)
    assert result.passed
    assert max(check.error or 0.0 for check in result.checks) < 1e-9
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# Each wrong place has the right shape: only numbers can tell.
@pytest.mark.parametrize(
    ("point", "term", "check"),
    [
        ("resid_pre", {"module": "model.layers.{i}.input_layernorm", "side": "output", "index": None}, "hidden_states"),
        ("resid_mid", {"module": "model.layers.{i}.post_attention_layernorm", "side": "output", "index": None}, "sum"),
        ("resid_mid", {"module": "model.layers.{i}", "side": "input", "index": 0}, "cause"),
        ("mixer_out", {"module": "model.layers.{i}.mlp", "side": "output", "index": None}, "cause"),
        ("mixer_out", {"scale": 0.9}, "sum"),
        ("mlp_out", {"module": "model.layers.{i}.self_attn", "side": "output", "index": 0}, "cause"),
        ("resid_post", {"module": "model.layers.{i}.mlp", "side": "output", "index": None}, "hand-over"),
        ("mlp_in", {"module": "model.layers.{i}.input_layernorm", "side": "output", "index": None}, "cause"),
        ("mixer_in", {"module": "model.layers.{i}", "side": "input", "index": 0}, "reads"),
        ("mixer_in", {"module": "model.layers.{i}.self_attn.o_proj", "side": "input", "index": 0}, "positions"),
        ("mlp_in", {"module": "model.layers.{i}.post_attention_layernorm", "side": "input", "index": 0}, "reads"),
        ("mlp_in", {"module": "model.layers.{i}.input_layernorm", "side": "output", "index": None}, "positions"),
        ("mlp_in", {"module": "model.layers.{i}.mlp", "side": "output", "index": None}, "reads"),
        ("attn_out", {"module": "model.layers.{i}.mlp", "side": "output", "index": None}, "name"),
        ("attn_in", {"module": "model.layers.{i}", "side": "input", "index": 0}, "name"),
        ("mixer_in", {"scale": 2.0}, "bare"),
        ("mixer_out_raw", {"scale": 2.0}, "bare"),
        ("mlp_out_raw", {"module": "model.layers.{i}.self_attn", "side": "output", "index": 0}, "bare"),
        ("mixer_out_raw", {"index": 1}, "bare"),  # the pattern
        ("final_norm", {"scale": 2.0}, "final_norm"),
        ("final_norm", {"module": "lm_head"}, "final_norm"),
        ("k", {"side": "input", "index": 0, "heads": None}, "head"),
        ("resid_mid", {"module": "model.layers.{i}.nowhere"}, "modules"),
        ("resid_mid", {"index": 5}, "selectors"),
    ],
)
def test_a_wrong_map_fails(point: str, term: dict[str, object], check: str) -> None:
    model = plain_hooks.build("llama")
    redraw(model)
    result = verify(model, architecture_map=_changed(discover(model), point, **term))
    assert not result.passed
    assert check in _failed(result), result.checks


@pytest.mark.parametrize(
    ("point", "other", "check"),
    [
        ("mlp_in", "resid_post", "bare"),  # written into a run, both are the other run's: no number tells
        ("mlp_out_raw", "mlp_out_raw", "bare"),
        ("mixer_out", "q", "selectors"),  # of other shapes: there is no sum
    ],
)
def test_a_sum_of_too_much_fails(point: str, other: str, check: str) -> None:
    model = plain_hooks.build("llama")
    redraw(model)
    document = discover(model).model_dump()
    points = document["kinds"][0]["points"]
    points[point]["terms"] += points[other]["terms"]
    assert check in _failed(verify(model, architecture_map=ArchitectureMap.model_validate(document)))


def test_what_stands_behind_a_norm_on_the_stream_is_no_middle() -> None:
    """No sum says where BERT's `resid_mid` is: a norm stands between it and the sum."""
    model = plain_hooks.build("bert")
    redraw(model)
    found = _changed(
        discover(model), "resid_mid", module="bert.encoder.layer.{i}.attention.output.dense", side="output", index=None
    )
    assert "name" in _failed(verify(model, architecture_map=found))


def test_heads_of_another_size_fail() -> None:
    model = plain_hooks.build("opt")
    redraw(model)
    document = discover(model).model_dump()
    for kind in document["kinds"]:
        kind["points"]["z"]["terms"][0]["heads"]["d_head"] //= 2
    assert "inside" in _failed(verify(model, architecture_map=ArchitectureMap.model_validate(document)))


@pytest.mark.slow
def test_a_wrong_order_fails() -> None:
    model = plain_hooks.build("llama")
    document = discover(model).model_dump()
    document["kinds"][0]["points"]["resid_mid"]["order"] = 0
    assert "order" in _failed(verify(model, architecture_map=ArchitectureMap.model_validate(document)))


def test_a_map_of_another_architecture_is_refused() -> None:
    with raises(MapMismatchError, "LlamaForCausalLM", "Qwen3ForCausalLM"):
        verify(plain_hooks.build("qwen3"), architecture_map=discover(plain_hooks.FAMILIES["llama"].config()))


@pytest.mark.slow
def test_a_config_is_verified_as_a_narrow_copy() -> None:
    result = verify(plain_hooks.FAMILIES["deepseek_v3"].config())
    assert result.passed and "narrow" in result.on


@pytest.mark.slow
def test_the_weights_are_as_they_were() -> None:
    model = plain_hooks.build("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verify(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_without_weights_a_narrow_copy_is_verified_and_the_result_says_why(tmp_path: Path) -> None:
    plain_hooks.FAMILIES["llama"].config().save_pretrained(tmp_path)
    result = verify(tmp_path)
    assert result.passed and result.on.startswith("random weights") and "no file named" in result.on
    shipped = verify("willcb/Qwen3-0.6B")
    assert shipped.passed and shipped.architecture_map.num_layers == 28 and "hub" in shipped.on


def test_broken_weights_are_an_error_and_not_a_reason_for_random_ones(tmp_path: Path) -> None:
    plain_hooks.FAMILIES["llama"].config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with raises(ModelError, "cannot load the model"):
        verify(tmp_path)
