"""Models that demand sounds, codes, patches or a state beside token ids, or in their place; against plain hooks."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from support.plain_hooks import redrawn, watching
from support.raises import raises
from torch import nn

from hookmap.discovery.discover import discover
from hookmap.errors import DiscoveryError, ModelError
from hookmap.loading.modules import model_root
from hookmap.verification.verify import verify

pytestmark = pytest.mark.slow

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_EYE = {**_SIZES, "intermediate_size": 48, "image_size": 28, "patch_size": 14}
_IDS = torch.arange(5, 16)[None]


def _speech_to_text() -> nn.Module:
    codec = {
        **_SIZES,
        "intermediate_size": 48,
        "num_filters": 4,
        "codebook_size": 16,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "upsample_groups": 32,
        "num_key_value_heads": 4,
    }
    config = tf.KyutaiSpeechToTextConfig(
        **_SIZES, vocab_size=60, codebook_vocab_size=40, num_codebooks=6, ffn_dim=48, audio_pad_token_id=300,
        audio_bos_token_id=39, bos_token_id=3, codec_config={"model_type": "mimi", **codec},
    )  # fmt: skip
    return tf.KyutaiSpeechToTextForConditionalGeneration(config)


def _realtime() -> nn.Module:
    config = tf.VoxtralRealtimeConfig(
        text_config={
            "model_type": "voxtral_realtime_text", **_SIZES, "vocab_size": 96, "intermediate_size": 48,
            "num_key_value_heads": 2,
        },
        audio_config={
            "model_type": "voxtral_realtime_encoder", **_SIZES, "intermediate_size": 48, "head_dim": 8,
            "num_mel_bins": 10, "vocab_size": 96,
        },
    )  # fmt: skip
    return tf.VoxtralRealtimeForConditionalGeneration(config)


def _patches() -> nn.Module:
    config = tf.Pix2StructConfig(
        text_config={"hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96},
        vision_config={**_SIZES, "patch_embed_hidden_size": 12, "d_kv": 8, "d_ff": 48, "seq_len": 40},
        is_encoder_decoder=True,
    )
    return tf.Pix2StructForConditionalGeneration(config)


def _formulas() -> nn.Module:
    eye = {**_EYE, "output_channels": 16, "mlp_dim": 48, "window_size": 2, "global_attn_indexes": [1]}
    convolutions = {"post_conv_in_channels": 16, "post_conv_out_channels": 16, "post_conv_mid_channels": 16}
    config = tf.PPFormulaNetConfig(
        text_config={
            "vocab_size": 96, "encoder_layers": 1, "decoder_layers": 2, "d_model": 32, "decoder_ffn_dim": 48,
            "decoder_attention_heads": 4, "encoder_attention_heads": 4, "max_position_embeddings": 64,
        },
        vision_config={**eye, **convolutions, "image_size": 64, "patch_size": 8, "decoder_hidden_size": 32},
    )  # fmt: skip
    return tf.PPFormulaNetForConditionalGeneration(config)


def _voices(channels: int = 9) -> nn.Module:
    heads = {"head_dim": 8, "num_key_value_heads": 4, "intermediate_size": 48}
    config = tf.DiaConfig(
        encoder_config={**_SIZES, **heads, "vocab_size": 40},
        decoder_config={
            **_SIZES, **heads, "vocab_size": 60, "num_channels": channels, "cross_hidden_size": 32,
            "cross_num_attention_heads": 4, "cross_head_dim": 8, "cross_num_key_value_heads": 4,
            "pad_token_id": 57, "bos_token_id": 58, "eos_token_id": 56,
        },
        delay_pattern=list(range(channels)),
    )  # fmt: skip
    return tf.DiaForConditionalGeneration(config)


def _policy() -> nn.Module:
    text = {**_SIZES, "vocab_size": 96, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 8}
    config = tf.PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": {"model_type": "gemma", **text},
            "vision_config": {"model_type": "siglip_vision_model", **_EYE, "vision_use_head": False},
            "projection_dim": 32,
            "image_token_id": 90,
        },
        dit_config={"model_type": "gemma", **text},
        chunk_size=7,
        max_state_dim=6,
        max_action_dim=5,
    )
    return tf.PI0ForConditionalGeneration(config)


def _spoken(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": _IDS, "input_features": torch.randn(1, 10, 8 * _IDS.shape[1])}


def _coded(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 30, (1, 11, 7))}


def _flat(model: nn.Module) -> dict[str, Any]:
    places = torch.stack([torch.arange(1, 10), torch.arange(1, 10)], -1)
    return {"decoder_input_ids": _IDS, "flattened_patches": torch.cat([places, torch.randn(9, 12)], -1)[None]}


def _seen(model: nn.Module) -> dict[str, Any]:
    return {"decoder_input_ids": _IDS, "pixel_values": torch.randn(1, 3, 64, 64)}


def _voiced(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": _IDS, "decoder_input_ids": torch.randint(5, 30, (1, 11, 9))}


_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], dict[str, Any]], str, tuple[str, str, str]]] = {
    # the model, what it is given, its blocks, the module of the attention's output, of the MLP's and of the MLP's norm
    "codes": (_speech_to_text, _coded, "model.layers.{i}", ("self_attn", "mlp", "post_attention_layernorm")),
    "sounds": (_realtime, _spoken, "model.language_model.layers.{i}", ("self_attn", "", "post_attention_layernorm")),
    "patches": (_patches, _flat, "decoder.layer.{i}", ("self_attention.attention", "mlp.DenseReluDense", "")),
    "formulas": (_formulas, _seen, "model.decoder.layers.{i}", ("self_attn", "fc2", "final_layer_norm")),
    "voices": (_voices, _voiced, "model.decoder.layers.{i}", ("self_attention", "mlp", "pre_mlp_norm")),
}


@pytest.fixture(params=_MODELS)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, dict[str, Any], str, tuple[str, str, str]]]:
    make, given, blocks, parts = _MODELS[request.param]
    torch.manual_seed(0)
    model = redrawn(make())
    yield model, given(model), blocks, parts


def test_what_forward_demands_is_made_and_the_map_is_right(case: Any) -> None:
    model, given, blocks, (mixer, mlp, middle) = case
    found = discover(model)
    assert (found.layers_path, found.num_layers, found.d_model) == (blocks, 2, 32)
    result = verify(model, architecture_map=found)
    assert result.passed, [check.detail for check in result.checks if not check.passed]
    for layer in range(2):
        block = blocks.replace("{i}", str(layer))
        by_hand: dict[str, tuple[str, str]] = {"resid_pre": (block, "input"), "resid_post": (block, "output")}
        by_hand |= {"mixer_out": (f"{block}.{mixer}", "output")} if mixer else {}
        by_hand |= {"mlp_out": (f"{block}.{mlp}", "output")} if mlp else {}
        last = "resid_mid.1" if found.kinds[0].cross_attn else "resid_mid"
        by_hand |= {last: (f"{block}.{middle}", "input")} if middle else {}
        named = {}
        for point in by_hand:
            ((term,),) = (each.terms for each in found.selectors(point, layer))
            named[f"map {point}"] = (term.module, term.side)
        with watching(model, {**by_hand, **named}) as seen:
            model(**given)
        for point in by_hand:
            assert torch.equal(seen[f"map {point}"][-1], seen[point][-1]), (point, layer)


def test_a_model_that_makes_actions_of_a_state_is_refused_with_what_was_seen() -> None:
    """PI0 reads a state, pictures and tokens; its outputs are actions, at positions of their own."""
    torch.manual_seed(0)
    why = r"was given \d+ tokens, and its logits, \[1, 7, 5\], are of other positions"
    with pytest.raises(DiscoveryError, match=why):
        discover(redrawn(_policy()))


def test_a_model_that_names_no_embedding_is_not_opened_and_its_map_is_had() -> None:
    with raises(ModelError, "names no embedding of what it reads:", "hookmap discover"):
        model_root(_voices())
    assert "9 rows of logits for each sequence" in (discover(redrawn(_voices())).unavailable("logits") or "")


def test_a_narrow_copy_keeps_heads_and_their_width_together() -> None:
    config = tf.Pix2StructConfig(
        text_config={"num_layers": 2}, vision_config={"num_hidden_layers": 2}, is_encoder_decoder=True
    )
    config.architectures = ["Pix2StructForConditionalGeneration"]
    result = verify(config)
    assert result.passed and "narrow width" in result.on
