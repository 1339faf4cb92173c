"""Attribution to a direction, and of stored captures, against products by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support import experts_by_hand, plain_hooks
from support.opened import opened
from support.raises import raises
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.analysis.steering import About, SteeringVector
from hookmap.cli.main import main
from hookmap.demo import MODEL_PATH

TOKENS = [5, 17, 3, 60, 22, 9]
VECTOR = torch.linspace(-1, 2, 32)
POINTS = ["resid_pre", "mixer_out", "mlp_out", "resid_post", "z"]


def rows_of_modules(model: Any, paths: dict[str, str]) -> dict[str, torch.Tensor]:
    """What plain hooks see leave each module, [pos, d_model]."""
    with plain_hooks.watching(model, {name: (path, "output") for name, path in paths.items()}) as seen:
        model(torch.tensor([TOKENS]), use_cache=False)
    return {name: rows[0].reshape(len(TOKENS), -1) for name, rows in seen.items()}


@pytest.mark.parametrize("layer", [0, 1, None])
def test_the_parts_are_what_each_branch_of_a_llama_gives_along_the_direction(layer: int | None) -> None:
    hm = opened("llama")
    found = hm.attribute(TOKENS, direction=VECTOR, layer=layer, positions="all")
    end = 2 if layer is None else layer
    paths = {"resid_pre[0]": "model.embed_tokens", "stream": f"model.layers.{end}"}
    for n in range(end + 1):
        paths |= {f"mixer_out[{n}]": f"model.layers.{n}.self_attn", f"mlp_out[{n}]": f"model.layers.{n}.mlp"}
    by_hand = rows_of_modules(hm.model, paths)
    assert set(found.parts) == paths.keys() - {"stream"}
    for part, values in zip(found.parts, found.values, strict=True):
        torch.testing.assert_close(values, by_hand[part] @ VECTOR, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.logit, by_hand["stream"] @ VECTOR, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.values.sum(0), found.logit, atol=1e-4, rtol=1e-4)
    assert found.direction == f"direction at resid_post[{end}]" and found.as_json()["direction"] == found.direction


def test_a_steering_vector_says_its_stream() -> None:
    hm = opened("gpt2")
    vector = SteeringVector(About(point="resid_pre", method="mean_difference"), {1: VECTOR, 2: -VECTOR})
    found = hm.attribute(TOKENS, direction=vector, layer=2)
    assert found.parts == ("resid_pre[0]", "mixer_out[0]", "mlp_out[0]", "mixer_out[1]", "mlp_out[1]")
    plain = hm.attribute(TOKENS, direction=VECTOR, layer=1)
    assert torch.allclose(found.values, -plain.values)
    with raises(hookmap.SelectionError, "layers 1, 2", "layer=N"):
        hm.attribute(TOKENS, direction=vector)


def test_a_capture_and_a_store_are_split_as_the_prompt_is(tmp_path: Path) -> None:
    hm = opened("gpt2")
    run = hm.capture([[1, 2, 3], TOKENS], POINTS, max_new_tokens=0)
    run.save(tmp_path / "run")
    for held in (run, hookmap.open_store(tmp_path / "run")):
        for how in ({"target": 13, "against": 8}, {"heads": True}, {"direction": VECTOR, "layer": 1, "heads": True}):
            split, whole = hm.attribute(held, sample=1, **how), hm.attribute(TOKENS, positions="all", **how)
            assert split.parts == whole.parts and split.positions == whole.positions
            torch.testing.assert_close(split.values, whole.values, atol=1e-4, rtol=1e-4)
    with raises(hookmap.SelectionError, "mlp_out[0]", "hm.capture(prompts"):
        hm.attribute(hm.capture(TOKENS, "resid_post", max_new_tokens=0))


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon_7b"])
def test_the_heads_results_sum_to_the_mixer_but_for_its_bias(name: str) -> None:
    hm = opened(name)
    run: Any = hm.capture([[1, 2, 3, 4], [9, 8, 7, 6]], ["z", "mixer_out"], max_new_tokens=0)
    labels, values = hm.stack_head_results(run)
    assert isinstance(values, torch.Tensor) and values.shape == (12, 2, 4, 32)
    assert labels[5] == "mixer_out[1] head 1"
    for layer in range(3):
        w_o = next(each for each in hm.weights("z", layer) if each.name == "W_O")
        by_hand = torch.einsum("bphd,hdo->hbpo", run["z", layer], w_o.tensor)
        torch.testing.assert_close(values[4 * layer : 4 * layer + 4], by_hand, atol=1e-4, rtol=1e-4)
        rest = run["mixer_out", layer] - by_hand.sum(0)
        bias = torch.zeros(32) if w_o.bias is None else w_o.bias
        torch.testing.assert_close(rest, bias.expand_as(rest), atol=1e-4, rtol=1e-4)
    last, of_last = hm.stack_head_results(run, -1)
    assert isinstance(of_last, torch.Tensor) and last == labels[8:] and torch.equal(of_last, values[8:])
    with raises(hookmap.SelectionError, "z and mixer_out"):
        hm.stack_head_results(hm.capture([1, 2], "mixer_out", max_new_tokens=0))


def test_wrong_directions_are_refused() -> None:
    hm = opened("llama")
    with raises(hookmap.SelectionError, "expected 32 finite numbers"):
        hm.attribute(TOKENS, direction=torch.ones(31))
    with raises(hookmap.SelectionError, "expected 32 finite numbers"):
        hm.attribute(TOKENS, direction=VECTOR / 0)
    with raises(hookmap.SelectionError, "not both"):
        hm.attribute(TOKENS, 13, direction=VECTOR)
    with raises(hookmap.SelectionError, "layer 3", "0 to 2"):
        hm.attribute(TOKENS, direction=VECTOR, layer=3)
    with raises(hookmap.SelectionError, "give direction="):
        hm.attribute(TOKENS, layer=1)


def test_the_tokens_of_a_prompt_are_those_that_the_tokenizer_makes() -> None:
    hm = opened("gpt2")
    text = hm.tokenizer.decode(TOKENS)
    ids = hm.tokenizer(text)["input_ids"]
    assert hm.to_str_tokens(text) == [hm.tokenizer.decode([token]) for token in ids] == hm.to_str_tokens(ids)
    with raises(hookmap.SelectionError, "one prompt, got 2"):
        hm.to_str_tokens([text, text])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_each_neuron_is_its_activation_times_its_row_of_the_output_projection(family: str) -> None:
    model = plain_hooks.build(family)
    path = {"llama": "model.layers.1.mlp.down_proj", "opt": "model.decoder.layers.1.fc2"}[family]
    project = model.get_submodule(path)
    if family == "opt":
        project.bias.data.normal_()
    hm = hookmap.open(model)
    with plain_hooks.watching(hm.model, {"post": (path, "input")}) as seen:
        hm.model(torch.tensor([TOKENS]), use_cache=False)
    post = seen["post"][0].reshape(len(TOKENS), -1)
    found = hm.attribute(TOKENS, direction=VECTOR, positions="all", neurons=[1])
    rows = dict(zip(found.parts, found.values, strict=True))
    assert sum(" neuron " in part for part in rows) == 48 and "mlp_out[0]" in rows and "mlp_out[1]" not in rows
    for neuron in (0, 17, 46):
        want = post[:, neuron] * (project.weight[:, neuron] @ VECTOR)
        torch.testing.assert_close(rows[f"mlp_out[1] neuron {neuron}"], want, atol=1e-4, rtol=1e-4)
    if family == "opt":
        bias = (project.bias @ VECTOR).expand(len(TOKENS))
        torch.testing.assert_close(rows["mlp_out[1] bias"], bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.values.sum(0), found.logit, atol=1e-4, rtol=1e-4)
    logits = hm.attribute(TOKENS, target=13, neurons="all", heads=True)
    torch.testing.assert_close(logits.values.sum(0), logits.logit, atol=1e-4, rtol=1e-4)


def test_neurons_that_are_not_there_are_refused() -> None:
    with raises(hookmap.SelectionError, "mlp_post"):
        opened("mixtral").attribute(TOKENS, neurons=[1])
    with raises(hookmap.SelectionError, "mlp_post", "hm.capture"):
        opened("llama").attribute(opened("llama").capture([TOKENS], POINTS, max_new_tokens=0), neurons=[1])


@pytest.mark.slow
def test_the_command_line_splits_a_direction_and_neurons(tmp_path: Path) -> None:
    hm = hookmap.open(MODEL_PATH)
    vector = hm.steering_vector(["1+1=2", "3+2=5"], ["1+1=3", "3+2=4"], layers=[12, 16])
    file = str(tmp_path / "v.safetensors")
    vector.save(file)
    given = ["--prompt", "3+4=", "--no-chat", "--direction", file, "--json"]
    done = CliRunner().invoke(main, ["attribute", *given, "--layer", "12", "--neurons", "12"])
    assert done.exit_code == 0, done.stderr
    got, want = json.loads(done.stdout), hm.attribute("3+4=", direction=vector, layer=12, neurons=12)
    assert got["parts"] == list(want.parts) and got["direction"] == "direction at resid_post[12]"
    assert torch.allclose(torch.tensor(got["values"]), want.values)
    assert any(part.startswith("mlp_out[12] neuron") for part in got["parts"])
    wrong = CliRunner().invoke(main, ["attribute", *given])
    assert wrong.exit_code == 1 and "layers 12, 16" in wrong.stderr


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_each_expert_is_what_it_gives_to_its_tokens_times_its_weight(name: str) -> None:
    """By plain arithmetic on the experts' own weights."""
    model = experts_by_hand.build(name)
    hm = hookmap.open(model, tokenizer=tiny_tokenizer())
    experts = model.get_submodule("model.layers.1.mlp.experts")
    with experts_by_hand.watched(experts) as seen:
        hm.model(torch.tensor([TOKENS]), use_cache=False)
    x, chosen, weights = seen[0]
    _, given = experts_by_hand.rows(experts, x, chosen)
    found = hm.attribute(TOKENS, direction=VECTOR, positions="all", experts=[1])
    rows = dict(zip(found.parts, found.values, strict=True))
    numbers = sorted({*chosen.flatten().tolist()})
    assert [part for part in rows if "expert " in part] == [f"mlp_out[1] expert {number}" for number in numbers]
    for number in numbers:
        want = ((given @ VECTOR) * weights * (chosen == number)).sum(1)
        torch.testing.assert_close(rows[f"mlp_out[1] expert {number}"], want, atol=1e-4, rtol=1e-4)
    assert ("mlp_out[1] shared experts" in rows) == (name in ("qwen2_moe", "deepseek_v3"))
    assert "mlp_out[1]" not in rows and "mlp_out[0]" in rows
    torch.testing.assert_close(found.values.sum(0), found.logit, atol=1e-4, rtol=1e-4)
    logits = hm.attribute(TOKENS, target=13, experts="all", heads=name != "deepseek_v3")
    torch.testing.assert_close(logits.values.sum(0), logits.logit, atol=1e-4, rtol=1e-4)
    assert any(part.startswith("mlp_out[0] expert") for part in logits.parts) == (name != "deepseek_v3")


def test_experts_whose_inputs_are_weighted_are_attributed_too() -> None:
    """Llama 4: each expert computes every token, times a weight that is 0 where the token does not have it."""
    model = experts_by_hand.build("llama4")
    hm = hookmap.open(model, tokenizer=tiny_tokenizer())
    with plain_hooks.watching(model, {"given": ("model.layers.1.feed_forward.experts", "output")}) as seen:
        hm.model(torch.tensor([TOKENS]), use_cache=False)
    by_hand = (seen["given"][0].view(4, len(TOKENS), 32) @ VECTOR).unbind()
    found = hm.attribute(TOKENS, direction=VECTOR, positions="all", experts=[1])
    rows = dict(zip(found.parts, found.values, strict=True))
    for number, want in enumerate(by_hand):
        values = rows.get(f"mlp_out[1] expert {number}", torch.zeros(len(TOKENS)))
        torch.testing.assert_close(values, want, atol=1e-4, rtol=1e-4)
    assert "mlp_out[1] shared experts" in rows
    torch.testing.assert_close(found.values.sum(0), found.logit, atol=1e-4, rtol=1e-4)


def test_experts_that_are_not_there_are_refused() -> None:
    with raises(hookmap.SelectionError, "expert_out"):
        opened("llama").attribute(TOKENS, experts=[1])
    with raises(hookmap.SelectionError, "expert_out", "router_indices", "hm.capture"):
        opened("mixtral").attribute(opened("mixtral").capture([TOKENS], POINTS, max_new_tokens=0), experts=[1])
