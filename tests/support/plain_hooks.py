"""An independent reference: plain PyTorch hooks at paths written by hand, around a plain `model.generate`.

Nothing of hookmap is used here. Each family is a tiny random model whose weights are drawn so that every branch
contributes O(1): with the usual std of 0.02 a wrong tensor hides inside any tolerance.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCABULARY = 97
LAYERS = 3

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_GPT = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A module's input or output, times a constant."""

    module: str
    side: str
    scale: float = 1.0


@dataclass(frozen=True)
class Family:
    """A tiny model, and where its tensors are by hand: point -> places whose sum it is; `{i}` is the layer."""

    config: Callable[[], Any]
    block: str
    points: dict[str, tuple[Place, ...]]
    only_layers: dict[str, tuple[int, ...]]
    """points of the layers that have them, where not all do"""


def _in(module: str) -> tuple[Place, ...]:
    return (Place(module, "input"),)


def _out(module: str, scale: float = 1.0) -> tuple[Place, ...]:
    return (Place(module, "output", scale),)


def family_of(
    config: Callable[[], Any], block: str, only: dict[str, tuple[int, ...]] | None = None, **points: Any
) -> Family:
    places = {
        name: tuple(Place(f"{block}.{p.module}" if p.module else block, p.side, p.scale) for p in parts)
        for name, parts in points.items()
    }
    ends = {"resid_pre": (Place(block, "input"),), "resid_post": (Place(block, "output"),)}
    return Family(config, block, {**ends, **places}, only or {})


def _llama(
    config: Callable[[], Any], block: str = "model.layers.{i}", only: dict[str, tuple[int, ...]] | None = None
) -> Family:
    return family_of(
        config, block, only,
        mixer_out=_out("self_attn"), resid_mid=_in("post_attention_layernorm"), mlp_out=_out("mlp"),
    )  # fmt: skip


def _sandwich(config: Callable[[], Any], block: str = "model.layers.{i}") -> Family:
    return family_of(
        config, block,
        mixer_out=_out("post_attention_layernorm"), resid_mid=_in("pre_feedforward_layernorm"),
        mlp_out=_out("post_feedforward_layernorm"),
    )  # fmt: skip


def _falcon(**settings: Any) -> Callable[[], Any]:
    sizes = {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "intermediate_size")}
    return lambda: tf.FalconConfig(**sizes, **settings)


FAMILIES: dict[str, Family] = {
    "gpt2": family_of(
        lambda: tf.GPT2Config(**_GPT), "transformer.h.{i}",
        mixer_out=_out("attn"), resid_mid=_in("ln_2"), mlp_out=_out("mlp"),
    ),
    "llama": _llama(lambda: tf.LlamaConfig(**_COMMON)),
    "qwen2": _llama(lambda: tf.Qwen2Config(**_COMMON)),
    "mistral": _llama(lambda: tf.MistralConfig(**_COMMON)),
    "gemma": _llama(lambda: tf.GemmaConfig(**_COMMON, head_dim=8)),
    "qwen3": _llama(lambda: tf.Qwen3Config(**_COMMON, head_dim=8)),
    "qwen3_moe": _llama(
        lambda: tf.Qwen3MoeConfig(
            **_COMMON, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
        )
    ),
    "mixtral": _llama(lambda: tf.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2)),
    "deepseek_v3": _llama(
        lambda: tf.DeepseekV3Config(
            **{**_COMMON, "num_key_value_heads": 4}, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
            n_group=2, topk_group=1, moe_intermediate_size=16, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
            qk_nope_head_dim=8, v_head_dim=8,
        )
    ),
    "gemma2": _sandwich(lambda: tf.Gemma2Config(**_COMMON, head_dim=8, sliding_window=16)),
    "gemma3": _sandwich(lambda: tf.Gemma3TextConfig(**_COMMON, head_dim=8, sliding_window=16)),
    "opt": Family(
        lambda: tf.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        ),
        "model.decoder.layers.{i}",
        {
            "resid_pre": (Place("model.decoder.layers.{i}", "input"),),
            "mixer_out": (Place("model.decoder.layers.{i}.self_attn", "output"),),
            # A norm shows it as [batch * pos, d]: here it is what the block computes.
            "resid_mid": (
                Place("model.decoder.layers.{i}", "input"), Place("model.decoder.layers.{i}.self_attn", "output"),
            ),
            "resid_post": (Place("model.decoder.layers.{i}", "output"),),
        },
        {},
    ),
    "gpt_neox": family_of(
        lambda: tf.GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=4, max_position_embeddings=128, rotary_pct=0.5, pad_token_id=0, bos_token_id=1,
            eos_token_id=None,
        ),
        "gpt_neox.layers.{i}", mixer_out=_out("attention"), mlp_out=_out("mlp"),
    ),
    "gptj": family_of(
        lambda: tf.GPTJConfig(**_GPT, rotary_dim=4), "transformer.h.{i}",
        mixer_in=_in("attn"), mlp_in=_in("mlp"), mixer_out=_out("attn"), mlp_out=_out("mlp"),
    ),
    # Both add the attention's output into the MLP's output in place: a hook that does not copy sees the sum.
    "falcon_7b": family_of(
        _falcon(multi_query=True, parallel_attn=True, new_decoder_architecture=False), "transformer.h.{i}",
        mixer_in=_in("self_attention"), mlp_in=_in("mlp"), mixer_out=_out("self_attention"), mlp_out=_out("mlp"),
    ),
    "falcon_40b": family_of(
        _falcon(new_decoder_architecture=True, num_kv_heads=2), "transformer.h.{i}",
        mixer_out=_out("self_attention"), mlp_out=_out("mlp"),
    ),
    "falcon_sequential": family_of(
        _falcon(multi_query=False, parallel_attn=False, new_decoder_architecture=False, alibi=True),
        "transformer.h.{i}",
        mixer_out=_out("self_attention"), resid_mid=_in("post_attention_layernorm"), mlp_out=_out("mlp"),
    ),
    "phi": family_of(
        lambda: tf.PhiConfig(**{**_COMMON, "num_key_value_heads": 4}, partial_rotary_factor=0.5), "model.layers.{i}",
        mixer_in=_in("self_attn"), mlp_in=_in("mlp"), mixer_out=_out("self_attn"), mlp_out=_out("mlp"),
    ),
    # BLOOM's attention adds the residual stream itself: its output is the middle of the block.
    "bloom": family_of(
        lambda: tf.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=32, n_layer=LAYERS, n_head=4, pad_token_id=0, bos_token_id=1,
            eos_token_id=None,
        ),
        "transformer.h.{i}", resid_mid=_out("self_attention"),
    ),
    "mamba": family_of(
        lambda: tf.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=LAYERS, pad_token_id=0,
            bos_token_id=1, eos_token_id=None,
        ),
        "backbone.layers.{i}", mixer_out=_out("mixer"),
    ),
    "jamba": family_of(
        lambda: tf.JambaConfig(
            **_COMMON, attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
            num_experts=4, num_experts_per_tok=2, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
        ),
        "model.layers.{i}", resid_mid=_in("pre_ff_layernorm"), mlp_out=_out("feed_forward"),
    ),
    "granite": family_of(
        lambda: tf.GraniteConfig(**_COMMON, residual_multiplier=0.22, embedding_multiplier=3.0), "model.layers.{i}",
        mixer_out=_out("self_attn", 0.22), resid_mid=_in("post_attention_layernorm"), mlp_out=_out("mlp", 0.22),
    ),
    "olmo2": family_of(
        lambda: tf.Olmo2Config(**_COMMON), "model.layers.{i}", mixer_in=_in("self_attn"),
        mixer_out=_out("post_attention_layernorm"), resid_mid=_in("mlp"), mlp_out=_out("post_feedforward_layernorm"),
    ),
    # The stream itself is normed, behind each of the two sums.
    "bert": family_of(
        lambda: tf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, is_decoder=True,
        ),
        "bert.encoder.layer.{i}",
        mixer_in=_in("attention.self"), mlp_in=_in("intermediate"), mixer_out=_out("attention.output.dense"),
        resid_mid_sum=_in("attention.output.LayerNorm"), resid_mid=_out("attention"), mlp_out=_out("output.dense"),
    ),
    "cohere": family_of(
        lambda: tf.CohereConfig(**_COMMON), "model.layers.{i}",
        mixer_in=_in("self_attn"), mlp_in=_in("mlp"), mixer_out=_out("self_attn"), mlp_out=_out("mlp"),
    ),
}  # fmt: skip


# Models that read images too: the language model is a part, at a path of its own.

_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
_EYE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
_QWEN_EYE = {"depth": 1, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 1, "hidden_size": 32}
_QWEN_MARKS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_MARKS = {"boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92}
_INSIDE = "model.language_model.layers.{i}"

MULTIMODAL: dict[str, Family] = {
    "qwen2_vl": _llama(
        lambda: tf.Qwen2VLConfig(
            text_config={**_COMMON, "rope_parameters": _MROPE},
            vision_config={**_QWEN_EYE, "embed_dim": 32, "mlp_ratio": 2}, **_QWEN_MARKS,
        ),
        _INSIDE,
    ),
    "qwen2_5_vl": _llama(
        lambda: tf.Qwen2_5_VLConfig(
            text_config={**_COMMON, "rope_parameters": _MROPE},
            vision_config={**_QWEN_EYE, "intermediate_size": 48, "out_hidden_size": 32}, **_QWEN_MARKS,
        ),
        _INSIDE,
    ),
    "qwen3_vl": _llama(
        lambda: tf.Qwen3VLConfig(
            text_config={**_COMMON, "head_dim": 8, "rope_parameters": _MROPE},
            vision_config={
                **_QWEN_EYE, "intermediate_size": 48, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
            },
            **_QWEN_MARKS,
        ),
        _INSIDE,
    ),
    "gemma3": _sandwich(
        lambda: tf.Gemma3Config(
            text_config={**_COMMON, "head_dim": 8, "sliding_window": 16},
            vision_config={**_EYE, "num_hidden_layers": 1}, mm_tokens_per_image=4, **_MARKS,
        ),
        _INSIDE,
    ),
    "llama4": family_of(
        lambda: tf.Llama4Config(
            text_config={
                **_COMMON, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4,
                "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
            },
            vision_config={
                **_EYE, "num_hidden_layers": 1, "vision_output_dim": 32, "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            **_MARKS,
        ),
        "language_model.model.layers.{i}",
        mixer_out=_out("self_attn"), resid_mid=_in("post_attention_layernorm"),
    ),
    "llava": _llama(
        lambda: tf.LlavaConfig(
            text_config={**_COMMON, "model_type": "llama"},
            vision_config={**_EYE, "model_type": "clip_vision_model", "num_hidden_layers": 2, "projection_dim": 32},
            image_token_index=92, image_seq_length=4,
        ),
        _INSIDE,
    ),
    "paligemma": _llama(
        lambda: tf.PaliGemmaConfig(
            text_config={**_COMMON, "head_dim": 8, "model_type": "gemma"},
            vision_config={**_EYE, "model_type": "siglip_vision_model", "num_hidden_layers": 1},
            image_token_index=92, projection_dim=32,
        ),
        _INSIDE,
    ),
    # Its second layer attends to the image alone: it is never called on text.
    "mllama": _llama(
        lambda: tf.MllamaConfig(
            text_config={
                **_COMMON, "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            },
            vision_config={
                "hidden_size": 32, "intermediate_size": 48, "attention_heads": 4, "image_size": 16, "patch_size": 4,
                "num_hidden_layers": 1, "num_global_layers": 1, "vision_output_dim": 64, "max_num_tiles": 2,
                "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
            image_token_index=92,
        ),
        _INSIDE,
        dict.fromkeys(("resid_pre", "mixer_out", "resid_mid", "mlp_out", "resid_post"), (0, 2)),
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """The family's model, always the same one; `settings` differ in its config."""
    config = FAMILIES[name].config()
    if settings:
        config = type(config).from_dict({**config.to_dict(), **settings})
    torch.manual_seed(7)
    return redrawn(tf.AutoModelForCausalLM.from_config(config, dtype=dtype))


def redrawn(model: nn.Module) -> nn.Module:
    """The same model with weights under which each branch contributes O(1)."""
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.ndim >= 2 and not path.endswith("A_log"):
                weight.normal_(0, weight.shape[-1] ** -0.5)
    return model.eval()


def build_multimodal(name: str) -> nn.Module:
    """The whole model, its part for images included."""
    torch.manual_seed(7)
    return redrawn(tf.AutoModelForImageTextToText.from_config(MULTIMODAL[name].config()))


@contextmanager
def watching(model: nn.Module, places: Mapping[Any, tuple[Any, ...]]) -> Iterator[dict[Any, list[torch.Tensor]]]:
    """A copy of what is at each place (module, "input" or "output", index in an output tuple) in each of its calls."""
    seen: dict[Any, list[torch.Tensor]] = {name: [] for name in places}

    def keep(rows: list[torch.Tensor], index: int | None = None) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            whole = entered if not output else output[0] if index is None else output[0][index]
            rows.append((whole[0] if isinstance(whole, tuple) else whole).detach().clone())

        return hook

    handles = []
    for name, (path, side, *index) in places.items():
        module, hook = model.get_submodule(path), keep(seen[name], *index)
        add = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
        handles.append(add(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Reference:
    """What plain hooks saw: every place, pass by pass, joined along the positions."""

    sequences: torch.Tensor
    seen: dict[tuple[str, str], torch.Tensor]
    """(module, side) -> [batch, padded prompt + generated - 1, d]"""
    passes: int

    def point(self, family: Family, point: str, layer: int) -> torch.Tensor:
        """A point of a layer, [batch, pos, d], pads and all."""
        total = None
        for place in family.points[point]:
            tensor = self.seen[place.module.replace("{i}", str(layer)), place.side]
            tensor = tensor if place.scale == 1.0 else tensor * place.scale
            total = tensor if total is None else total + tensor
        assert total is not None
        return total


def generate(model: nn.Module, family: Family, token_ids: list[list[int]], **settings: Any) -> Reference:
    """A plain `model.generate` of left-padded prompts, with hooks that copy what they see."""
    width = max(map(len, token_ids))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids in token_ids]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in token_ids]),
    }
    places = {
        (p.module.replace("{i}", str(i)), p.side)
        for point, ps in family.points.items()
        for p in ps
        for i in family.only_layers.get(point, range(LAYERS))
    }
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    with watching(model, {place: place for place in places}) as seen:
        sequences = model.generate(**inputs, pad_token_id=0, **settings)
    handle.remove()
    return Reference(sequences, {key: torch.cat(parts, dim=1) for key, parts in seen.items()}, len(calls))


def hooks_on(model: Any) -> set[int]:
    """The hooks on a model's modules, by `id`. transformers' own stay there after `output_hidden_states=True`."""
    return {id(hook) for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())}
