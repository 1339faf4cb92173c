"""The residual stream inside one block: its states between the additions, and the additions as relations. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from hookmap.discovery.block import ROLES, Block
from hookmap.discovery.linear_steps import Step, steps
from hookmap.maps.relations import FURTHER, OWN, Relation, Term

_Sum = tuple[Term, ...]


@dataclass(frozen=True)
class Middle:
    """The stream between two additions."""

    summed: int
    """the result of the addition"""
    read: int
    """the state that the next branch reads"""
    is_changed: bool
    """whether more than a cast stands between the two"""


def middles(block: Block) -> list[Middle]:
    """The stream after the addition of each branch but the last."""
    adds = sorted({branch.step for branch in block.branches if branch.role != "other"})
    return [_between(block, add, following) for add, following in pairwise(adds)]


def _between(block: Block, add: int, following: int) -> Middle:
    readers = [branch for branch in block.branches if branch.step >= following]
    states = block.states[add + 1 : following + 1]
    read = [state for state in states if any(state in branch.reads for branch in readers)] or states
    return _middle(block, add, read[-1])


def first_middle(block: Block) -> Middle:
    """The stream after the first main mixer's addition, as the next main branch reads it that is no mixer."""
    mixer = block.main("mixer")[0]
    after = block.states[mixer.step + 1 :]
    later = sorted(block.main("cross_attn") + block.main("mlp"), key=lambda branch: branch.step)
    reader = next(branch for branch in later if branch.reads & set(after))
    read = [state for state in after[: reader.step - mixer.step] if state in reader.reads][-1]
    return _middle(block, mixer.step, read)


def _middle(block: Block, add: int, read: int) -> Middle:
    between = block.path[add + 1 : block.states.index(read)]
    return Middle(block.states[add + 1], read, any(step.kind != "cast" for step in between))


def obstacles(block: Block) -> list[str]:
    """The operators at which the ways back from what leaves the block end, where none leads to what enters it."""
    values, found = block.values, dict[str, None]()
    stack, seen = [block.exit], {block.entry}
    while stack:
        value = stack.pop()
        if value in seen or not values.cone(value, [block.entry], block.call)[1]:
            continue
        seen.add(value)
        sources = [each for step in steps(values, value) for each in (step.source, step.branch) if each is not None]
        if not sources:
            found[values.producers[value].name] = None
        stack += sources
    return list(found)


def additions(
    block: Block, middle: Middle | None, points: Collection[str], parameter: Callable[[int, int], str | None]
) -> list[Relation]:
    """Each state of the stream that has a name, as made of the named state before it and of what branches add.

    `points`: those that the block has. A state without a point has no name: what it is made of stands for it.
    `parameter`: the path of the parameter that a value is, as one that multiplies another value.
    """
    if all(branch.role == "other" for branch in block.branches):
        return []
    named = _names_of_states(block, middle).items()
    names = {state: name for state, name in named if name in points or state in (block.entry, block.exit)}
    made: dict[int, _Sum] = {block.entry: (Term(1.0, names[block.entry]),)}
    found: list[Relation] = []
    if block.streams.twin:  # the second stream of a reversible block: what enters has no name
        made.setdefault(block.streams.twin[0].source, (Term(1.0, FURTHER),))
    for position, step in enumerate(block.path):
        terms = _after(block, position, step, made[step.source], step.source in names)
        if step.kind == "gate" and step.gate is not None and (weight := parameter(step.gate, step.source)):
            terms = _weighted(made[step.source], weight, terms)
        itself = (Term(1.0, names.get(step.result, "")),)
        if step.result in names and terms != itself:
            found.append(Relation(names[step.result], terms))
            terms = itself
        made[step.result] = terms
    return found


def _names_of_states(block: Block, middle: Middle | None) -> dict[int, str]:
    names = {block.entry: "resid_pre"}
    if middle is not None:
        names |= {each.read: f"resid_mid.{number}" for number, each in enumerate(middles(block))}
        names[middle.summed] = "resid_mid_sum" if middle.is_changed else "resid_mid"
        names[middle.read] = "resid_mid"
    return names | {block.exit: "resid_post"}


def _after(block: Block, position: int, step: Step, terms: _Sum, is_named: bool) -> _Sum:
    """The stream after one step, where `terms` is the stream before it."""
    if step.kind == "cast":
        return terms
    if step.kind == "add":
        kept = (Term(1.0, "gate", terms),) if step.source_factor is None else _times(step.source_factor, terms)
        return kept + tuple(Term(1.0, name) for name in _added(block, position))
    if step.kind == "scale" and step.factor is not None and is_named and _is_summed(block, position):
        return _times(step.factor, terms)
    return (Term(1.0, step.kind, terms),)


def _is_summed(block: Block, position: int) -> bool:
    """Whether the state after a step is a term of the next addition as it is."""
    following = block.path[position + 1 :]
    return bool(following) and following[0].kind == "add" and following[0].source_factor == 1.0


def _added(block: Block, position: int) -> Iterator[str]:
    """The names of what the addition at `position` adds; one name for all that reads nothing of the stream."""
    for role in ROLES:
        yield from (f"{role}_out{suffix}" for suffix, branch in block.numbered(role) if branch.step == position)
    own = [part for branch in block.role("other") if branch.step == position for part in branch.added]
    if own:
        is_fixed = all(block.values.is_constant(part, of_tokens=True) for part in own)
        yield OWN if is_fixed else FURTHER


def _weighted(terms: _Sum, weight: str, unnamed: _Sum) -> _Sum:
    """The terms times a parameter, each of which may have one; `unnamed`: the same without its name."""
    plain = not any(term.of or term.weight for term in terms)
    return tuple(replace(term, weight=weight) for term in terms) if plain else unnamed


def _times(factor: float, terms: _Sum) -> _Sum:
    return tuple(replace(term, factor=factor * term.factor) for term in terms)
