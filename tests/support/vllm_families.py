"""Tiny checkpoints of model families, and what transformers and vLLM compute at each point of them.

Weights are drawn anew, so that each branch contributes as much as the stream: a point at a wrong place is far off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hookmap.activations import Key
from hookmap.maps.terms import Term

_PLAIN = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_PLAIN, "num_key_value_heads": 1}
_WIDE_HEADS = {**_GROUPED, "head_dim": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GPT2 = {
    "vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 256, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": _WIDE_HEADS,
    "mistral": _WIDE_HEADS,
    "qwen2": _GROUPED,
    "qwen3": _WIDE_HEADS,
    "phi3": _GROUPED,
    "smollm3": _GROUPED,
    "granite": {**_GROUPED, "residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "gemma": _WIDE_HEADS,
    "gemma2": {**_WIDE_HEADS, "query_pre_attn_scalar": 512},
    "gemma3_text": {**_WIDE_HEADS, "query_pre_attn_scalar": 512},
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "exaone4": _WIDE_HEADS,
    "cohere": _GROUPED,
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
    "nemotron": _WIDE_HEADS,
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 16},
    "gpt_neox": _PLAIN,
    "phi": _PLAIN,
    "opt": {**_PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {"vocab_size": 256, "hidden_size": 64, "n_layer": 3, "n_head": 2},
    "falcon": {**_PLAIN, "num_kv_heads": 1, "new_decoder_architecture": False},
    "mixtral": {**_WIDE_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_WIDE_HEADS, **_EXPERTS, "decoder_sparse_step": 1},
    "olmoe": {**_PLAIN, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {
        **_PLAIN, "num_key_value_heads": 2, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "kv_lora_rank": 512, "q_lora_rank": 32, "qk_rope_head_dim": 64, "v_head_dim": 32,
        "qk_nope_head_dim": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    "falcon_h1": {
        **_WIDE_HEADS, "mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_n_groups": 1,
        "mamba_d_state": 16,
    },
    "mamba2": {
        "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 32, "n_groups": 1,
        "state_size": 16, "expand": 2,
    },
    "qwen3_next": {
        **_WIDE_HEADS, **_EXPERTS, "shared_expert_intermediate_size": 48, "linear_num_value_heads": 2,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "gpt_oss": {**_WIDE_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
"""model type -> its config, small"""


def save(model_type: str, folder: Path) -> Path:
    """Writes a checkpoint of the family in float32, without a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **FAMILIES[model_type])).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, weight.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.3)
            else:
                weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def token_ids(count: int = 40) -> torch.Tensor:
    """Tokens of one prompt, [count]."""
    return torch.randint(3, 250, (count,), generator=torch.Generator().manual_seed(1))


def by_transformers(folder: Path, dtype: str = "float32") -> dict[Key, torch.Tensor]:
    """Every point of transformers' model of a checkpoint, rows [tokens, ...], by plain hooks.

    What no module shows is read by hookmap's own engine, which tests of it hold against sums by hand.
    """
    from transformers import AutoModelForCausalLM

    import hookmap

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    found = hookmap.discover(model)
    wanted = [point for point in found.points if point not in ("pattern", "attn_scores", "logits", "logits_raw")]
    terms = {selector.key: selector.terms for selector in found.selectors(wanted)}
    inside = {key: each for key, each in terms.items() if any(term.is_inside for term in each)}
    terms = {key: each for key, each in terms.items() if key not in inside}
    ids = token_ids()
    with torch.no_grad(), watched(model, terms) as read:
        model(ids.unsqueeze(0))
    found_rows = read().items()
    rows = {key: t.reshape(len(ids), *t.shape[(1 if len(t) == len(ids) else 2) :]) for key, t in found_rows}
    if inside:
        own = hookmap.open(model, check=False).capture([ids.tolist()], sorted({key[0] for key in inside}), "all", 0)
        rows |= {key: own.read(0, *key) for key in inside}
    # Before the scale, which Gemma's module has inside it.
    return {**rows, ("embed", None): model.get_input_embeddings().weight.detach()[ids]}


@contextlib.contextmanager
def watched(model: nn.Module, terms: Mapping[Key, tuple[Term, ...]]) -> Iterator[Callable[[], dict[Key, torch.Tensor]]]:
    """Plain hooks on a model; the function that comes out gives the sum of each key's terms in the last pass."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[Term, torch.Tensor] = {}
    handles = []
    for term in {term for each in terms.values() for term in each}:
        handles.append(_watch(modules[term.module], term, seen))

    def read() -> dict[Key, torch.Tensor]:
        return {
            key: _total([t.times(seen[t], parameters.get(t.parameter)) for t in each]) for key, each in terms.items()
        }

    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _watch(module: nn.Module, term: Term, seen: dict[Term, torch.Tensor]) -> Any:
    def on_input(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen[term] = term.resolve(args, kwargs, None).detach().clone()

    def on_output(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen[term] = term.resolve(args, kwargs, output).detach().clone()

    if term.side == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output, with_kwargs=True)


def _total(tensors: list[torch.Tensor]) -> torch.Tensor:
    total = tensors[0]
    for each in tensors[1:]:
        total = total + each
    return total


@contextlib.contextmanager
def repaired(model_type: str) -> Iterator[None]:
    """Inside, vLLM 0.32 computes on the CPU what transformers does, where it otherwise does not.

    BLOOM was trained with the approximation of GELU by tanh. The kernel of rotary embeddings reads queries
    [tokens, heads, d] as [tokens, d].
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.model_executor.models import bloom

    with pytest.MonkeyPatch.context() as patch:
        if model_type == "bloom":
            patch.setattr(bloom, "get_act_fn", lambda name: nn.GELU(approximate="tanh"))
        if model_type == "deepseek_v2":
            patch.setattr(RotaryEmbedding, "forward_cpu", lambda layer, *given: layer.forward_native(*given))
        yield


class OnVllm:
    """A checkpoint in vLLM's engine, eager, in this process."""

    def __init__(self, folder: Path, dtype: str = "float32", **options: Any) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(folder), skip_tokenizer_init=True, dtype=dtype, enforce_eager=True, max_model_len=128,
            disable_log_stats=True, **options,
        )  # fmt: skip
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        self.worker = executor.driver_worker.worker
        self.model: nn.Module = self.worker.model_runner.model

    def rows(self, terms: Mapping[Key, tuple[Term, ...]]) -> dict[Key, torch.Tensor]:
        """The points of the prompt's tokens, [tokens, ...], by plain hooks."""
        from vllm import SamplingParams

        once = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
        with watched(self.model, terms) as read:
            self.llm.generate({"prompt_token_ids": token_ids().tolist()}, once, use_tqdm=False)
        return {key: rows if terms[key][0].flat else rows[0] for key, rows in read().items()}

    def close(self) -> None:
        """Ends the engine, so that another can begin in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.worker, self.model
        cleanup_dist_env_and_memory()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of a row, over its length."""
    difference = (found.float() - expected.float()).flatten(1).norm(dim=1)
    return float((difference / expected.float().flatten(1).norm(dim=1).clamp_min(1e-20)).max())
