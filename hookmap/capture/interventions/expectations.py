"""What must hold after a point of a block was written: expectations decided from the map, then held against three runs.

plain      nothing is changed
upstream   the stream that enters the block is changed, or what the branch reads
written    as `plain`, with the point's value of `upstream` written to it
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from hookmap.activations import Key, key_of
from hookmap.capture.interventions.trial_runs import Values
from hookmap.maps.points import PointName
from hookmap.maps.relations import Relation, Term
from hookmap.maps.selectors import Selector
from hookmap.maps.templates import BlockKind

BRANCHES = {
    "mixer": (
        "mixer_in",
        "q_latent",
        "k_latent",
        "q",
        "k",
        "v",
        "q_rot",
        "k_rot",
        "attn_scores",
        "pattern",
        "scan_in",
        "mixer_gate",
        "scan_out",
        "z",
        "attn_result",
        "mixer_out_raw",
        "mixer_out",
    ),
    "cross_attn": ("cross_attn_in", "cross_attn_out_raw", "cross_attn_out"),
    "mlp": (
        "mlp_in",
        "mlp_pre",
        "mlp_pre_linear",
        "mlp_post",
        "router_logits",
        "router_indices",
        "router_weights",
        "expert_post",
        "expert_out",
        "shared_expert_out",
        "mlp_out_raw",
        "mlp_out",
    ),
}
"""branch -> its points, from what it reads to what it adds"""
OUTS = tuple(point for points in BRANCHES.values() for point in points[-2:])
_ONE_WHERE_NOTHING_IS_DONE = ({"q", "q_rot"}, {"k", "k_rot"})
"""points that are one tensor in models without rotary embeddings"""
_COMPUTED_OF = {"attn_result": "z"}
"""a point that lies where another does, because it is computed from it"""
_DETERMINES = {
    "mixer_in": "mixer_out_raw",
    "z": "mixer_out_raw",
    "cross_attn_in": "cross_attn_out_raw",
    "mlp_in": "mlp_out_raw",
    "mlp_post": "mlp_out_raw",
    "resid_pre": "resid_post",
    "resid_mid_sum": "resid_post",
    "resid_mid": "resid_post",
}
"""point -> what is computed from it and from nothing else that a change upstream changes"""


@dataclass(frozen=True)
class Trial:
    """The three runs of one write."""

    selector: Selector
    plain: Values
    upstream: Values
    written: Values
    repeats: bool
    """whether the model's runs agree bit for bit"""

    @property
    def scaled(self) -> bool:
        """Whether the model multiplies the written tensor by a constant, which may round its last bit."""
        return self.selector.terms[0].scale != 1.0

    def changed(self, key: Key) -> bool:
        """Whether writing the point changed this tensor."""
        return not same(self.written[key], self.plain[key], exact=self.repeats)

    def delta(self, name: str) -> torch.Tensor:
        """How much writing the point changed another point of its layer."""
        key = beside(self.selector, name)
        return self.written[key].float() - self.plain[key].float()


class Expectation(Protocol):
    """One thing that must hold in a trial."""

    def failure(self, trial: Trial) -> str | None:
        """What is wrong, in words; None where it holds."""


@dataclass(frozen=True)
class Reached:
    """The change upstream arrives at the point: otherwise the trial shows nothing."""

    key: Key

    def failure(self, trial: Trial) -> str | None:
        reached = not torch.equal(trial.upstream[self.key], trial.plain[self.key])
        return None if reached else "a change of the stream that the block reads does not reach it"


@dataclass(frozen=True)
class ReadBack:
    """The point shows the value that was written."""

    key: Key

    def failure(self, trial: Trial) -> str | None:
        return not_read_back(trial.selector, trial.written[self.key], trial.upstream[self.key])


@dataclass(frozen=True)
class Unchanged:
    """A tensor that does not depend on the point stays as it was."""

    key: Key
    one_tensor: bool
    """whether it and the point are the same boundary of the model"""

    def failure(self, trial: Trial) -> str | None:
        if not trial.changed(self.key):
            return None
        why = "they are one tensor" if self.one_tensor else "it holds the same memory"
        return f"writing it writes {self.key[0]} too: {why}. Write what comes before it, or behind it"


@dataclass(frozen=True)
class AsUpstream:
    """A tensor that depends on nothing but the point becomes what it is in the upstream run."""

    key: Key

    def failure(self, trial: Trial) -> str | None:
        written, upstream = trial.written[self.key], trial.upstream[self.key]
        if same(written, upstream, exact=trial.repeats and not trial.scaled):
            return None
        if torch.equal(written, trial.plain[self.key]):
            return f"{self.key[0]} stays as it was: what reads the point reads another tensor"
        return f"{self.key[0]} is not what it would be with this value: it reads other things of the block too"


@dataclass(frozen=True)
class Changed:
    """A tensor that depends on the point, among others, changes."""

    key: Key

    def failure(self, trial: Trial) -> str | None:
        changed = trial.changed(self.key)
        return None if changed else f"nothing reads it there any more: {self.key[0]} stays as it was"


@dataclass(frozen=True)
class SumHolds:
    """A sum changes by as much as its terms change."""

    relation: Relation
    terms: tuple[Term, ...]
    """those that the runs show; the others do not change"""

    def failure(self, trial: Trial) -> str | None:
        expected = sum(term.factor * trial.delta(term.name) for term in self.terms)
        allowed = tolerance(trial.plain[beside(trial.selector, self.relation.total)])
        holds = difference(trial.delta(self.relation.total), expected) < allowed
        return None if holds else f"{self.relation} does not hold after writing it"


@dataclass(frozen=True)
class NoSum:
    """What a branch adds must be a term of a sum: otherwise nothing shows where it is added."""

    def failure(self, trial: Trial) -> str | None:
        return "nothing shows what it is added to: no sum of this block has it as a term"


def beside(selector: Selector, name: str) -> Key:
    """The key of another point of the same layer, in the same run of it."""
    return key_of(name, selector.layer, selector.call)


def expectations(kind: BlockKind, selector: Selector, shown: Collection[Key], isolated: bool) -> Iterator[Expectation]:
    """What must hold after this point was written.

    shown: the tensors that the runs show. isolated: the upstream run changes only what the point's branch reads.
    """
    key = selector.key
    yield Reached(key)
    yield ReadBack(key)
    name = PointName.of(selector.point)
    if name.base == "resid_post":
        yield from (AsUpstream(other) for other in shown if other[1:] != key[1:])
    elif name.base.startswith("resid_"):
        yield AsUpstream(beside(selector, _DETERMINES[name.base]))
    else:
        yield from _independent(kind, selector, shown)
        if name.base in OUTS:
            yield from _added(kind, selector, shown, isolated)
        else:
            yield _inside(kind, selector)


def _independent(kind: BlockKind, selector: Selector, shown: Collection[Key]) -> Iterator[Expectation]:
    """The points before this one, and those of the other of two parallel branches."""
    base, own = PointName.of(selector.point).base, kind.points[selector.point]
    branch = next(points for points in BRANCHES.values() if base in points)
    for name, template in kind.points.items():
        other = PointName.of(PointName.of(name).as_mixer()).base
        parallel = kind.branch_order == "parallel" and not other.startswith("resid_") and other not in branch
        same_value = other == base or (other in OUTS and base in OUTS and other in branch)
        contains_it = len(template.terms) > 1 and set(template.terms) & set(own.terms)
        same_value |= {other, base} in _ONE_WHERE_NOTHING_IS_DONE
        earlier = other == "resid_pre" or (other in branch and branch.index(other) < branch.index(base))
        before = template.order <= own.order and not same_value and not contains_it
        before &= _COMPUTED_OF.get(other) != base
        before &= own.write is None or earlier  # what is read at its place may be behind what is written
        if (before or parallel) and (beside(selector, name) in shown):
            yield Unchanged(beside(selector, name), template.terms == own.terms)


def _inside(kind: BlockKind, selector: Selector) -> Expectation:
    """What a point inside a branch determines, or at least changes: the branch's output."""
    name = PointName.of(selector.point)
    if name.base in _DETERMINES and (determined := name.numbered(_DETERMINES[name.base])) in kind.points:
        return AsUpstream(beside(selector, determined))
    branch = next(branch for branch, points in BRANCHES.items() if name.base in points)
    output = name.numbered(f"{branch}_out_raw")
    return Changed(beside(selector, output if output in kind.points else "resid_post"))


def _added(kind: BlockKind, selector: Selector, shown: Collection[Key], isolated: bool) -> Iterator[Expectation]:
    """What a branch adds: the block goes on as in the upstream run, and the sum that has it as a term holds."""
    raw, own = selector.point, kind.points[selector.point].terms
    is_raw = PointName.of(raw).base.endswith("_raw")
    if isolated:
        yield AsUpstream(beside(selector, "resid_post"))
        if is_raw:
            return
    out = PointName.of(raw).end("out")
    if is_raw and out in kind.points and kind.points[out].terms != own:
        yield AsUpstream(beside(selector, out))  # only the branch's norm stands between them
        return
    names = {PointName.of(name).as_mixer() for name, point in kind.points.items() if point.terms == own}
    found = next(_sums(kind, names, selector, shown), None)
    if found is not None:
        yield found
    elif not isolated:
        yield NoSum()


def _sums(kind: BlockKind, names: set[str], selector: Selector, shown: Collection[Key]) -> Iterator[SumHolds]:
    """The sums of the block with one of these points as a term."""
    for relation in filter(None, map(Relation.parse, kind.relations)):
        plain = (term for term in relation.terms if not term.of and not term.weight)
        terms = tuple(term for term in plain if beside(selector, term.name) in shown)
        named = names & {term.name for term in terms}
        if relation.form == "sum" and not relation.is_open and named and beside(selector, relation.total) in shown:
            yield SumHolds(relation, terms)


def not_read_back(selector: Selector, found: torch.Tensor, written: torch.Tensor) -> str | None:
    """What is wrong where the point does not show the value written; None where it does."""
    held = same(found, written, exact=selector.terms[0].scale == 1.0)
    return None if held else "the value written is not the value read there afterwards"


def same(found: torch.Tensor, expected: torch.Tensor, exact: bool) -> bool:
    """Whether the bits are the same; unless `exact`, whether they differ by no more than the model may round."""
    if torch.equal(found, expected):
        return True
    return not exact and difference(found.float(), expected.float()) < tolerance(found)


def difference(found: torch.Tensor, expected: torch.Tensor | float) -> float:
    """The length of the difference, as a share of the length of `found`."""
    return float((found - expected).norm() / found.norm().clamp_min(1e-12))


def tolerance(like: torch.Tensor) -> float:
    """The relative difference that rounding in this dtype may cause."""
    return 1e-4 if like.dtype in (torch.float32, torch.float64) else 4e-2
