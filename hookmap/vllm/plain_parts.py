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
from torch.overrides import TorchFunctionMode

from hookmap.errors import DiscoveryError


def plain_parts(model: nn.Module) -> None:
    """Replaces, in a model on the meta device, what a kernel computes by plain operations."""
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    plain: dict[type, Callable[..., Any]] = {
        Attention: Softmax(), MLAAttention: _latent, MoERunner: _experts, VocabParallelEmbedding: _embedding,
    }  # fmt: skip
    for module in list(model.modules()):
        if isinstance(module, CustomOp):
            module._forward_method = module.forward_native
        if isinstance(module, (LinearBase, VocabParallelEmbedding)):
            module.quant_method = _Product()
        for kind, forward in plain.items():
            if isinstance(module, kind):
                module.forward = MethodType(forward, module)
        holds_experts = any(isinstance(child, MoERunner) for child in module.children())
        if isinstance(module, (MambaBase, MultiHeadLatentAttentionWrapper)) or holds_experts:
            module.forward = _flat(module.forward)


def _embedding(layer: Any, ids: torch.Tensor) -> torch.Tensor:
    """The rows of the tokens; of several ranks each has some, and they add up."""
    weight = getattr(layer, "weight", None)
    if weight is None or weight.shape[-1] != layer.embedding_dim:  # packed
        weight = torch.empty(layer.num_embeddings_per_partition, layer.embedding_dim, device=ids.device)
    return F.embedding(ids, weight)


class _Product:
    """The product with a weight, whatever the weight is packed as."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        sizes = ("output_size_per_partition", "output_size", "num_embeddings_per_partition")
        outputs = next(getattr(layer, name) for name in sizes if hasattr(layer, name))
        weight = getattr(layer, "weight", None)
        if weight is None or weight.shape != (outputs, x.shape[-1]):  # packed
            weight = torch.empty(outputs, x.shape[-1], device=x.device, dtype=x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)


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


def _latent(
    layer: Any, q: torch.Tensor, latent: torch.Tensor, shared: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """An attention whose keys and values are made of one latent: [tokens, heads, d], [tokens, rank], [tokens, 1, d]."""
    outputs = layer.num_heads * (layer.qk_nope_head_dim + layer.v_head_dim)
    expanded = F.linear(latent, torch.empty(outputs, latent.shape[-1], device=q.device, dtype=q.dtype))
    keys, values = torch.split(
        expanded.view(len(q), layer.num_heads, -1), [layer.qk_nope_head_dim, layer.v_head_dim], dim=-1
    )
    keys = torch.cat([keys, shared.expand(-1, layer.num_heads, -1)], dim=-1)
    out = causal(*(each.transpose(0, 1).unsqueeze(0) for each in (q, keys, values)))
    return out.squeeze(0).transpose(0, 1).reshape(len(q), -1)


def _flat(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module that takes [tokens, ...], for [1, tokens, ...]."""

    def flattened(*args: Any, **kwargs: Any) -> Any:
        out = forward(*map(_without_batch, args), **{name: _without_batch(each) for name, each in kwargs.items()})
        return out.unsqueeze(0) if isinstance(out, torch.Tensor) else out

    return flattened


def _without_batch(argument: Any) -> Any:
    is_of_tokens = isinstance(argument, torch.Tensor) and argument.ndim > 1 and argument.shape[0] == 1
    return argument.squeeze(0) if is_of_tokens else argument


class PlainScans(TorchFunctionMode):
    """Plain operations in place of vLLM's operators that write their result into an argument: scans over positions.

    Raises DiscoveryError at an operator of vLLM's that does not: what it does to positions is not known.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        overload = func.default if isinstance(func, torch._ops.OpOverloadPacket) else func
        if not isinstance(overload, torch._ops.OpOverload) or overload.namespace != "vllm":
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in overload._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        written = [each.name for each in overload._schema.arguments if each.alias_info and each.alias_info.is_write]
        if not written or overload._schema.returns:
            raise DiscoveryError(f"what vLLM's operator {overload} does to positions is not known.")
        reads = [each for name, each in given.items() if isinstance(each, torch.Tensor) and name not in written]
        for name in written:
            given[name].copy_(_scan(reads, given[name]))


def _scan(reads: list[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """Something of the shape of `out`, [tokens, ...], that each position has from itself and those before it."""
    rows = [each.flatten(1) for each in reads if each.is_floating_point() and each.shape[:1] == out.shape[:1]]
    read = torch.cat(rows, dim=-1)
    width = out[0].numel()
    product = F.linear(read, torch.empty(width, read.shape[-1], device=out.device, dtype=read.dtype))
    return (product.exp() * product).unsqueeze(0).cumsum(1).reshape(out.shape)
