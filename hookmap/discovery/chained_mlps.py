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
    mixers = block.numbered("mixer")
    for suffix, branch in mixers:
        cones = [block.values.cone(part, block.states, block.call)[0] for part in branch.parts]
        others = [*cones, *(other.ops for _, other in mixers if other is not branch)]
        for ops, other in ((a, b) for a in cones for b in others if _is_mlp_of(block, a, b)):
            further = {value for op in _without(ops, other) for value in block.values.operands(op)}
            own_sum = "in a sum of its own, which is no state of the stream"
            where = own_sum if further & set(block.states) else "alone, and no stream with it"
            return f"the MLP reads the mixer's output {where}: what it gives is in mixer_out{suffix}"
        chosen = any(op.name in aten.TOP_K for op in block.mixing(branch.ops))
        if chosen and len(mixers) > 1 and not block.is_attention(branch):
            return f"no branch is of each position alone: a top-k chooses the positions that mixer_out{suffix} is of"
        if _has_more_behind(block, branch.ops):
            return (
                "the mixer, and what computes each position alone behind it, are added to the stream as one value: "
                f"mixer_out{suffix}"
            )
    return "this block has no MLP"


def _is_mlp_of(block: Block, ops: list[Operation], others: list[Operation]) -> bool:
    """Whether operations are all the others, and a multiplication with a matrix that mixes nothing."""
    further = _without(ops, others)
    whole = {op.time for op in others} <= {op.time for op in ops}
    return whole and has_matrix(further) and not block.mixing(further)


def _without(ops: list[Operation], others: list[Operation]) -> list[Operation]:
    times = {op.time for op in others}
    return [op for op in ops if op.time not in times]


def _has_more_behind(block: Block, ops: list[Operation]) -> bool:
    """Whether two products with weights, and a function that is not linear between them, are behind all that mixes.

    The mixer is what has weights of its own.
    """
    values = block.values
    mixing = block.mixing(ops)
    last = max((op.time for op in mixing), default=0)
    heavy = [op for op in ops if _has_weights(block, op) and op not in mixing]
    behind = [op for op in heavy if op.time > last]
    for first in behind if len(behind) < len(heavy) else ():
        made = values.value(first.outputs[0])
        for second in (op for op in behind if op.time > first.time):
            read = [v for v in values.operands(second) if not values.is_constant(v)]
            between = [op for v in read for op in values.cone(v, [made], block.call)[0]]
            if any(op.name in aten.ACTIVATIONS for op in between):
                return True
    return False


def _has_weights(block: Block, op: Operation) -> bool:
    return op.name in aten.PRODUCTS and any(map(block.values.is_constant, block.values.operands(op)))
