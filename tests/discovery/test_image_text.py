"""Models that do not run on token ids alone: they are given a picture, and the map is of the language model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support.plain_hooks import redrawn, watching
from torch import nn

from hookmap.discovery.discover import discover
from hookmap.errors import DiscoveryError
from hookmap.loading.narrow import narrow
from hookmap.verification.verify import verify

pytestmark = pytest.mark.slow

_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
_EYE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_OPT = {**_TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
_QFORMER = {**_TEXT, "intermediate_size": 48, "encoder_hidden_size": 32, "num_hidden_layers": 1}


def _blip() -> nn.Module:
    text = {**_TEXT, "intermediate_size": 48, "encoder_hidden_size": 32, "projection_dim": 32}
    return tf.BlipForConditionalGeneration(tf.BlipConfig(text_config=text, vision_config=_EYE, projection_dim=32))


def _blip_2() -> nn.Module:
    config = tf.Blip2Config(
        text_config=_OPT, vision_config=_EYE, qformer_config=_QFORMER, num_query_tokens=3, image_token_index=90
    )
    return tf.Blip2ForConditionalGeneration(config)


def _instructblip() -> nn.Module:
    config = tf.InstructBlipConfig(
        text_config=_OPT, vision_config=_EYE, qformer_config=_QFORMER, num_query_tokens=3, image_token_index=90
    )
    return tf.InstructBlipForConditionalGeneration(config)


def _kosmos_2() -> nn.Module:
    text = {
        "vocab_size": 96,
        "embed_dim": 32,
        "layers": 2,
        "ffn_dim": 48,
        "attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return tf.Kosmos2ForConditionalGeneration(
        tf.Kosmos2Config(text_config=text, vision_config=_EYE, latent_query_num=3)
    )


_DEMAND_A_PICTURE: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    # the model, its blocks, the module of the attention's output, the one whose input is the stream between branches
    "blip": (_blip, "text_decoder.bert.encoder.layer.{i}", "attention.output.dense", ""),
    "blip_2": (_blip_2, "language_model.model.decoder.layers.{i}", "self_attn", "final_layer_norm"),
    "instructblip": (_instructblip, "language_model.model.decoder.layers.{i}", "self_attn", "final_layer_norm"),
    "kosmos_2": (_kosmos_2, "text_model.model.layers.{i}", "self_attn", "final_layer_norm"),
}


@pytest.mark.parametrize("name", _DEMAND_A_PICTURE)
def test_a_model_that_demands_a_picture_is_given_one(name: str) -> None:
    make, blocks, mixer, middle = _DEMAND_A_PICTURE[name]
    model = redrawn(make()).eval()
    found = discover(model)
    assert (found.layers_path, found.num_layers, found.d_model) == (blocks, 2, 32)
    result = verify(model, architecture_map=found)
    assert result.passed, [check for check in result.checks if not check.passed]
    if not middle:
        return
    ids = torch.arange(5, 14)[None]
    picture = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    given: dict[str, Any] = {"input_ids": ids, "pixel_values": picture}
    if name == "instructblip":
        given["qformer_input_ids"] = ids[:, :4]
    if name == "kosmos_2":
        given["image_embeds_position_mask"] = torch.arange(9)[None] < 3
    for layer in range(2):
        block = blocks.replace("{i}", str(layer))
        by_hand = {
            "resid_pre": (block, "input"),
            "mixer_out": (f"{block}.{mixer}", "output"),
            "resid_mid": (f"{block}.{middle}", "input"),
            "resid_post": (block, "output"),
        }
        named = {}
        for point in by_hand:
            ((term,),) = (each.terms for each in found.selectors(point, layer))
            named[f"map {point}"] = (term.module, term.side)
        with watching(model, {**by_hand, **named}) as seen:
            model(**given)
        for point in by_hand:
            assert torch.equal(seen[f"map {point}"][-1], seen[point][-1]), (point, layer)


class _WantsAnotherPicture(nn.Module):
    """Its forward demands a picture, and takes none of the size that its config says."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.config = tf.BlipConfig(vision_config=_EYE)

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"a picture of 7 x 7, not {list(pixel_values.shape)}")


def test_a_refusal_says_what_was_tried_besides_token_ids() -> None:
    tried = r"missing 1 required .*'pixel_values'; with pixel_values \[1, 3, 28, 28\]: ValueError: a picture of 7 x 7"
    with pytest.raises(DiscoveryError, match=tried):
        discover(_WantsAnotherPicture())


def test_blocks_between_the_layers_that_read_a_picture_are_named() -> None:
    """IDEFICS adds to the stream before each second layer what its words read in the picture."""
    eye = {"embed_dim": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.IdeficsConfig(
        **{**_TEXT, "num_hidden_layers": 4, "intermediate_size": 48, "cross_layer_interval": 2, "use_resampler": False},
        vision_config={**eye, "image_size": 28, "patch_size": 14},
    )
    model = redrawn(tf.IdeficsForVisionText2Text(config))
    for path, weight in model.named_parameters():
        if "alpha" in path:
            nn.init.constant_(weight, 0.7)
    found = discover(model)
    assert found.layers_path == "model.layers.{i}" and "model.gated_cross_attn_layers.{i}" in found.left_out
    assert found.is_joined(0, 1) and not found.is_joined(1, 2) and found.is_joined(2, 3)
    result = verify(model, architecture_map=found)
    assert result.passed, [check for check in result.checks if not check.passed]


_MROPE_BY_DEFAULT = ["Qwen2VLConfig", "Qwen2_5_VLConfig", "Qwen3VLConfig", "Glm4vConfig", "Ernie4_5_VLMoeConfig"]


@pytest.mark.parametrize("name", _MROPE_BY_DEFAULT)
def test_a_narrow_copy_has_rotary_sections_of_its_own_width(name: str) -> None:
    """Some of these configs leave the sections to the model's class, which has them for the full width."""
    whole = getattr(tf, name)(architectures=[name.replace("Config", "ForConditionalGeneration")])
    text = whole.text_config
    text.num_hidden_layers = 2
    if hasattr(text, "layer_types") and text.layer_types:
        text.layer_types = text.layer_types[:2]
    if hasattr(text, "mlp_layer_types") and text.mlp_layer_types:
        text.mlp_layer_types = text.mlp_layer_types[:2]
    small = narrow(whole).text_config
    rope = small.rope_parameters
    head = getattr(small, "head_dim", None) or small.hidden_size // small.num_attention_heads
    assert sum(rope["mrope_section"]) == head * rope.get("partial_rotary_factor", 1.0) // 2
    if name != "Glm4vConfig":  # its default config runs at no width
        assert verify(whole).passed


def test_a_size_that_a_config_asks_for_stays_where_a_narrow_one_is_refused() -> None:
    """Apertus 1.5 refuses a vocabulary that ends before its picture and sound tokens do."""
    named = ["Apertus1p5ForConditionalGeneration"]
    config = tf.Apertus1p5Config(text_config={"num_hidden_layers": 2}, architectures=named)
    result = verify(config)
    assert result.passed and "narrow width" in result.on
