"""A GGUF file of a tiny Qwen 2, written with the gguf package and llama.cpp's names: no code of hookmap's."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

WORDS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "the", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"


def tiny_qwen2() -> Any:
    """Three layers of width 32, with random weights that each count."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, eos_token_id=None,
            bos_token_id=None, pad_token_id=len(WORDS) - 1, use_sliding_window=False, rms_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5 + (parameter.ndim == 1))
    return model


def write(model: Any, path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> dict[str, Any]:
    """Writes the model; matrices as `kind`. Returns name in transformers -> the weights that the file holds."""
    c = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * (len(WORDS) - 3) + [3] * 3)
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(len(WORDS) - 1)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, c.num_hidden_layers)
    held = {}
    for name, weight in model.state_dict().items():
        values = weight.numpy().astype(np.float32)
        stem, _, end = name.rpartition(".")
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        data = values if stored == gguf.GGMLQuantizationType.F32 else gguf.quantize(values, stored)
        writer.add_tensor(f"{names.get_name(stem)}.{end}", data, raw_dtype=stored)
        held[name] = torch.from_numpy(values if data is values else gguf.dequantize(data, stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
