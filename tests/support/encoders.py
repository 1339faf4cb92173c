"""Tiny encoder-decoders and encoders, and a reference: plain PyTorch hooks around a plain `generate` or `forward`.

Nothing of hookmap is used here. Where each tensor is, is written by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from support.plain_hooks import redrawn, watching
from torch import nn

LAYERS = 2
_IDS: dict[str, Any] = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, "forced_bos_token_id": None,
}  # fmt: skip
_BART: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 3, "decoder_layers": LAYERS, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 200, **_IDS,
}  # fmt: skip
_BERT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 200, "pad_token_id": 0,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": LAYERS,
    "num_heads": 4, **_IDS,
}  # fmt: skip
_WHISPER = {**_BART, "max_source_positions": 30, "max_target_positions": 60, "num_mel_bins": 16}

Where = tuple[str, str, int | None]
"""module path over {i}, "input" or "output", index in an output tuple"""


@dataclass(frozen=True)
class Reading:
    """A tiny model, and where its tensors are by hand."""

    kind: str
    config: Callable[[], Any]
    places: dict[str, Where]
    features: tuple[int, ...] = ()
    """shape of what an encoder reads that reads no tokens"""
    unavailable: dict[str, str] = field(default_factory=dict)


def _of_bart(block: str = "model.decoder.layers.{i}", pre_norm: bool = False) -> dict[str, Where]:
    """`pre_norm`: each norm stands before its branch (Whisper, Pegasus), not on the stream."""
    stream: dict[str, Where] = (
        {
            "resid_mid": (f"{block}.encoder_attn_layer_norm", "input", None),
            "resid_mid.1": (f"{block}.final_layer_norm", "input", None),
            "cross_attn_in": (f"{block}.encoder_attn_layer_norm", "output", None),
            "mlp_in": (f"{block}.final_layer_norm", "output", None),
        }
        if pre_norm
        else {
            "resid_mid": (f"{block}.self_attn_layer_norm", "output", None),
            "resid_mid.1": (f"{block}.encoder_attn_layer_norm", "output", None),
            "cross_attn_in": (f"{block}.self_attn_layer_norm", "output", None),
            "mlp_in": (f"{block}.encoder_attn_layer_norm", "output", None),
        }
    )
    return {
        "resid_pre": (block, "input", None),
        "attn_out": (f"{block}.self_attn", "output", 0),
        **stream,
        "cross_attn_out": (f"{block}.encoder_attn", "output", 0),
        "mlp_out": (f"{block}.fc2", "output", None),
        "resid_post": (block, "output", None),
    }


_T5_BLOCK = "decoder.block.{i}"
DECODERS: dict[str, Reading] = {
    "t5": Reading(
        "T5ForConditionalGeneration",
        lambda: tf.T5Config(**_T5),
        {
            "resid_pre": (_T5_BLOCK, "input", None),
            "attn_out": (f"{_T5_BLOCK}.layer.0.SelfAttention", "output", 0),
            "resid_mid": (f"{_T5_BLOCK}.layer.1.layer_norm", "input", None),
            "cross_attn_in": (f"{_T5_BLOCK}.layer.1.layer_norm", "output", None),
            "cross_attn_out": (f"{_T5_BLOCK}.layer.1.EncDecAttention", "output", 0),
            "resid_mid.1": (f"{_T5_BLOCK}.layer.2.layer_norm", "input", None),
            "mlp_in": (f"{_T5_BLOCK}.layer.2.layer_norm", "output", None),
            "mlp_out": (f"{_T5_BLOCK}.layer.2.DenseReluDense", "output", None),
            "resid_post": (_T5_BLOCK, "output", 0),
            "final_norm": ("decoder.final_layer_norm", "output", None),
        },
    ),
    "bart": Reading("BartForConditionalGeneration", lambda: tf.BartConfig(**_BART), _of_bart()),
    "marian": Reading("MarianMTModel", lambda: tf.MarianConfig(**_BART), _of_bart()),
    "pegasus": Reading("PegasusForConditionalGeneration", lambda: tf.PegasusConfig(**_BART), _of_bart(pre_norm=True)),
    "whisper": Reading(
        "WhisperForConditionalGeneration", lambda: tf.WhisperConfig(**_WHISPER), _of_bart(pre_norm=True), (16, 60)
    ),
}

_BERT_BLOCK = "{base}.encoder.layer.{i}"
_OF_BERT: dict[str, Where] = {
    "resid_pre": (_BERT_BLOCK, "input", None),
    "attn_out": (f"{_BERT_BLOCK}.attention.output.dense", "output", None),
    "resid_mid": (f"{_BERT_BLOCK}.attention.output.LayerNorm", "output", None),
    "mlp_out": (f"{_BERT_BLOCK}.output.dense", "output", None),
    "resid_post": (_BERT_BLOCK, "output", None),
}


def _of_bert(base: str) -> dict[str, Where]:
    return {name: (path.replace("{base}", base), side, index) for name, (path, side, index) in _OF_BERT.items()}


def _modernbert() -> Any:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return tf.ModernBertConfig(**_BERT, **ids, global_attn_every_n_layers=2, local_attention=8)


def _labels(config: Any, labels: int = 3) -> Any:
    config.num_labels = labels
    return config


_POOLED = "the model gives no logits for each position: their shape is [1, 3]"
ENCODERS: dict[str, Reading] = {
    "bert": Reading("BertForMaskedLM", lambda: tf.BertConfig(**_BERT), _of_bert("bert")),
    "roberta": Reading("RobertaForMaskedLM", lambda: tf.RobertaConfig(**_BERT), _of_bert("roberta")),
    "electra": Reading("ElectraForMaskedLM", lambda: tf.ElectraConfig(**_BERT, embedding_size=32), _of_bert("electra")),
    "modernbert": Reading(
        "ModernBertForMaskedLM",
        _modernbert,
        {
            "resid_pre": ("model.layers.{i}", "input", None),
            "attn_out": ("model.layers.{i}.attn", "output", 0),
            "resid_mid": ("model.layers.{i}.mlp_norm", "input", None),
            "mlp_out": ("model.layers.{i}.mlp", "output", None),
            "resid_post": ("model.layers.{i}", "output", None),
            "final_norm": ("model.final_norm", "output", None),
        },
    ),
    "classifier": Reading(
        "BertForSequenceClassification", lambda: _labels(tf.BertConfig(**_BERT)), _of_bert("bert"),
        unavailable={"logits": _POOLED},
    ),
    "token classifier": Reading(
        "RobertaForTokenClassification", lambda: _labels(tf.RobertaConfig(**_BERT)), _of_bert("roberta")
    ),
}  # fmt: skip


def build(reading: Reading) -> Any:
    """The tiny model, whose weights are drawn so that each branch contributes O(1)."""
    torch.manual_seed(0)
    model = redrawn(getattr(tf, reading.kind)(reading.config()))
    model.config._attn_implementation = "eager"
    if model.can_generate():
        model.generation_config = tf.GenerationConfig(**_IDS)
    return model.eval()


def prompt_inputs(reading: Reading, prompt: Any) -> dict[str, torch.Tensor]:
    """What `generate` or `forward` is given for one prompt: token ids, or a tensor of features [1, ...]."""
    if reading.features:
        return {"input_features": prompt}
    return {"input_ids": torch.tensor([prompt])}


def by_hand(
    model: nn.Module, reading: Reading, run: Callable[[], Any]
) -> tuple[Any, dict[tuple[str, int], torch.Tensor]]:
    """What `run` gives, and the tensors of each point and layer, [pos, d], in the order of the passes."""
    places = {
        (point, layer): (path.replace("{i}", str(layer)), side, index)
        for point, (path, side, index) in reading.places.items()
        for layer in range(LAYERS if "{i}" in path else 1)
    }
    with watching(model, places) as kept:
        result = run()
    return result, {key: torch.cat(rows, 1)[0] for key, rows in kept.items()}
