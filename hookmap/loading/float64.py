"""Runs a model in float64 on its own weights: differences that remain are not rounding."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from hookmap.errors import ModelError

_WIDENED = (torch.float16, torch.bfloat16, torch.float32)
_LARGE = 2**22


@contextlib.contextmanager
def in_float64(root: nn.Module) -> Iterator[None]:
    """Inside, this thread computes all floating point in float64; each weight is converted as it is used.

    `root` is as before afterwards. Hold its turn alone. Raises ModelError where the weights are elsewhere, or where
    accelerate brings them while it runs: it would bring them wide.
    """
    if not can_be_float64(root):
        raise ModelError("its weights are not here, or come while it runs: no float64")
    embedding: Any = root.get_input_embeddings()  # type: ignore[operator]
    unembedding: Any = root.get_output_embeddings()  # type: ignore[operator]
    tables = [part.weight for part in (embedding, unembedding) if hasattr(part, "weight")]
    with as_it_was(root), torch.no_grad(), _Float64(tables):
        yield


def can_be_float64(root: nn.Module) -> bool:
    """Whether the weights are here: not on the meta device, and not brought by accelerate while the model runs."""
    return not (any(hasattr(part, "_hf_hook") for part in root.modules()) or any(p.is_meta for p in root.parameters()))


@contextlib.contextmanager
def as_it_was(root: nn.Module) -> Iterator[None]:
    """Removes afterwards what a forward pass leaves on the modules: rotary frequencies, caches of positions, hooks.

    transformers hooks a vision tower in its first pass and marks it: without the mark it would hook it again.
    """
    before = [(part, dict(vars(part))) for part in root.modules()]
    tables = [(table, dict(table)) for _, attributes in before for table in _tables(attributes)]
    every = (each for part, _ in before for each in part._buffers.values() if each is not None)
    values = [(each, each.clone()) for each in every if _may_change(each)]
    try:
        yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)
        for table, entries in tables:
            table.clear()
            table.update(entries)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _tables(attributes: dict[str, Any]) -> Iterator[dict[Any, Any]]:
    """The dicts of a module that a forward pass may write into: its buffers and its hooks."""
    return (
        value
        for name, value in attributes.items()
        if name == "_buffers" or ("_hooks" in name and isinstance(value, dict))
    )


def _may_change(buffer: torch.Tensor) -> bool:
    """Whether a forward pass may write into it; weights that are packed into buffers are large."""
    return buffer.is_floating_point() and not buffer.is_meta and buffer.numel() <= _LARGE


class _Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type it
    """Converts the arguments of each operation to float64."""

    def __init__(self, tables: list[torch.Tensor]) -> None:
        """`tables`: the weights with a row for each token id. They are large, and their rows are independent."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._tables = {table.untyped_storage().data_ptr() for table in tables}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        if not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns):
            return func(*args, **kwargs)  # a view computes nothing
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped(*args, **kwargs)
        kept = next((t for t in tensors if self._is_of_table(t)), None)
        if kept is None and func._schema.is_mutable and tensors[0].dtype in _WIDENED:
            kept = tensors[0]  # what is written to stays what it is
        if kept is None:
            return func(*_dtypes(_tensors(_wide, args)), **_dtypes(_tensors(_wide, kwargs)))
        as_kept = partial(_as, kept.dtype)
        found = func(*_tensors(as_kept, args), **_tensors(as_kept, kwargs))
        return found if func._schema.is_mutable else _tensors(_wide, found)

    def _is_of_table(self, tensor: torch.Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() in self._tables


def _grouped(rows: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Each group of rows [n, in] by the matrix [in, out] of its expert: PyTorch's own has no float64."""
    parts = rows.double().tensor_split(ends[:-1].tolist())
    return torch.cat([part @ experts[number].double() for number, part in enumerate(parts)])


def _as(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    return tree_map(lambda v: change(v) if isinstance(v, torch.Tensor) else v, value)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.dtype in _WIDENED else tensor


def _dtypes(value: Any) -> Any:
    return tree_map(lambda v: torch.float64 if isinstance(v, torch.dtype) and v in _WIDENED else v, value)
