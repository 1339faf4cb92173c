"""A module that multiplies the stream with its weights and returns what does not depend on it.

So transformers computes MRA's attention where its CUDA kernel is missing: as zeros. What runs is not the architecture.
"""

from __future__ import annotations

from hookmap.discovery import aten
from hookmap.discovery.block import Block
from hookmap.discovery.dataflow import ModuleCall


def idle_module(block: Block) -> str | None:
    """The class of such a module, whose output leads to what the block adds to its stream; None where there is none."""
    values = block.values
    stack = [part for branch in block.role("other") for part in branch.added]
    seen: set[int] = set()
    while stack:
        value = stack.pop()
        if value in seen or not values.made_in(value, block.call) or not values.is_constant(value, of_tokens=True):
            continue
        seen.add(value)
        for exposure in block.boundaries(value, "output"):
            if _multiplies_tokens(block, exposure.call):
                return type(exposure.call.module).__name__
        stack += values.operands(values.producers[value])
    return None


def _multiplies_tokens(block: Block, call: ModuleCall) -> bool:
    values = block.values
    products = [op for op in values.inside(call) if op.name in aten.MATRIX_PRODUCTS]
    return any(not values.is_constant(value, of_tokens=True) for op in products for value in values.operands(op))
