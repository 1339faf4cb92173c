"""Settings that complete the default configs of transformers which build no model that runs.

Only `hookmap maps` and the tests read them. Discovery does not: a user's config is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Completion:
    """The settings added to a default config, and the reason."""

    settings: dict[str, Any]
    why: str
    part: str = ""
    """the attribute that holds the causal language model's config, where the whole config is another model's"""


_HEAD_DIM = "head_dim is None by default, and the rotary embedding needs a number"
_INDEXER = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}

COMPLETIONS: dict[str, Completion] = {
    "cohere_compass_text": Completion(
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
        "rope_parameters must name each layer type",
    ),
    "dbrx": Completion(
        {"attn_config": {"rope_theta": 500_000.0, "clip_qkv": 8, "kv_n_heads": 8}},
        "the attention reads attn_config.rope_theta and clamps at clip_qkv; the values are those of DBRX",
    ),
    "deepseek_v2": Completion(
        {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 1408},
        "the router reads num_experts_per_tok, None by default; the values are those of DeepSeek-V2-Lite",
    ),
    "dots1": Completion(
        {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1},
        "the numbers of experts are None by default; the values are those of dots.llm1",
    ),
    # The two assistants read the caches of another model and no token ids: they are built, and do not run alone.
    "gemma4_assistant": Completion({"text_config": _ASSISTANT}, "its config asks that all layers share caches"),
    "gemma4_unified_assistant": Completion({"text_config": _ASSISTANT}, "an assistant has no caches of its own"),
    "hunyuan_v1_dense": Completion({"head_dim": 128}, _HEAD_DIM),
    "hunyuan_v1_moe": Completion({"head_dim": 128}, _HEAD_DIM),
    "lfm2_moe": Completion(
        {"layer_types": ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(32)]},
        "layer_types is None by default; the attention layers are those of LFM2-8B-A1B",
    ),
    "ministral": Completion({"head_dim": 128}, _HEAD_DIM),
    "musicgen": Completion({}, "MusicgenForCausalLM takes the decoder's part of the config", "decoder"),
    "musicgen_melody": Completion({}, "MusicgenMelodyForCausalLM takes the decoder's part", "decoder"),
    "nemotron": Completion({"num_key_value_heads": 8}, "num_key_value_heads is None by default"),
    "qwen4_exp": Completion({"text_config": _INDEXER}, "the indexer's sizes are None by default"),
    "qwen4_exp_text": Completion(_INDEXER, "the indexer's sizes are None by default"),
    "xlm": Completion({"causal": True}, "it attends both ways by default; this is how it predicts the next token"),
    "xmod": Completion({"default_language": "en_XX"}, "an adapter is chosen by language"),
}


_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_HALF_ROTATED = {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}}
_VISION_START = Completion({"vision_start_token_id": 151_652}, "the forward pass reads vision_start_token_id")

# Of the classes that read images or sounds too.
MULTIMODAL_COMPLETIONS: dict[str, Completion] = {
    "aya_vision": Completion(
        {
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 364,
                "patch_size": 14,
                "vision_use_head": False,
            }
        },
        "14 heads do not divide the tower's width; the values are those of Aya Vision 8B",
    ),
    "blip-2": Completion({"image_token_index": 50_265}, "the forward pass compares each token with image_token_index"),
    "chameleon": Completion({"vocabulary_map": {"<image>": 8711, "IMGIMGAZ": 4}}, "vocabulary_map is None by default"),
    "cohere_compass": Completion(
        {"text_config": {"rope_parameters": {"full_attention": _ROPE}}}, "rope_parameters must name each layer type"
    ),
    "deepseek_ocr2": Completion(
        {
            "text_config": {
                "mlp_layer_types": ["dense"] + ["sparse"] * 11,
                "num_hidden_layers": 12,
                "num_experts_per_tok": 6,
                "hidden_size": 1280,
                "num_attention_heads": 10,
                "intermediate_size": 6848,
                "moe_intermediate_size": 896,
            }
        },
        "mlp_layer_types and num_experts_per_tok are None by default; the values are those of DeepSeek-OCR",
    ),
    "diffusion_gemma": Completion(
        {"text_config": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}},
        "the numbers of experts are None by default; the values are those of Gemma 4's",
    ),
    "idefics": Completion(
        {"cross_layer_interval": 4},
        "by default a cross-attention is before each layer, and transformers records the state between the two; "
        "the value is that of IDEFICS 9B",
    ),
    "emu3": Completion(
        {"vocabulary_map": {"<image>": 151_859, "<|extra_200|>": 151_846, "<|visual token 000000|>": 151_854}},
        "vocabulary_map is None by default",
    ),
    "glm46v": Completion({"text_config": _HALF_ROTATED}, "the default sections are of heads that are rotated half"),
    "glm4v": Completion({"text_config": _HALF_ROTATED}, "the default sections are of heads that are rotated half"),
    "glm4v_moe": Completion(
        {"text_config": {**_HALF_ROTATED, "head_dim": 128}}, "the default sections are of heads that are rotated half"
    ),
    "glmga": Completion({"text_config": _HALF_ROTATED}, "the default sections are of heads that are rotated half"),
    "granite4_vision": Completion(
        {"deepstack_layer_map": [[-2, 0]], "downsample_rate": "1/2"}, "deepstack_layer_map is None by default"
    ),
    "hunyuan_vl": Completion({"text_config": {"head_dim": 128}}, _HEAD_DIM),
    "instructblip": Completion({"image_token_index": 32_000}, "it compares each token with image_token_index"),
    "instructblipvideo": Completion({"video_token_index": 32_000}, "it compares each token with video_token_index"),
    "paddleocr_vl": Completion(
        {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [16, 24, 24]}}},
        "the sections are a default of the model's class; the values are those of PaddleOCR-VL",
    ),
    "qwen2_5_omni_thinker": _VISION_START,
    "qwen3_omni_moe_thinker": _VISION_START,
    "qwen4_exp": COMPLETIONS["qwen4_exp"],
    "step3p7": Completion({"text_config": {"sliding_window": 512}}, "sliding_window is None by default"),
}


def config_of(model_type: str, multimodal: bool = False) -> Any:
    """The config of a model type that the sweep builds: the default, completed where the default builds nothing.

    `multimodal`: of the whole of a model that reads images or sounds too.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    completion = (MULTIMODAL_COMPLETIONS if multimodal else COMPLETIONS).get(model_type)
    config = CONFIG_MAPPING[model_type](**(completion.settings if completion else {}))
    if multimodal:
        config.architectures = [first(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type])]
    return getattr(config, completion.part) if completion and completion.part else config


def first(classes: Any) -> str:
    """The class of a model type, in transformers' mappings one name or several."""
    found: str = classes if isinstance(classes, str) else classes[0]
    return found
