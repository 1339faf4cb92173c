"""Plain operations in place of vLLM's kernels: what each of its layers computes, as far as a dataflow asks.

The layers are vLLM's own building blocks, of which all of its models are made; no model is named. Numbers are of no
concern: windows, caps and sinks of an attention change none of its ways.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def plain_parts(model: nn.Module) -> None:
    """Replaces, in a model on the meta device, what a kernel computes by plain operations."""
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    plain: dict[type, Callable[..., Any]] = {Attention: Softmax(), MoERunner: _experts}
    for module in list(model.modules()):
        if isinstance(module, CustomOp):
            module._forward_method = module.forward_native
        if isinstance(module, (LinearBase, VocabParallelEmbedding)):
            module.quant_method = _Product()
        for kind, forward in plain.items():
            if isinstance(module, kind):
                module.forward = MethodType(forward, module)
        if any(isinstance(child, MoERunner) for child in module.children()) and not isinstance(module, MoERunner):
            module.forward = MethodType(_flat(type(module).forward), module)


class _Product:
    """The product with a weight, whatever the weight is packed as; and its rows, of an embedding."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if layer.quant_method is self and getattr(layer, "weight", None) is not None and layer.weight.ndim == 2:
            weight = layer.weight
        else:
            weight = x.new_empty(0)
        if weight.shape[-1:] != x.shape[-1:]:  # packed
            outputs = getattr(layer, "output_size_per_partition", None) or layer.output_size
            weight = torch.empty(outputs, x.shape[-1], device=x.device, dtype=x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, layer.weight)


class Softmax:
    """A causal attention; the keys and values of a layer that shares another's cache are that one's."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._forward(*args, **kwargs)

    def _forward(
        self, layer: Any, query: torch.Tensor, key: Any, value: Any, output_shape: Any = None, output_dtype: Any = None
    ) -> torch.Tensor:
        shared = layer.kv_sharing_target_layer_name
        if shared is not None:
            key, value = self._kept[shared]
        self._kept[layer.layer_name] = key, value
        wide = query.shape[-1] == layer.num_heads * layer.head_size
        leading = query.shape[:-1] if wide else query.shape[:-2]
        q = query.view(1, -1, layer.num_heads, layer.head_size).transpose(1, 2)
        k = key.view(1, -1, layer.num_kv_heads, layer.head_size).transpose(1, 2)
        v = value.view(1, -1, layer.num_kv_heads, layer.head_size_v).transpose(1, 2)
        out = causal(q, k, v).transpose(1, 2)
        return out.reshape(*leading, layer.num_heads * layer.head_size_v)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention over `[batch, heads, pos, d_head]`."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2))
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.matmul(scores.masked_fill(mask, float("-inf")).softmax(-1), v)


def _experts(runner: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """The chosen experts' outputs, weighed and summed, and those of the experts that each token uses."""
    x = hidden_states if runner.routed_input_transform is None else runner.routed_input_transform(hidden_states)
    x = x[0] if isinstance(x, tuple) else x
    if runner.gate is not None:
        router_logits = runner.gate(hidden_states)
        router_logits = router_logits[0] if isinstance(router_logits, tuple) else router_logits
    weights, chosen = router_logits.softmax(-1).topk(runner.moe_config.experts_per_token, dim=-1)
    up, down = (torch.empty(x.shape[-1], x.shape[-1], device=x.device, dtype=x.dtype) for _ in range(2))
    each = F.silu(F.linear(x, up)) * F.linear(x, up)
    out = F.linear(each, down).unsqueeze(-2) * weights.unsqueeze(-1) * (chosen.unsqueeze(-1) >= 0)
    result = out.sum(-2)
    if runner.routed_output_transform is not None:
        result = runner.routed_output_transform(result)
        result = result[0] if isinstance(result, tuple) else result
    if runner.shared_experts is not None:
        result = runner.shared_experts._layer(hidden_states) + result
    return result


def _flat(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a mixture of experts, which takes [tokens, d], for [1, tokens, d]."""

    def flattened(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, hidden_states.flatten(0, -2), *args, **kwargs)
        return out.view(hidden_states.shape) if isinstance(out, torch.Tensor) else out

    return flattened
