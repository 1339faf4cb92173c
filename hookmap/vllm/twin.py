"""The twin of a vLLM model: its own classes on the meta device, unsharded, with plain operations in place of kernels.

What vLLM runs are fused kernels on packed weights, of which a dataflow shows little. The twin has the same modules
under the same paths, and every operator of it is PyTorch's: custom operators in their native form, products with
weights as plain products, attention as a causal softmax, experts as a sum over those that are chosen. It holds no data.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hookmap.vllm.plain_parts import plain_parts

_GROUPS = ("_WORLD", "_TP", "_ETP", "_DCP", "_PP", "_DP", "_EP", "_EPLB", "_PCP")
"""vLLM's groups of processes, of tensor, pipeline, data and expert parallelism"""


@contextmanager
def alone(ranks: int) -> Iterator[None]:
    """Shows vLLM this process as the only one, or as the first of `ranks` that share the tensors of each layer.

    What is built has all layers, and the sizes that one rank has. What the ranks would add up or gather is of the right
    shape, and of this one alone.
    """
    from vllm.distributed import parallel_state

    before = {name: getattr(parallel_state, name) for name in _GROUPS if hasattr(parallel_state, name)}
    try:
        for name in before:
            setattr(parallel_state, name, _group(ranks if name == "_TP" else 1))
        yield
    finally:
        for name, value in before.items():
            setattr(parallel_state, name, value)


def _group(size: int) -> Any:
    """What a group of processes is to a layer: its size, and this process's place in it."""
    processes = SimpleNamespace(size=lambda: size, rank=lambda: 0)

    def gathered(tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return tensor if size == 1 else torch.cat([tensor] * size, dim=dim)

    return SimpleNamespace(
        world_size=size, rank_in_group=0, rank=0, local_rank=0, ranks=list(range(size)), first_rank=0,
        last_rank=size - 1, is_first_rank=True, is_last_rank=size == 1, device_group=processes, cpu_group=processes,
        device=torch.device("meta"), unique_name="hookmap", use_custom_op_call=False, mq_broadcaster=None,
        device_communicator=None, all_reduce=lambda tensor: tensor, all_gather=gathered,
        gather=lambda tensor, dst=0, dim=-1: gathered(tensor, dim),
        reduce_scatter=lambda tensor, dim=-1: tensor.chunk(size, dim=dim)[0],
    )  # fmt: skip


@contextmanager
def _without_what_is_kept() -> Iterator[None]:
    """Empties the tables of modules that vLLM uses again in its next model, and fills them as they were behind it."""
    from vllm.model_executor.layers import activation, rotary_embedding

    activations = (activation._ACTIVATION_REGISTRY, activation._ACTIVATION_AND_MUL_REGISTRY)
    tables: list[dict[Any, Any]] = [rotary_embedding._ROPE_DICT, *(each._dict for each in activations)]
    kept = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, before in zip(tables, kept, strict=True):
            table.clear()
            table.update(before)


def config_of_twin(config: Any, ranks: int) -> Any:
    """A vLLM config for the twin: eager, in float32, with operators in their native form, and sharded over `ranks`."""
    from vllm.config import CompilationMode

    own = copy.copy(config)
    own.compilation_config = copy.copy(config.compilation_config)
    own.compilation_config.static_forward_context = {}
    own.compilation_config.static_all_moe_layers = []
    own.compilation_config.mode = CompilationMode.NONE
    own.compilation_config.custom_ops = ["none"]
    own.parallel_config = copy.copy(config.parallel_config)
    own.parallel_config.tensor_parallel_size = own.parallel_config.world_size = ranks
    own.parallel_config.pipeline_parallel_size = own.parallel_config.data_parallel_size = 1
    own.parallel_config.rank = 0
    own.model_config = copy.copy(config.model_config)
    own.model_config.dtype = torch.float32
    return own


@contextmanager
def running(config: Any) -> Iterator[None]:
    """What a model of vLLM is built and run in: its config, a step without a cache, native operators."""
    from vllm import ir
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.ir.op import enable_torch_wrap
    from vllm.utils.torch_utils import set_default_torch_dtype

    with ExitStack() as stack:
        stack.enter_context(alone(config.parallel_config.tensor_parallel_size))
        stack.enter_context(set_current_vllm_config(config))
        stack.enter_context(set_forward_context(None, config))
        stack.enter_context(enable_torch_wrap(False))
        stack.enter_context(set_default_torch_dtype(torch.float32))
        for op in ir.op.IrOp.registry.values():
            stack.enter_context(op.set_priority(["native"]))
        yield


class _OnesForNumbers(TorchFunctionMode):
    """Gives ones for numbers that a model asks of a tensor without data, such as the slopes of its heads (BLOOM)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist and args[0].is_meta:
            args = (torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu"),)
        return func(*args, **(kwargs or {}))


def build(config: Any) -> nn.Module:
    """The twin's modules; to be called, like the model itself, in `running`."""
    from vllm.model_executor.model_loader.utils import initialize_model

    with _OnesForNumbers(), torch.device("meta"), _without_what_is_kept():
        model: nn.Module = initialize_model(vllm_config=config)
    model = model.to("meta").eval()
    plain_parts(model)
    return model


def is_of_transformers(model: nn.Module) -> bool:
    """Whether vLLM runs transformers' modules in it, which see [1, tokens, d]; its own see [tokens, d]."""
    from vllm.model_executor.models.transformers.base import Base

    return isinstance(model, Base)
