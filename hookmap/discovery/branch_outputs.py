"""What a branch adds to the stream, and its bare output before post-norm, scale or gate. Pure."""

from __future__ import annotations

from hookmap.discovery.block import Block, Branch
from hookmap.discovery.locate import NOWHERE, Location, Locator


def has_post_norm(block: Block, branch: Branch) -> bool:
    """Whether the branch's output passes a norm before it is added."""
    return any(step.kind == "norm" for part in branch.parts for step in block.tails[part])


def locate_raw_output(block: Block, branch: Branch, locator: Locator) -> Location | str:
    """Where the branch's bare output is; or why it is nowhere."""
    return _sum([block.raw(part) for part in branch.parts], 1.0, locator)


def locate_output(block: Block, branch: Branch, locator: Locator) -> Location | str:
    """Where that which the branch adds is; or why it is nowhere."""
    plain = branch.gate is None
    found = _sum(branch.added, branch.factor, locator) if plain else _why_nowhere(branch.added, locator)
    if isinstance(found, Location):
        return found
    if branch.factor is not None:
        place = locator.combination(branch.added, branch.factor, branch.gate, block.states)
        if place is not None:
            return place
    if _is_added_alone(block, branch):
        step = block.path[branch.step]
        return locator.difference(step.result, step.source) or found
    return found


def _sum(parts: list[int], factor: float | None, locator: Locator) -> Location | str:
    found = [place for part in parts if (place := locator.locate(part)) is not None]
    rounds_otherwise = factor != 1.0 and any(len(place.terms) > 1 for place in found)
    if factor is None or len(found) < len(parts) or rounds_otherwise:
        return _why_nowhere(parts, locator)
    terms = tuple(t.model_copy(update={"scale": t.scale * factor}) for place in found for t in place.terms)
    return Location(terms, max(place.time for place in found), found[0].evidence)


def _why_nowhere(parts: list[int], locator: Locator) -> str:
    reason = locator.why_nowhere(*parts)
    return f"{reason}, nor the tensors it is the sum of" if reason == NOWHERE else reason


def _is_added_alone(block: Block, branch: Branch) -> bool:
    """Whether nothing else is added in the addition, and the stream is not scaled in it."""
    alone = sum(other.step == branch.step for other in block.branches) == 1
    return alone and block.path[branch.step].source_factor == 1.0
