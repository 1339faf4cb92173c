"""What a branch reads: the stream, or what a norm or the block itself makes of it before the branch's weights. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hookmap.discovery import aten
from hookmap.discovery.block import Block, Branch
from hookmap.discovery.linear_steps import has_weights, norm_source, steps
from hookmap.discovery.locate import Location, Locator
from hookmap.discovery.values import Exposure

_UNREADABLE = "it reads the stream mixed with other tensors that enter the block, and no one tensor is what it reads"

_BOTH = (
    "part of it reads the stream itself, and part of it what a norm makes of the stream: no one tensor is what it reads"
)


@dataclass(frozen=True)
class BranchInput:
    """What one branch reads."""

    value: int | None
    """None where no one tensor is what it reads"""
    normed: bool = False
    """whether a norm of the branch's own makes it"""
    further: frozenset[int] = frozenset()
    """other values that enter the block, depend on the tokens, and are read by the branch"""
    why: str = _UNREADABLE
    """of no value: the reason"""


def input_of(block: Block, branch: Branch, locator: Locator) -> BranchInput:
    """The value that all of the branch reads of the stream."""
    states = states_read(block, branch)
    value, normed = _behind_norms(block, branch, states[-1], locator)
    merged = _merged_streams(block, branch, states)
    if merged is not None:
        value, normed = merged, normed or norm_source(block.values, merged) is not None
    further = _further(block, branch, value)
    mixed = value in states and _is_mixed_early(block, branch, value, further)
    if mixed or (value in states and not _enters_weights(block, value)):
        gathered = _gathered(block, branch, locator)
        if gathered is not None:
            return BranchInput(gathered.value, normed or gathered.normed)
        if mixed:
            return BranchInput(None, normed)
    if value in states and _is_also_normed(block, branch, value, locator):
        return BranchInput(None, why=_BOTH)
    return BranchInput(value, normed, frozenset(further))


def states_read(block: Block, branch: Branch) -> list[int]:
    """The states of the stream that the branch reads, first to last."""
    return [state for state in block.states if state in branch.reads]


def locate_input(block: Block, found: BranchInput, locator: Locator) -> Location | str:
    """Where the branch's input is, with what else it reads; or why it is nowhere."""
    prefer = "input" if found.value in block.states else "output"
    place = None if found.value is None else locator.locate(found.value, prefer)
    if place is None:
        return found.why
    # Masks and biases have an entry for each pair of positions: they are no part of what a branch reads.
    streams = [v for v in sorted(found.further) if block.values.shape(v).count(block.seq) == 1]
    located = [each for v in streams if (each := locator.locate(v, "input")) is not None]
    return replace(place, beside=tuple(term for each in located for term in each.terms)) if located else place


def own_module(block: Block, branch: Branch, value: int, locator: Locator) -> Exposure | None:
    """The input of the one module of this branch, and of no other, through which all of the branch reads the value."""
    reading = [op.time for op in branch.ops if value in block.values.operands(op)]
    others = {id(op) for other in block.branches if other is not branch for op in other.ops}
    others |= {id(block.values.producers.get(state)) for state in block.states[1:]}
    whole = [
        place
        for place in locator.places(value)
        if place.side == "input"
        and all(place.call.enter < time < place.call.exit for time in reading)
        and not any(id(op) in others for op in block.values.inside(place.call))
    ]
    return min(whole, key=lambda place: place.call.enter, default=None)


def _is_also_normed(block: Block, branch: Branch, value: int, locator: Locator) -> bool:
    """Whether weights read both the stream and a norm of it: a gate computed of the bare stream, say."""
    values = block.values
    made = {values.value(tensor) for op in branch.ops for tensor in op.outputs}
    norms = [each for each in made if norm_source(values, each) == value and locator.locate(each) is not None]
    return _enters_weights(block, value) and any(_enters_weights(block, each) for each in norms)


def _enters_weights(block: Block, value: int) -> bool:
    """Whether the value enters a module with weights inside the block."""
    return any(has_weights(block.values, place.call) for place in block.boundaries(value, "input"))


# The stream through the branch's norms --------------------------------------------------------------------------


def _behind_norms(block: Block, branch: Branch, value: int, locator: Locator) -> tuple[int, bool]:
    """What of `value` enters the branch's modules, and whether that is behind a norm.

    It is what the last norm gives through which all of the branch reads `value`, or what enters a module with weights.

    What is done to the stream before the branch's modules (positions added to it, a function in place of a norm)
    is therefore in what the branch reads, and what is done in the modules is not.
    """
    values = block.values
    chain = list(_bottlenecks(block, branch, value))
    normed = [v for v in chain if norm_source(values, v) is not None and locator.locate(v) is not None]
    if normed:
        value = normed[-1]
        behind = chain[chain.index(value) + 1 :]
        chain = [v for v in behind if any(step.kind in ("add", "gate", "scale") for step in steps(values, v))]
    entering = next((v for v in (value, *chain) if _enters_weights(block, v)), value)
    return entering, bool(normed)


def _bottlenecks(block: Block, branch: Branch, value: int) -> Iterator[int]:
    """Tensors of the stream's size, before any weights, through which all of the branch reads `value`."""
    values = block.values
    light, other = {value}, set[int]()
    mixing = set(map(id, block.mixing(branch.ops)))
    for op in sorted(branch.ops, key=lambda op: op.time):
        operands, results = set(values.operands(op)), [values.value(t) for t in op.outputs]
        if not light & operands or other & operands or op.name in aten.PRODUCTS or id(op) in mixing:
            other.update(v for v in results if v not in light)
            continue
        light.update(results)
        same_size = results and values.size(results[0]) == values.size(value)
        if same_size and _all_through(block, branch, value, results[0]):
            yield results[0]


def _all_through(block: Block, branch: Branch, value: int, output: int) -> bool:
    """Whether the branch reads `value` by way of `output` alone."""
    return not any(block.values.cone(part, [value, output], block.call)[1] - {output} for part in branch.parts)


# The stream together with other tensors -------------------------------------------------------------------------


def _further(block: Block, branch: Branch, value: int) -> set[int]:
    """What enters the block, depends on the tokens, and is read by the branch other than through `value`."""
    raw = (block.raw(part) for part in branch.parts)
    return set().union(*(block.values.sources(part, [value], block.call) for part in raw))


def _is_mixed_early(block: Block, branch: Branch, value: int, further: set[int]) -> bool:
    """Whether further tensors are joined to the stream before any product with weights."""
    values, light = block.values, {value}
    for op in sorted(branch.ops, key=lambda op: op.time):
        operands = set(values.operands(op))
        weights = op.name in aten.PRODUCTS and any(map(values.is_constant, operands))
        if not light & operands or weights:
            continue
        if any(values.sources(v, light, block.call) & further for v in operands - light):
            return True
        light.update(map(values.value, op.outputs))
    return False


def _gathered(block: Block, branch: Branch, locator: Locator) -> BranchInput | None:
    """The first tensor of the stream's size, at a module boundary, that all of the branch is computed from (Inkling 2).

    A tensor behind operations that mix positions is no longer what the branch reads (Zamba).
    """
    for value in _made_for(block, branch):
        if _further(block, branch, value) or locator.locate(value) is None:
            continue
        if not block.mixing(block.values.cone(value, block.states, block.call)[0]):
            whole, normed = _behind_norms(block, branch, value, locator)
            return BranchInput(whole, normed) if _enters_weights(block, whole) else None
    return None


def _made_for(block: Block, branch: Branch) -> Iterator[int]:
    """Tensors of the stream's size that the branch makes on the way to its output, in the order of the pass."""
    values = block.values
    raw = [block.raw(part) for part in branch.parts]
    ops = {op.outputs[0]: op for part in raw for op in values.cone(part, block.states, block.call)[0]}
    for op in sorted(ops.values(), key=lambda op: op.time):
        for value in map(values.value, op.outputs):
            if value not in (*raw, *block.states) and values.size(value) == values.size(block.entry):
                yield value


def _merged_streams(block: Block, branch: Branch, states: list[int]) -> int | None:
    """Where the stream is several streams: the one tensor made of them that the branch's own module reads."""
    values = block.values
    raw = block.raw(branch.parts[0])
    for exposure in sorted(block.boundaries(raw, "output"), key=lambda e: e.call.enter):  # the outermost first
        for value in map(values.value, exposure.call.inputs.values()):
            streams, rest = divmod(values.size(states[0]), values.size(value))
            whole = streams > 1 and not rest and values.size(value) >= values.size(raw)
            if not whole or not values.made_in(value, block.call):
                continue
            if values.cone(raw, [value, *states], block.call)[1] == {value}:
                return value
    return None
