"""MLPs that are no branch of their own: they read a mixer's output, or some positions only."""

from __future__ import annotations

from hookmap.discovery import aten
from hookmap.discovery.block import Block, has_matrix
from hookmap.discovery.dataflow import Operation


def behind_others(block: Block) -> dict[int, int]:
    """Number of a mixer that mixes positions only in what another one adds, too -> the number of the other."""
    mixers = block.role("mixer")
    return {
        number: before
        for number, branch in enumerate(mixers)
        for before, other in enumerate(mixers)
        if before < number and _is_mlp_of(block, branch.ops, other.ops)
    }


def why_no_mlp(block: Block) -> str:
    """Why a block without a branch that computes each position alone has no points of an MLP."""
    behind, mixers = behind_others(block), block.numbered("mixer")
    for number, (suffix, branch) in enumerate(mixers):
        if number in behind or _reads_its_own(block, branch.parts):
            return f"the MLP reads the mixer's output and not the stream: what it gives is in mixer_out{suffix}"
        chosen = any(op.name in aten.TOP_K for op in block.mixing(branch.ops))
        if chosen and len(mixers) > 1 and not block.is_attention(branch):
            return f"no branch is of each position alone: a top-k chooses the positions that mixer_out{suffix} is of"
    return "this block has no MLP"


def _reads_its_own(block: Block, parts: list[int]) -> bool:
    """Whether one of the terms that are added at once is computed from another."""
    cones = [block.values.cone(part, block.states, block.call)[0] for part in parts]
    return any(_is_mlp_of(block, a, b) for a in cones for b in cones if a is not b)


def _is_mlp_of(block: Block, ops: list[Operation], others: list[Operation]) -> bool:
    """Whether operations are all the others, and a multiplication with a matrix that mixes nothing."""
    times = {op.time for op in others}
    further = [op for op in ops if op.time not in times]
    return times < {op.time for op in ops} and has_matrix(further) and not block.mixing(further)
