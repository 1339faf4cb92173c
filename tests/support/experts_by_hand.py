"""Tiny mixtures of experts, and what their experts compute, by plain arithmetic on what a plain hook sees."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from support import plain_hooks
from torch import Tensor, nn

_COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_SHARED = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_COMMON, head_dim=8, **_SHARED),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**_COMMON, **_SHARED, shared_expert_intermediate_size=40),
    "mixtral": lambda: tf.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=3),
    "olmoe": lambda: tf.OlmoeConfig(**_COMMON, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **{**_COMMON, "num_key_value_heads": 4}, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
        n_group=2, topk_group=1, moe_intermediate_size=24, q_lora_rank=12, kv_lora_rank=20, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1,
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "jetmoe": lambda: tf.JetMoeConfig(
        **_COMMON, num_local_experts=4, num_experts_per_tok=2, kv_channels=8
    ),
    "llama4": lambda: tf.Llama4TextConfig(
        **_COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=2, intermediate_size_mlp=40,
        interleave_moe_layer_step=1, attention_chunk_size=32,
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """Random weights under which each branch gives about as much as the stream holds."""
    torch.manual_seed(0)
    return plain_hooks.redrawn(tf.AutoModelForCausalLM.from_config(CONFIGS[name]())).eval()


def rows(experts: Any, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """What each chosen expert's down projection reads and what it gives, of tokens [tokens, d], one by one."""
    posts, outs = [], []
    for token, own in zip(x, chosen.tolist(), strict=True):
        for expert in own:
            post = _activations(experts, token, expert)
            posts.append(post)
            outs.append(_down(experts, post, expert))
    return (torch.stack(each).unflatten(0, chosen.shape) for each in (posts, outs))  # type: ignore[return-value]


def _activations(experts: Any, token: Tensor, expert: int) -> Tensor:
    weight = experts.gate_up_proj[expert]
    if hasattr(experts, "gate_up_proj_bias"):  # gpt-oss: gate and up in turn, clamped
        both = token @ weight + experts.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    gate, up = (token @ weight.T).chunk(2)
    return F.silu(gate) * up


def _down(experts: Any, post: Tensor, expert: int) -> Tensor:
    if hasattr(experts, "down_proj_bias"):
        return post @ experts.down_proj[expert] + experts.down_proj_bias[expert]
    return post @ experts.down_proj[expert].T


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Inside, what each call of an experts module gets: tokens [tokens, d], chosen experts and weights [tokens, k]."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        x, chosen, weights = (*args, *kwargs.values())[:3]
        seen.append((x.detach().clone(), chosen.clone(), weights.detach().clone()))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
