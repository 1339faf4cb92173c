"""The shapes of well-known models, from which `hookmap maps build --models` builds their shipped maps.

They are written by hand and hold only what decides structure and size. So a map made from one claims no config's hash,
and where `hookmap discover`, which reads the published config, finds another map, that one is right.
"""

from __future__ import annotations

from typing import Any


def _llama(hidden: int, layers: int, heads: int, inner: int, tied: bool = False) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8}
    vocabulary = {"vocab_size": 128256, "tie_word_embeddings": tied, "max_position_embeddings": 131072}
    return "llama", {**sizes, **vocabulary, "intermediate_size": inner, "rms_norm_eps": 1e-5}


def _qwen3(hidden: int, layers: int, heads: int, inner: int, tied: bool = True) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8}
    vocabulary = {"vocab_size": 151936, "tie_word_embeddings": tied, "max_position_embeddings": 40960}
    return "qwen3", {**sizes, **vocabulary, "head_dim": 128, "intermediate_size": inner, "rms_norm_eps": 1e-6}


def _gpt2(width: int, layers: int, heads: int) -> tuple[str, dict[str, Any]]:
    return "gpt2", {"n_embd": width, "n_layer": layers, "n_head": heads}


_GEMMA3_4B = {
    "hidden_size": 2560, "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "intermediate_size": 10240, "sliding_window": 1024, "vocab_size": 262208,
}  # fmt: skip
_GEMMA3_1B = {
    "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "intermediate_size": 6912, "sliding_window": 512, "vocab_size": 262144,
}  # fmt: skip
_OLMO2_7B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 11008, "vocab_size": 100352, "max_position_embeddings": 4096,
}  # fmt: skip

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 6144),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 9728),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 32, 12288, tied=False),
    "meta-llama/Llama-3.2-1B": _llama(2048, 16, 32, 8192, tied=True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 28, 24, 8192, tied=True),
    "meta-llama/Llama-3.1-8B": _llama(4096, 32, 32, 14336),
    "meta-llama/Llama-3.1-70B": _llama(8192, 80, 64, 28672),
    "google/gemma-3-1b-it": ("gemma3_text", _GEMMA3_1B),
    "google/gemma-3-4b-it": ("gemma3", {"text_config": _GEMMA3_4B}),
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", {}),
    "allenai/OLMo-2-1124-7B": ("olmo2", _OLMO2_7B),
    "deepseek-ai/DeepSeek-V3": ("deepseek_v3", {}),
}
"""hub id -> model type, and the settings that differ from that type's defaults"""
