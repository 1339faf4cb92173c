"""Parts that read pictures: each selector of their map names what plain hooks see there; or they are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from support import plain_hooks
from support.plain_hooks import redrawn
from support.raises import raises
from torch import nn

from hookmap.cli.commands.discover import command
from hookmap.cli.commands.verify import command as verify_command
from hookmap.discovery.discover import discover
from hookmap.errors import DiscoveryError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import load
from hookmap.verification.verify import verify

pytestmark = pytest.mark.slow

_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}
_EYE = {**_SIZES, "intermediate_size": 48, "image_size": 28}
_GRID = {"grid_thw": torch.tensor([[1, 4, 6]])}


def _picture(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


# name -> the tower alone, its blocks, the module that the attention's output leaves, that which reads between branches
_TOWERS: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "siglip": (
        lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**_EYE)),
        "encoder.layers.{i}",
        "self_attn",
        "layer_norm2",
    ),
    "clip": (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**_EYE)), "encoder.layers.{i}", "self_attn", "layer_norm2"),
    "vit": (lambda: tf.ViTModel(tf.ViTConfig(**_EYE)), "layers.{i}", "attention", "layernorm_after"),
    "pixtral": (
        lambda: tf.PixtralVisionModel(tf.PixtralVisionConfig(**_EYE)),
        "transformer.layers.{i}",
        "attention",
        "ffn_norm",
    ),
}


def _holds(
    found: ArchitectureMap, whole: nn.Module, tower: nn.Module, given: dict[str, Any], places: dict[str, str]
) -> None:
    """On each layer, the map names the tensors at `places`, "module side", and they add up to the stream."""
    for layer in range(found.num_layers):
        block = found.layers_path.replace("{i}", str(layer))
        by_hand = {}
        for point, place in places.items():
            module, side = place.split(" ")
            by_hand[point] = (f"{block}.{module}" if module != "." else block, side)
        named = {}
        for point in (*places, "mlp_out"):
            ((term,),) = (each.terms for each in found.selectors(point, layer))
            named[f"map {point}"] = (term.module, term.side)
        with plain_hooks.watching(whole, {**by_hand, **named}) as calls:
            tower(**given)
        seen = {name: tensors[-1] for name, tensors in calls.items()}
        for point in places:
            assert torch.equal(seen[f"map {point}"], seen[point]), (point, layer)
        assert torch.allclose(seen["resid_pre"] + seen["map mixer_out"], seen["resid_mid"], atol=1e-5)
        assert torch.allclose(seen["resid_mid"] + seen["map mlp_out"], seen["resid_post"], atol=1e-5)


@pytest.mark.parametrize("name", _TOWERS)
def test_a_tower_alone_is_mapped(name: str) -> None:
    make, blocks, mixer, middle = _TOWERS[name]
    tower = redrawn(make())
    found = discover(tower)
    assert (found.part, found.layers_path, found.num_layers, found.d_model) == ("vision", blocks, 3, 32)
    (kind,) = found.kinds
    assert kind.name == "attention+dense" and kind.axes == ("batch", "patch", "d_model")
    places = {
        "resid_pre": ". input",
        "mixer_out": f"{mixer} output",
        "resid_mid": f"{middle} input",
        "resid_post": ". output",
    }
    _holds(found, tower, tower, {"pixel_values": _picture(1, 3, 28, 28)}, places)
    assert discover(tower.config).kinds == found.kinds


def test_dinov2_scales_what_its_branches_add() -> None:
    tower = redrawn(tf.Dinov2Model(tf.Dinov2Config(**_SIZES, image_size=28, mlp_ratio=2)))
    for path, weight in tower.named_parameters():
        if "lambda" in path:
            nn.init.normal_(weight)
    found = discover(tower)
    places = {
        "resid_pre": ". input",
        "mixer_out": "layer_scale1 output",
        "resid_mid": "norm2 input",
        "resid_post": ". output",
    }
    _holds(found, tower, tower, {"pixel_values": _picture(1, 3, 28, 28)}, places)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_tower_whose_stream_has_no_batch_is_mapped_in_the_whole_model(name: str) -> None:
    model = plain_hooks.build_multimodal(name)
    found = discover(model, part="vision")
    assert found.architecture == type(model).__name__ and found.layers_path == "model.visual.blocks.{i}"
    assert all(kind.axes == ("patch", "d_model") for kind in found.kinds)
    eye = model.config.vision_config
    width = eye.in_channels * eye.temporal_patch_size * eye.patch_size**2
    places = {"resid_pre": ". input", "mixer_out": "attn output", "resid_mid": "norm2 input", "resid_post": ". output"}
    _holds(found, model, model.model.visual, {"hidden_states": _picture(24, width), **_GRID}, places)
    assert found.d_model == discover(model.config, part="vision").d_model
    assert discover(model).part == "" and discover(model).layers_path == "model.language_model.layers.{i}"


def test_a_tower_in_a_folder_is_mapped_by_the_command(tmp_path: Path) -> None:
    model = plain_hooks.build_multimodal("llava")
    model.save_pretrained(tmp_path / "llava")
    file = tmp_path / "tower.json"
    result = CliRunner().invoke(command, [str(tmp_path / "llava"), "--part", "vision", "-q", "-o", str(file)])
    assert result.exit_code == 0, result.output
    found = load(file)
    assert found.part == "vision" and found.layers_path == "model.vision_tower.encoder.layers.{i}"
    assert found.kinds == discover(model, part="vision").kinds


def test_a_tower_of_several_widths_is_refused_and_left_as_it_was() -> None:
    tower = redrawn(
        tf.SwinModel(tf.SwinConfig(image_size=56, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=7))
    )
    windows = [block.window_size for stage in tower.encoder.layers for block in stage.blocks]
    with raises(DiscoveryError, "several lists of blocks", "layers.0.blocks.{i},", "layers.1.blocks"):
        discover(tower)
    assert [block.window_size for stage in tower.encoder.layers for block in stage.blocks] == windows


def test_a_model_without_a_tower_is_refused() -> None:
    with raises(DiscoveryError, "LlamaForCausalLM", "pictures"):
        discover(plain_hooks.build("llama"), part="vision")


@pytest.mark.parametrize("name", ["clip", "pixtral"])
def test_the_map_of_a_tower_is_verified_and_a_wrong_one_refuted(name: str) -> None:
    tower = redrawn(_TOWERS[name][0]())
    found = discover(tower)
    assert verify(tower).passed
    (kind,) = found.kinds
    for point, other, failing in (
        ("resid_mid", "mixer_out", "sum"),
        ("mlp_in", "resid_mid", "reads"),
        ("q", "k", "head"),
    ):
        points = {**kind.points, point: kind.points[other].model_copy(update={"order": kind.points[point].order})}
        wrong = found.model_copy(update={"kinds": (kind.model_copy(update={"points": points}),)})
        failed = {check.name for check in verify(tower, architecture_map=wrong).checks if not check.passed}
        assert failing in failed, (point, failed)


def test_a_tower_in_a_folder_is_verified_by_the_command(tmp_path: Path) -> None:
    plain_hooks.build_multimodal("llava").save_pretrained(tmp_path)
    arguments = [str(tmp_path), "--part", "vision", "--json"]
    result = CliRunner().invoke(verify_command, arguments)
    assert result.exit_code == 0, result.output
    assert '"passed": true' in result.stdout


def test_a_tower_is_verified_from_its_config() -> None:
    result = verify(_TOWERS["vit"][0]().config)
    assert result.passed and result.architecture_map.part == "vision" and "narrow" in result.on
