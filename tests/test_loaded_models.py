"""Models as people have them: quantised, compiled, wrapped by PEFT, dispatched by accelerate, in half precision.

Each is captured as plain PyTorch hooks on the same model see it, and its map is the plain model's.
"""

import dataclasses
from pathlib import Path
from typing import Any

import accelerate
import plain_hooks
import pytest
import torch
import transformers
from plain_hooks import FAMILIES, LAYERS, Family
from tiny_tokenizer import tiny_tokenizer
from torch import nn

import hookmap
from hookmap.map_diff import differences
from hookmap.verification import verify

NEW = 4
IDS = [[5, 17, 3, 60, 22, 9]]
ARCHITECTURES = ["llama", "gpt2", "qwen3_moe"]


def same_as_plain_hooks(
    x: Any, name: str, root: nn.Module | None = None, prefix: str = "", **settings: Any
) -> hookmap.Capture:
    """Every point that a person hooks by hand. `root`: the module that generates; `prefix`: how the paths begin."""
    family = _at(FAMILIES[name], prefix)
    hm = hookmap.open(x, **settings)
    run = hm.capture(IDS, list(family.points), max_new_tokens=NEW)
    reference = plain_hooks.generate(root or hm.model, family, IDS, max_new_tokens=NEW, do_sample=False)
    assert run.tokens[0] == tuple(reference.sequences[0].tolist())
    for point in family.points:
        for layer in range(LAYERS):
            got, expected = run[point, layer], reference.point(family, point, layer)
            assert got.dtype == expected.dtype and got.equal(expected), (point, layer)
    return run


def _at(family: Family, prefix: str) -> Family:
    points = {
        name: tuple(dataclasses.replace(place, module=prefix + place.module) for place in places)
        for name, places in family.points.items()
    }
    return dataclasses.replace(family, points=points)


def plain_map(name: str, **settings: Any) -> hookmap.ArchitectureMap:
    return hookmap.discover(plain_hooks.build(name, **settings))


def saved(name: str, folder: Path, **settings: Any) -> Path:
    plain_hooks.build(name, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# Quantised ------------------------------------------------------------------------------------------------------------

# bitsandbytes packs blocks of 64 numbers.
_WIDE: dict[str, dict[str, int]] = {
    "gpt2": {"n_embd": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "qwen3_moe": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
}
_QUANTISED = {
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
}


def quantised(bits: str, name: str, folder: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    settings = transformers.BitsAndBytesConfig(**_QUANTISED[bits])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved(name, folder, **_WIDE[name]), quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    assert any("bit" in type(module).__name__ for module in model.modules())
    loaded: nn.Module = model.eval()
    return loaded


@pytest.mark.parametrize("bits", _QUANTISED)
@pytest.mark.parametrize("name", _WIDE)
def test_the_map_of_a_quantised_model_is_the_unquantised_ones(bits: str, name: str, tmp_path: Path) -> None:
    model, expected = quantised(bits, name, tmp_path), plain_map(name, **_WIDE[name])
    found = hookmap.discover(model)
    assert not list(differences(expected, found)) and found.config_hash == expected.config_hash
    assert verify(model).passed
    same_as_plain_hooks(model, name)


@pytest.mark.parametrize("bits", _QUANTISED)
def test_a_quantised_folder_opens_quantised(bits: str, tmp_path: Path) -> None:
    quantised(bits, "llama", tmp_path / "plain").save_pretrained(tmp_path / "quantised")
    hm = hookmap.open(tmp_path / "quantised", device="cpu")
    assert any("bit" in type(module).__name__ for module in hm.model.modules())
    expected = plain_map("llama", **_WIDE["llama"])
    assert not list(differences(expected, hm.map))
    assert not list(differences(expected, hookmap.discover(tmp_path / "quantised")))
    same_as_plain_hooks(hm.model, "llama")


def test_a_quantised_layer_of_any_library_is_read_as_the_product_that_it_stands_for() -> None:
    model = plain_hooks.build("llama")
    for block in model.model.layers:
        block.mlp.down_proj = _Int8(block.mlp.down_proj)
    assert not list(differences(plain_map("llama"), hookmap.discover(model)))
    assert "forward" not in vars(model.model.layers[0].mlp.down_proj), "discovery leaves the layer as it was"
    same_as_plain_hooks(model, "llama")


class _Int8(nn.Module):
    """A quantised layer as many libraries write it: whole numbers, a scale for each row, an operation of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [x @ (row * scale) for row, scale in zip(self.packed, self.scale, strict=True)]
        return torch.stack(rows, dim=-1)


# Compiled, wrapped, dispatched ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_compiled_model_is_read_inside_its_wrapper(name: str) -> None:
    model = plain_hooks.build(name)
    compiled = torch.compile(model, backend="eager")
    assert not list(differences(plain_map(name), hookmap.discover(compiled)))
    same_as_plain_hooks(compiled, name, root=model)


# PEFT reads a name that transformers 5.23 has renamed.
_PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def lora(name: str, model: nn.Module) -> Any:
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    targets = {"gpt2": ["c_attn"]}.get(name, ["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=name == "gpt2"))
    with torch.no_grad():
        for path, weight in wrapped.named_parameters():
            if "lora_B" in path:
                weight.normal_(0, 0.5)
    return wrapped.eval()


@_PEFT
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_lora_is_part_of_what_is_captured(name: str) -> None:
    wrapped = lora(name, plain_hooks.build(name))
    found, expected = hookmap.discover(wrapped), plain_map(name)
    assert found.architecture == expected.architecture, "of the model, whatever PEFT's wrapper is called"
    assert found.layers_path == f"base_model.model.{expected.layers_path}"
    assert set(found.points) == set(expected.points)
    run = same_as_plain_hooks(wrapped, name, prefix="base_model.model.")
    bare = hookmap.open(plain_hooks.build(name)).capture(IDS, ["mixer_out"], [1], max_new_tokens=NEW)
    rows = len(IDS[0])
    assert not torch.allclose(run["mixer_out", 1][:, :rows], bare["mixer_out", 1][:, :rows], atol=1e-2)


@_PEFT
def test_a_lora_on_a_quantised_model(tmp_path: Path) -> None:
    wrapped = lora("llama", quantised("4 bit", "llama", tmp_path))
    assert set(hookmap.discover(wrapped).points) == set(plain_map("llama").points)
    same_as_plain_hooks(wrapped, "llama", prefix="base_model.model.")


_DEVICES = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.layers.2": "disk", "model.norm": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("how", ["hooks on the CPU", "disk", "all kept away"])
def test_a_model_dispatched_over_devices(how: str, tmp_path: Path) -> None:
    """accelerate moves each module's inputs, and the weights that are kept elsewhere, as they are needed."""
    if how == "disk":
        places = {"device_map": _DEVICES, "offload_folder": tmp_path / "offload", "dtype": torch.float32}
        folder = saved("llama", tmp_path / "model")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **places).eval()
        assert any(weight.is_meta for weight in model.parameters())
    elif how == "all kept away":
        model = accelerate.cpu_offload(plain_hooks.build("llama"), execution_device=torch.device("cpu"))
        assert all(weight.is_meta for weight in model.parameters())
    else:
        places = dict.fromkeys(_DEVICES, "cpu")
        model = accelerate.dispatch_model(plain_hooks.build("llama"), places, main_device="cpu", force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    assert not list(differences(plain_map("llama"), hookmap.discover(model)))
    run = same_as_plain_hooks(model, "llama")
    whole = hookmap.open(plain_hooks.build("llama")).capture(IDS, ["resid_post"], [2], max_new_tokens=NEW)
    torch.testing.assert_close(run["resid_post", 2], whole["resid_post", 2])
    _edits_as_a_plain_hook_does(model)


def _edits_as_a_plain_hook_does(model: nn.Module) -> None:
    mlp: Any = model.get_submodule("model.layers.1.mlp")
    hook = mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    reference = plain_hooks.generate(model, FAMILIES["llama"], IDS, max_new_tokens=NEW, do_sample=False)
    hook.remove()
    ablated: Any = [{"do": "ablate", "point": "mlp_out", "layers": 1}]
    run = hookmap.open(model).generate(IDS, ablated, max_new_tokens=NEW)
    assert run.tokens[0] == tuple(reference.sequences[0].tolist())


# Half precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_loaded_in_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    run = same_as_plain_hooks(folder, name, dtype=dtype, device="cpu")
    assert run["resid_mid", 1].dtype == dtype
    by_name = hookmap.open(folder, dtype=str(dtype).removeprefix("torch."), device="cpu")
    assert next(by_name.model.parameters()).dtype == dtype
    assert not list(differences(plain_map(name), by_name.map))
