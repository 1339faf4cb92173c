"""The kinds of a block's branches, told by their operations: attention, convolution or recurrent; dense or experts.

Each question about kinds is answered here, once for a block. No class or module name decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hookmap.discovery import aten
from hookmap.discovery.block import Block, Branch
from hookmap.discovery.chained_mlps import behind_others
from hookmap.discovery.dataflow import ModuleCall, Operation
from hookmap.discovery.linear_steps import norm_input
from hookmap.discovery.mixing import mixing
from hookmap.maps.templates import BranchInfo

BranchOrder = Literal["sequential", "parallel", "mixer_only", "mlp_only", "other"]


@dataclass(frozen=True)
class BranchKinds:
    """What the branches of one block are."""

    order: BranchOrder
    mixers: tuple[str, ...]
    """for each mixer: attention, convolution or recurrent"""
    choices: tuple[Operation | None, ...]
    """for each MLP: the top-k that chooses its experts; None where the MLP is dense"""
    behind: Mapping[int, int]
    """of the mixers, the number of one that mixes nothing of its own -> that of the one whose output it reads"""

    @property
    def has_attention(self) -> bool:
        return "attention" in self.mixers


def kinds_of(block: Block) -> BranchKinds:
    """Decide the order of the branches and the kind of each."""
    mixers = tuple(_mixer_kind(block, branch) for branch in block.role("mixer"))
    choices = tuple(_choice_of_experts(block, branch) for branch in block.role("mlp"))
    return BranchKinds(_order(block), mixers, choices, behind_others(block))


def _order(block: Block) -> BranchOrder:
    mixers, mlps = block.main("mixer"), block.main("mlp")
    if not mixers or not mlps:
        return "mixer_only" if mixers else "mlp_only" if mlps else "other"
    mixer = mixers[0]
    if not all(_reads_output(block, mlp, mixer) or _reads_output(block, mixer, mlp) for mlp in mlps):
        return "parallel"
    return "sequential" if any(_reads_output(block, mlp, mixer) for mlp in mlps) else "other"


def _reads_output(block: Block, later: Branch, earlier: Branch) -> bool:
    """Whether a branch reads the stream with another's output in it."""
    return bool(later.reads & set(block.states[earlier.step + 1 :]))


def _mixer_kind(block: Block, mixer: Branch) -> str:
    if block.is_attention(mixer):
        return "attention"
    mixed = {op.name for op in mixing(block.values, mixer.ops, block.seq)}
    # A scan in chunks pads the positions, and only its short convolution is seen to mix. Its decay tells it apart.
    decays = any(op.name in aten.DECAYS for op in mixer.ops)
    convolves = mixed <= {"convolution"} or ("convolution" in mixed and mixed <= {"convolution", *aten.SHIFTS})
    return "convolution" if convolves and not decays else "recurrent"


def _choice_of_experts(block: Block, mlp: Branch) -> Operation | None:
    """The top-k over more scores than it keeps, one for each position; of several the last over the most scores."""
    chosen = [op for op in mlp.ops if op.name in aten.TOP_K and _drops_scores(block, op)]
    return max(chosen, key=lambda op: (_experts(block, op)[0], op.time), default=None)


def _drops_scores(block: Block, op: Operation) -> bool:
    scored, kept = _experts(block, op)
    return block.seq in block.values.flow.tensors[op.inputs[0]].shape[:-1] and kept < scored


def _experts(block: Block, choice: Operation) -> tuple[int, int]:
    """How many experts there are, and how many are chosen for each token."""
    tensors = block.values.flow.tensors
    return tensors[choice.inputs[0]].shape[-1], tensors[choice.outputs[0]].shape[-1]


def mixer_info(block: Block, kinds: BranchKinds, templated: Callable[[str], str]) -> BranchInfo | None:
    """What the map says of the block's mixers; None where it has none."""
    info = BranchInfo(type="+".join(dict.fromkeys(kinds.mixers)))
    return _with_modules(info, block, block.main("mixer"), templated)


def cross_attention_info(block: Block, templated: Callable[[str], str]) -> BranchInfo | None:
    """What the map says of the block's cross-attention; None where it has none."""
    return _with_modules(BranchInfo(type="attention"), block, block.role("cross_attn"), templated)


def mlp_info(block: Block, kinds: BranchKinds, templated: Callable[[str], str]) -> BranchInfo | None:
    """What the map says of the block's MLPs; None where it has none."""
    sizes = [_experts(block, choice) for choice in kinds.choices if choice is not None]
    if not sizes:
        info = BranchInfo(type="dense")
    else:
        experts, chosen = max(sizes, key=lambda size: size[0])
        info = BranchInfo(type="moe", experts=experts, experts_per_token=chosen)
    return _with_modules(info, block, block.main("mlp"), templated)


def _with_modules(
    info: BranchInfo, block: Block, branches: list[Branch], templated: Callable[[str], str]
) -> BranchInfo | None:
    if not branches:
        return None
    calls = _modules(block, [op for branch in branches for op in branch.ops])
    classes = dict.fromkeys(type(call.module).__name__ for call in calls)
    paths = tuple(templated(call.path) for call in calls)
    return info.model_copy(update={"modules": paths, "module_class": " + ".join(classes) or None})


def _modules(block: Block, ops: list[Operation]) -> list[ModuleCall]:
    """The outermost modules inside the block that hold the products with weights; norms where there are no others.

    Where all that a block's own module gives is one branch, and is added behind it, it is that module.
    """
    values, own = block.values, block.values.flow.calls[block.call.index]
    if block.call.enter < own.enter and own.exit < block.call.exit and len(block.branches) == 1:
        return [own]
    heavy = [op for op in ops if op.name in aten.PRODUCTS and any(map(values.is_constant, values.operands(op)))]
    around = [call for op in heavy if (call := _outermost(block, op)) is not None]
    calls = list({call.index: call for call in around}.values())
    return [call for call in calls if norm_input(values, call) is None] or calls


def _outermost(block: Block, op: Operation) -> ModuleCall | None:
    """The largest module around an operation that is inside the block."""
    calls, index = block.values.flow.calls, op.call
    found = None
    while index != block.call.index and index >= 0:
        found = calls[index]
        index = -1 if found.parent is None else found.parent
    return found
