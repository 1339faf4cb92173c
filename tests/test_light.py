"""`hookmap.light` works where torch is not installed, and the parameters that it names are those of the model."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.opened import EACH_STRUCTURE, RAGGED, opened
from support.raises import raises
from support.without_torch import REFUSED, without_heavy

import hookmap
from hookmap import light
from hookmap.demo import MODEL_PATH


@pytest.mark.slow
@pytest.mark.parametrize("source", ["Qwen3ForCausalLM", str(MODEL_PATH)])
def test_it_answers_where_torch_transformers_and_nnsight_are_not_installed(source: str) -> None:
    done = without_heavy(source)
    assert done.stdout.splitlines() == [
        "resid_mid[8] = model.layers.8.post_attention_layernorm.input[0]",
        "model.layers.8.self_attn.o_proj.weight",
        "",
    ], done.stderr


@pytest.mark.parametrize(("missing", "words"), [("click", ["--version"]), ("torch", ["show", "Qwen3ForCausalLM"])])
def test_a_command_without_what_it_needs_says_how_to_install_it(missing: str, words: list[str]) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; import runpy; runpy.run_module('hookmap', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and missing in done.stderr and "pip install hookmap" in done.stderr
    assert "Traceback" not in done.stderr and "foresaw" not in done.stderr


def test_that_test_can_fail() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED + "import hookmap; hookmap.load_map('x')"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "is not installed" in done.stderr


def test_its_shipped_maps_are_those_of_hookmap() -> None:
    assert light.load_map("GPT2LMHeadModel") == hookmap.load_map("GPT2LMHeadModel")
    assert "GPT2LMHeadModel" in light.architectures()


@pytest.mark.slow
def test_a_map_file_is_read_whole_and_a_folder_at_its_size(tmp_path: Path) -> None:
    exact = hookmap.discover(MODEL_PATH)
    exact.save(tmp_path / "map.json")
    assert light.load_map(tmp_path / "map.json") == exact
    guessed = light.load_map(MODEL_PATH)
    assert (guessed.num_layers, guessed.d_model) == (exact.num_layers, exact.d_model)
    for point in set(guessed.points) - {"embed"}:
        layers = "all" if point in guessed.model_points else range(guessed.num_layers)
        assert [s.terms for s in guessed.selectors([point], layers)] == [
            s.terms for s in exact.selectors([point], layers)
        ]
    assert "depends on the size" in str(guessed.unavailable("z", 0))


def parameters_beside(hm: Any, layer: int) -> list[tuple[str, light.WeightPath]]:
    found = []
    for point in ("q", "k", "v", "z", "mlp_pre", "mlp_post", "mixer_out_raw", "mlp_out_raw", "router_logits"):
        if hm.map.unavailable(point, layer) is None:
            try:
                found += [(point, each) for each in light.weights(hm.map, point, layer)]
            except hookmap.SelectionError:
                continue
    return found


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_each_parameter_makes_or_reads_the_point_in_a_plain_forward_pass(name: str) -> None:
    """Plain hooks around the module that owns it: its input times the parameter, as its axes say, is its output."""
    hm: Any = opened(name)
    layer = hm.map.num_layers - 1
    beside = parameters_beside(hm, layer)
    points = [point for point, _ in beside]
    if not points:
        pytest.skip("its map names no parameters: state space or experts alone")
    seen: dict[str, Any] = {}
    handles = []
    for path in {each.path.removesuffix(".weight") for _, each in beside}:

        def keep(module: Any, args: Any, output: Any, path: str = path) -> None:
            seen[path] = (args[0], output[0] if isinstance(output, tuple) else output)

        handles.append(hm.model.get_submodule(path).register_forward_hook(keep))
    try:
        run = hm.capture([RAGGED[0]], list(dict.fromkeys(points)), [layer], max_new_tokens=0)
    finally:
        for handle in handles:
            handle.remove()
    for point, each in beside:
        owner = each.path.removesuffix(".weight")
        weight, (x, y) = dict(hm.model.named_parameters(remove_duplicate=False))[each.path], seen[owner]
        bias = getattr(hm.model.get_submodule(owner), "bias", None)
        if each.axes:
            by_hand = x @ (weight if each.axes == ("in", "out") else weight.T) + (0 if bias is None else bias)
            torch.testing.assert_close(by_hand, y, rtol=1e-4, atol=1e-5)
        rows = run.read(0, point, layer).flatten(1)
        tensor = (y if each.side == "writes" else x).reshape(rows.shape[0], -1)
        if each.heads is not None:
            cut = tensor.unflatten(-1, (each.heads.groups, -1))[..., each.heads.start : each.heads.stop]
            tensor = cut.flatten(1)
        torch.testing.assert_close(rows, tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_it_names_no_parameter_that_the_dataflow_does_not(name: str) -> None:
    hm: Any = opened(name)
    for layer in {0, hm.map.num_layers - 1}:
        for point, each in parameters_beside(hm, layer):
            if point == "mlp_pre":  # `weights` has no name for what an ungated MLP's first product is
                continue
            asked = point.removesuffix("_raw")
            assert (each.path, each.side) in {(w.path, w.side) for w in hm.weights(asked, layer)}, point


def test_what_writes_to_the_stream_is_named_behind_a_norm_too() -> None:
    m = light.load_map("Gemma2ForCausalLM")
    assert [w.path for w in light.weights(m, "attn_out", 3)] == ["model.layers.3.self_attn.o_proj.weight"]
    assert [w.path for w in light.weights(m, "mlp_out", 3)] == ["model.layers.3.mlp.down_proj.weight"]


def test_fused_parameters_say_which_features_are_the_points() -> None:
    (w,) = light.weights(light.load_map("GPT2LMHeadModel"), "k", 0)
    assert w.heads is not None
    assert (w.path, w.axes, w.heads.start, w.heads.stop) == (
        "transformer.h.0.attn.c_attn.weight",
        ("in", "out"),
        768,
        1536,
    )


def test_what_is_not_there_is_refused_with_what_to_type(tmp_path: Path) -> None:
    with raises(hookmap.MapNotFoundError, "Qwen9ForCausalLM", "Qwen3ForCausalLM", "hookmap discover"):
        light.load_map("Qwen9ForCausalLM")
    with raises(hookmap.MapNotFoundError, tmp_path.name, "hookmap discover"):
        light.load_map(tmp_path)
    m = light.load_map("LlamaForCausalLM")
    with raises(hookmap.SelectionError, "resid_mid", "hookmap.open(MODEL).weights"):
        light.weights(m, "resid_mid", 3)
    with raises(hookmap.SelectionError, "attn_out", "say which"):
        light.weights(m, "attn_out")
    with raises(hookmap.SelectionError, "layer 99"):
        light.weights(m, "attn_out", 99)
