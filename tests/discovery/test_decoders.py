"""The map of an encoder-decoder is its decoder's: cross-attention is a branch of its own, the encoder is left out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from support.encoders import DECODERS, ENCODERS, LAYERS, build
from support.plain_hooks import redrawn
from torch import nn

import hookmap
from hookmap.verification.verify import verify

_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3, "decoder_start_token_id": 2}
_BART: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 3, "decoder_layers": LAYERS, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, **_IDS,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_the_decoder_is_mapped_with_three_branches(name: str) -> None:
    model = build(DECODERS[name])
    found = hookmap.discover(model)
    assert found.num_layers == LAYERS and "decoder" in found.layers_path
    assert len(found.left_out) == 1 and "encoder" in found.left_out[0]
    (kind,) = found.kinds
    assert kind.branch_order == "sequential" and kind.cross_attn is not None and kind.mlp is not None
    assert {"cross_attn_in", "cross_attn_out", "cross_attn_out_raw", "resid_mid.0", "resid_mid.1"} <= set(kind.points)
    assert kind.points["resid_mid"].terms == kind.points["resid_mid.0"].terms != kind.points["resid_mid.1"].terms
    assert not any(name.startswith("mlp_") and name.endswith(".1") for name in kind.points)
    assert verify(model, architecture_map=found).passed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_map_with_the_branches_in_each_others_places_is_refuted(name: str) -> None:
    model = build(DECODERS[name])
    found = hookmap.discover(model)
    (kind,) = found.kinds
    for one, other in (("cross_attn_out", "mlp_out"), ("cross_attn_in", "mlp_in"), ("cross_attn_out", "mixer_out")):
        swapped = {**kind.points, one: kind.points[other], other: kind.points[one]}
        wrong = found.model_copy(update={"kinds": (kind.model_copy(update={"points": swapped}),)})
        assert not verify(model, architecture_map=wrong).passed, (one, other)


def test_a_model_without_cross_attention_says_so() -> None:
    found = hookmap.discover(build(ENCODERS["bert"]))
    assert found.unavailable("cross_attn_out") == "this block has no attention to an encoder's positions"
    assert "cross_attn" not in found.to_json()


def _florence() -> Any:
    vision = {"embed_dim": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2],
              "num_groups": [2, 2, 2, 2], "projection_dim": 32}  # fmt: skip
    return tf.Florence2Config(text_config={"model_type": "bart", **_BART}, vision_config=vision)


def _fsmt() -> Any:
    sizes = {name: value for name, value in _BART.items() if name != "vocab_size"}
    return tf.FSMTConfig(**sizes, langs=["en", "de"], src_vocab_size=97, tgt_vocab_size=97)


def _prophetnet() -> Any:
    layers = {"num_encoder_layers": 3, "num_decoder_layers": LAYERS, "hidden_size": 32, "max_position_embeddings": 64}
    heads = {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
    return tf.ProphetNetConfig(vocab_size=97, encoder_ffn_dim=48, decoder_ffn_dim=48, **layers, **heads, **_IDS)


_OTHERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "images too": ("Florence2ForConditionalGeneration", _florence),
    "positions first": ("FSMTForConditionalGeneration", _fsmt),
    "several streams behind one another": ("ProphetNetForConditionalGeneration", _prophetnet),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _OTHERS)
def test_other_decoders_are_mapped_and_captured(name: str) -> None:
    kind, config = _OTHERS[name]
    torch.manual_seed(0)
    model: nn.Module = redrawn(getattr(tf, kind)(config())).eval()
    found = hookmap.discover(model)
    assert "decoder" in found.layers_path and found.num_layers == LAYERS and found.kinds[0].cross_attn is not None
    assert verify(model, architecture_map=found).passed
    hm = hookmap.open(model)
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 1}
    run = hm.capture([[5, 6, 7, 8]], ["cross_attn_out", "logits"], **how)
    plain = model.generate(
        input_ids=torch.tensor([[5, 6, 7, 8]]), output_logits=True, return_dict_in_generate=True, do_sample=False, **how
    )
    assert list(run.tokens[0]) == plain.sequences[0].tolist()
    assert torch.equal(run.read(0, "logits"), torch.cat(plain.logits))
