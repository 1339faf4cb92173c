"""One block's dataflow -> its points: which value each abstract name means, and the reasons for those it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import Literal

from hookmap.discovery import aten
from hookmap.discovery.attention import ATTENTION, ROUTER, Found, attention_points, mlp_points, router_points
from hookmap.discovery.block import Block, Branch
from hookmap.discovery.dataflow import ModuleCall, Operation
from hookmap.discovery.linear import linear_path, norm_input, norm_source, steps
from hookmap.discovery.locate import Location, Locator
from hookmap.discovery.mixing import mixing
from hookmap.discovery.values import Exposure, Values
from hookmap.maps.points import PointName
from hookmap.maps.relations import OWN, Relation, Term
from hookmap.maps.templates import BranchInfo

BranchOrder = Literal["sequential", "parallel", "mixer_only", "mlp_only", "other"]
NormPlacement = Literal["pre", "post", "sandwich", "none", "other"]


@dataclass
class BlockPoints:
    """What the map says of one block."""

    branch_order: BranchOrder
    norm_placement: NormPlacement
    mixer: BranchInfo | None
    mlp: BranchInfo | None
    locations: dict[str, Location] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    relations: list[Relation] = field(default_factory=list)
    readers: dict[str, str] = field(default_factory=dict)
    """mixer, mlp -> path template of the first module whose input is the stream that the branch reads"""


def points_of_block(block: Block) -> BlockPoints:
    """Name the values of one block."""
    return _Reader(block).read()


class _Reader:
    def __init__(self, block: Block) -> None:
        self.block, self.values = block, block.values
        templates = {each.replace("{i}", str(block.number)): each for each in block.layers.lists}
        self.locator = Locator(block.values, block.call, block.seq, templates, block.layers.rows)
        self.mixers, self.mlps = block.role("mixer"), block.role("mlp")
        self.norms: set[str] = set()
        self.middle = block.exit
        """the value of resid_mid"""
        self.points = BlockPoints(self._branch_order(), "none", None, None)
        self.read_by: dict[str, tuple[int, Branch]] = {}
        """mixer_in, mlp_in -> the value, and the branch that reads it"""

    def read(self) -> BlockPoints:
        block, points = self.block, self.points
        self._put("resid_pre", block.entry, "input")
        self._branch("mixer", self.mixers, "this block has no mixer")
        self._middles()
        self._branch("mlp", self.mlps, "this block has no MLP")
        self._put("resid_post", block.exit, "output")
        self._own_places()
        points.mixer = self._document(self.mixers, _mixer_type)
        points.mlp = self._document(self.mlps, _mlp_type)
        self._attention_names()
        if any(step.kind == "norm" for step in block.path):
            self.norms.add("post")
        points.norm_placement = self._norm_placement()
        points.relations = self._relations()
        self._inside_branches()
        points.relations = [each for each in points.relations if each.can_be_checked(points.locations)]
        return points

    def _inside_branches(self) -> None:
        """q, k, v, z, pattern; mlp_post; the router. Of several branches of a role the second is numbered 1."""
        not_attention = "this block's mixer is not attention" if self.mixers else "this block has no mixer"
        absent = {
            **dict.fromkeys(ATTENTION, not_attention),
            **dict.fromkeys(("mlp_post", *ROUTER), "this block has no MLP"),
        }
        for number, mixer in enumerate(self.mixers):
            if "attention" in _mixer_kind(self.values, mixer.ops, self.block.seq):
                self._take(attention_points(self.block, mixer, self.locator), number)
        for number, mlp in enumerate(self.mlps):
            self._take(mlp_points(self.block, mlp, self.locator), number)
            self._take(router_points(self.block, mlp, self.locator), number)
        for name, reason in absent.items():
            if name not in self.points.locations:
                self.points.unavailable.setdefault(name, reason)

    def _take(self, found: Found, number: int) -> None:
        suffix = f".{number}" if number else ""
        for name, location in found.locations.items():
            self.points.locations[name + suffix] = location
        for name, reason in found.unavailable.items():
            self.points.unavailable[name + suffix] = reason
        if not number:
            self.points.relations += found.relations

    def _norm_placement(self) -> NormPlacement:
        if self.norms == {"pre", "post"}:
            return "sandwich"
        return "pre" if "pre" in self.norms else "post" if "post" in self.norms else "none"

    def _branch_order(self) -> BranchOrder:
        if not self.mixers or not self.mlps:
            return "mixer_only" if self.mixers else "mlp_only" if self.mlps else "other"
        first = self.mixers[0]
        after = set(self.block.states[first.step + 1 :])
        reading = [mlp for mlp in self.mlps if mlp.reads & after]
        unread = [mlp for mlp in self.mlps if not mlp.reads & after]
        before = [mlp for mlp in unread if first.reads & set(self.block.states[mlp.step + 1 :])]
        if len(reading) + len(before) < len(self.mlps):
            return "parallel"
        return "sequential" if reading else "other"

    def _put(self, name: str, value: int | None, prefer: str, missing: str = "no module boundary exposes it") -> None:
        location = None if value is None else self.locator.locate(value, prefer)
        if location is None:
            self.points.unavailable[name] = missing
        else:
            self.points.locations[name] = location

    def _no_addition(self) -> str:
        shape = self.values.shape(self.block.entry)
        if len(shape) > 3:
            return "the block mixes several residual streams with one another: nothing is added to them as a whole"
        return "no residual addition was found in this block"

    def _no_path(self) -> bool:
        return not self.block.path and self.block.entry != self.block.exit

    def _branch(self, role: str, branches: list[Branch], absent: str) -> None:
        names = (f"{role}_in", f"{role}_out_raw", f"{role}_out")
        if not branches:
            reason = self._no_addition() if self._no_path() else absent
            self.points.unavailable.update(dict.fromkeys(names, reason))
            return
        for number, branch in enumerate(branches):
            suffix = "" if number == 0 else f".{number}"
            self._reads(f"{role}_in{suffix}", branch)
            self._adds(role, suffix, branch)
        if len(branches) > 1:
            for name in names:
                if name in self.points.locations:
                    self.points.locations[f"{name}.0"] = self.points.locations[name]

    def _reads(self, name: str, branch: Branch) -> None:
        """What the branch reads: the stream, followed through the pre-norm if all of the branch goes through it."""
        states = [state for state in self.block.states if state in branch.reads]
        value = self._read_whole(states[-1], branch)
        value = self._collapsed(branch, states) or value
        beside = self._beside(branch, value)
        mixed = value in states and self._mixed_early(branch, value, beside)
        if mixed or (value in states and not self._enters_weights(value)):
            gathered = self._gathered(branch)
            if mixed or gathered is not None:
                value, beside = gathered, set()  # type: ignore[assignment]
        missing = (
            "it reads the stream mixed with other tensors that enter the block, and no one tensor is what it reads"
        )
        self._put(name, value, "input" if value in self.block.states else "output", missing)
        self._put_beside(name, beside)
        if name in self.points.locations:
            self.read_by[name] = value, branch
        if name == "mixer_in" or (name == "mlp_in" and self.points.branch_order != "parallel"):
            readers = [e.call for e in self._inside_inputs(states[-1])]
            if readers:
                self.points.readers[branch.role] = self.locator.templated(readers[0].path)

    def _own_places(self) -> None:
        """What others read too is taken where it enters the branch's own module: there it is written for it alone."""
        locations = self.points.locations
        shared = [
            name
            for name in self.read_by
            if any(
                location.terms == locations[name].terms
                for other, location in locations.items()
                if _base(other) != _base(name)
            )
        ]
        for name in shared:
            own = self._own_module(*self.read_by[name])
            if own is not None:
                location = replace(self.locator.at(own), beside=locations[name].beside)
                locations.update(dict.fromkeys({name, f"{name}.0"} & locations.keys(), location))

    def _own_module(self, value: int, branch: Branch) -> Exposure | None:
        """The one module of the branch, and of nothing else, through which all of it reads the value."""
        reading = [op.time for op in branch.ops if value in self.values.operands(op)]
        others = {id(op) for other in self.block.branches if other is not branch for op in other.ops}
        others |= {id(self.values.producers[state]) for state in self.block.states[1:]}
        whole = [
            place
            for place in self.locator.places(value)
            if place.side == "input"
            and all(place.call.enter < time < place.call.exit for time in reading)
            and not any(id(op) in others for op in self.values.inside(place.call))
        ]
        return min(whole, key=lambda place: place.call.enter, default=None)

    def _beside(self, branch: Branch, value: int) -> set[int]:
        """What enters the block, and depends on the tokens, that the branch reads other than through `value`."""
        raw = (self.block.raw(part) for part in branch.parts)
        return set().union(*(self.values.sources(part, [value], self.block.call) for part in raw))

    def _put_beside(self, name: str, values: set[int]) -> None:
        """Masks and biases are of pairs of positions: no part of what a branch reads."""
        streams = [v for v in sorted(values) if self.values.shape(v).count(self.block.seq) == 1]
        locations = [location for v in streams if (location := self.locator.locate(v, "input")) is not None]
        if locations and name in self.points.locations:
            terms = tuple(term for location in locations for term in location.terms)
            self.points.locations[name] = replace(self.points.locations[name], beside=terms)

    def _mixed_early(self, branch: Branch, value: int, beside: set[int]) -> bool:
        """Whether the others are joined to the stream before any product with weights."""
        light = {value}
        for op in sorted(branch.ops, key=lambda op: op.time):
            operands = {*self.values.operands(op)}
            weights = op.name in aten.PRODUCTS and any(map(self.values.is_constant, operands))
            if not light & operands or weights:
                continue
            if any(self.values.sources(v, light, self.block.call) & beside for v in operands - light):
                return True
            light.update(map(self.values.value, op.outputs))
        return False

    def _gathered(self, branch: Branch) -> int | None:
        """The first tensor of the stream's size, at a boundary, that all of the branch is computed from (Inkling 2).

        Behind positions that were mixed it is no longer what the branch reads (Zamba).
        """
        block, values = self.block, self.values
        raw = [block.raw(part) for part in branch.parts]
        ops = {op.outputs[0]: op for part in raw for op in values.cone(part, block.states, block.call)[0]}
        for op in sorted(ops.values(), key=lambda op: op.time):
            for value in map(values.value, op.outputs):
                like = value not in (*raw, *block.states) and values.size(value) == values.size(block.entry)
                if not like or self._beside(branch, value) or self.locator.locate(value) is None:
                    continue
                if not block.mixing(values.cone(value, block.states, block.call)[0]):
                    whole = self._read_whole(value, branch)
                    return whole if self._enters_weights(whole) else None
        return None

    def _collapsed(self, branch: Branch, states: list[int]) -> int | None:
        """Where the stream is several streams: the one tensor made of them that the branch's own module reads."""
        values, block = self.values, self.block
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

    def _read_whole(self, value: int, branch: Branch) -> int:
        """The last norm through which all of the branch reads `value`; then what of it enters a module with weights.

        So what is done to the stream before a branch's modules (positions added to it, a function instead of a norm)
        is in what the branch reads, and what is done in them is not.
        """
        chain = list(self._bottlenecks(value, branch))
        normed = [v for v in chain if norm_source(self.values, v) is not None and self.locator.locate(v) is not None]
        if normed:
            self.norms.add("pre")
            value, chain = normed[-1], chain[chain.index(normed[-1]) + 1 :]
            chain = [v for v in chain if any(step.kind in ("add", "gate", "scale") for step in steps(self.values, v))]
        return next((v for v in (value, *chain) if self._enters_weights(v)), value)

    def _bottlenecks(self, value: int, branch: Branch) -> Iterator[int]:
        """The tensors, of the stream's size, that all of the branch reads `value` through, before any weights."""
        light: set[int] = {value}
        other: set[int] = set()
        mixing = set(map(id, self.block.mixing(branch.ops)))
        for op in sorted(branch.ops, key=lambda op: op.time):
            operands, result = self.values.operands(op), [self.values.value(t) for t in op.outputs]
            if not light & {*operands} or other & {*operands} or op.name in aten.PRODUCTS or id(op) in mixing:
                other.update(v for v in result if v not in light)
                continue
            light.update(result)
            same_size = result and self.values.size(result[0]) == self.values.size(value)
            if same_size and self._all_through(branch, value, result[0]):
                yield result[0]

    def _enters_weights(self, value: int) -> bool:
        calls = [e.call for e in self._inside_inputs(value)]
        return any(
            norm_input(self.values, c) is None and any(op.name in aten.PRODUCTS for op in self.values.inside(c))
            for c in calls
        )

    def _inside_inputs(self, value: int) -> list[Exposure]:
        block = self.block.call
        places = self.values.exposures.get(value, [])
        return [e for e in places if e.side == "input" and block.enter < e.call.enter < block.exit]

    def _all_through(self, branch: Branch, value: int, output: int) -> bool:
        return not any(
            set(self.block.values.cone(part, [value, output], self.block.call)[1]) - {output} for part in branch.parts
        )

    def _adds(self, role: str, suffix: str, branch: Branch) -> None:
        """What the branch adds; and its bare output, before post-norm, scale or gate."""
        tails = [self.block.tails[part] for part in branch.parts]
        if any(step.kind == "norm" for tail in tails for step in tail):
            self.norms.add("post")
        self._put_sum(f"{role}_out_raw{suffix}", [self.block.raw(part) for part in branch.parts], 1.0)
        name = f"{role}_out{suffix}"
        if self._blends(branch):
            what = "MLP" if role == "mlp" else role
            self.points.unavailable[name] = (
                f"the block blends the {what}'s output with the stream: what it adds holds some of the stream, and "
                "no tensor is what the branch adds alone"
            )
            return
        self._put_sum(name, branch.parts, branch.factor)
        step = self.block.path[branch.step]
        alone = sum(other.step == branch.step for other in self.block.branches) == 1
        plain = branch.factor == 1.0 and step.source_factor == 1.0
        if name not in self.points.locations and alone and plain:
            after, before = step.result, step.source
            if (location := self.locator.difference(after, before)) is not None:
                del self.points.unavailable[name]
                self.points.locations[name] = location

    def _blends(self, branch: Branch) -> bool:
        """Whether the stream is taken away from what is added: a step from it towards the branch's output (Dory)."""
        before = self.block.states[: branch.step + 1]
        paths = [linear_path(self.values, self.block.call, state, part) for part in branch.parts for state in before]
        linear = [path for path in paths if path and not any(step.kind in ("norm", "mix") for step in path)]
        return any(prod(step.source_factor for step in path) < 0 for path in linear)

    def _put_sum(self, name: str, parts: list[int], factor: float | None) -> None:
        locations = [self.locator.locate(part) for part in parts]
        if (
            factor is None
            or any(location is None for location in locations)
            or (factor != 1.0 and any(len(t.terms) > 1 for t in locations if t))
        ):
            self.points.unavailable[name] = "no module boundary exposes it, nor the tensors it is the sum of"
            return
        found = [location for location in locations if location is not None]
        terms = tuple(t.model_copy(update={"scale": t.scale * factor}) for location in found for t in location.terms)
        self.points.locations[name] = Location(terms, max(location.time for location in found), found[0].evidence)

    def _middles(self) -> None:
        """The stream after each addition but the last, as the next branch reads it."""
        order = self.points.branch_order
        reasons = {
            "parallel": "attention and MLP run in parallel"
            if self._is_attention()
            else "mixer and MLP run in parallel",
            "mixer_only": "this block has no MLP",
            "mlp_only": "this block has no mixer",
            "other": "the MLP comes before the mixer: use resid_post" if self.mixers else self._no_addition(),
        }
        if order != "sequential":
            self.points.unavailable["resid_mid"] = self.points.unavailable["resid_mid_sum"] = reasons[order]
            return
        adds = sorted({branch.step for branch in self.block.branches if branch.role != "other"})
        path = self.block.path
        first = adds.index(self.mixers[0].step)
        middles = []
        for add, following in pairwise(adds):
            readers = [branch for branch in self.block.branches if branch.step >= following]
            states = self.block.states[add + 1 : following + 1]
            last = [state for state in states if any(state in branch.reads for branch in readers)]
            middles.append((path[add].result, last[-1] if last else path[following].source))
        summed, read = middles[first]
        self.middle = read
        self._put("resid_mid", read, "input")
        between = path[adds[first] + 1 : self.block.states.index(read)]
        if any(step.kind != "cast" for step in between):
            self._put("resid_mid_sum", summed, "input")
        else:
            self.points.unavailable["resid_mid_sum"] = "nothing is done to the sum: it is resid_mid"
        if len(middles) > 1:
            for number, (_, value) in enumerate(middles):
                self._put(f"resid_mid.{number}", value, "input")

    def _is_attention(self) -> bool:
        return bool(self.mixers) and "attention" in _mixer_type(self.mixers, self.values, self.block.seq).type

    def _attention_names(self) -> None:
        attention = self._is_attention()
        for name in ("in", "out_raw", "out"):
            if attention:
                names = map(PointName.of, list(self.points.locations))
                for found in [each for each in names if each.base == f"mixer_{name}"]:
                    self.points.locations[found.as_attention()] = self.points.locations[str(found)]
            if f"attn_{name}" not in self.points.locations:
                self.points.unavailable[f"attn_{name}"] = (
                    self.points.unavailable.get(f"mixer_{name}", "")
                    if attention or not self.mixers
                    else f"this block's mixer is not attention: use mixer_{name}"
                )

    def _relations(self) -> list[Relation]:
        """The additions of the block in the points' own names."""
        if not self.mixers and not self.mlps:
            return []
        names = self._names_of_states()
        found: list[Relation] = []
        for position, step in enumerate(self.block.path):
            total, stream = names[position + 1], names[position]
            if step.kind == "add":
                added = [
                    f"{b.role}_out{'' if (n := self.block.role(b.role).index(b)) == 0 else f'.{n}'}"
                    for b in self.block.branches
                    if b.step == position and b.role != "other"
                ]
                others = [b for b in self.block.branches if b.step == position and b.role == "other"]
                fixed = all(self.values.is_constant(p, of_tokens=True) for b in others for p in b.parts)
                added += [OWN if fixed else f"{OWN}_of_tokens"] * bool(others)
                terms = (Term(step.source_factor, stream), *(Term(1.0, name) for name in added))
            elif step.kind == "cast":
                terms = (Term(1.0, stream),)
            elif step.kind == "scale" and step.factor is not None and self._is_summed(position, names):
                terms = (Term(step.factor, stream),)
            else:
                terms = (Term(1.0, step.kind, (Term(1.0, stream),)),)
            found.append(Relation(total, terms))
        return _among_points(found)

    def _is_summed(self, position: int, names: list[str]) -> bool:
        """Whether a scaled state of the stream has a name and is a term of the next sum as it is."""
        following = self.block.path[position + 1 :]
        plain = bool(following) and following[0].kind == "add" and following[0].source_factor == 1.0
        return plain and not names[position].startswith("state_")

    def _names_of_states(self) -> list[str]:
        names = ["resid_pre"]
        for position in range(1, len(self.block.states)):
            names.append(f"state_{position}")
        if self.points.branch_order == "sequential":
            names[self.mixers[0].step + 1] = "resid_mid_sum"
            names[self.block.states.index(self.middle)] = "resid_mid"
        names[-1] = "resid_post"
        return names

    def _document(self, branches: list[Branch], describe: object) -> BranchInfo | None:
        if not branches:
            return None
        found: BranchInfo = describe(branches, self.values, self.block.seq)  # type: ignore[operator]
        modules = self._modules([op for branch in branches for op in branch.ops])
        return found.model_copy(
            update={
                "modules": tuple(self.locator.templated(call.path) for call in modules),
                "module_class": " + ".join(dict.fromkeys(type(call.module).__name__ for call in modules)) or None,
            }
        )

    def _modules(self, ops: list[Operation]) -> list[ModuleCall]:
        """The fewest modules inside the block that hold all weight operations of a branch."""
        flow, block = self.values.flow, self.block.call
        heavy = [
            op for op in ops if op.name in aten.PRODUCTS and any(map(self.values.is_constant, self.values.operands(op)))
        ]
        outermost: dict[int, None] = {}
        for op in heavy:
            inner, call = -1, op.call
            while call != block.index and call >= 0:
                parent = flow.calls[call].parent
                inner, call = call, -1 if parent is None else parent
            if inner >= 0:
                outermost[inner] = None
        calls = [flow.calls[index] for index in outermost]
        return [c for c in calls if norm_input(self.values, c) is None] or calls


def _base(name: str) -> str:
    return PointName.of(name).base


def _among_points(relations: list[Relation]) -> list[Relation]:
    """The same relations without the nameless states of the stream: each is replaced by what it is the sum of."""
    known: dict[str, tuple[Term, ...]] = {}
    found = []
    for relation in relations:
        if str(relation) in (f"{relation.total} = {relation.total}", "resid_mid = resid_mid_sum"):  # a cast
            continue
        relation = relation.substitute(known)
        if relation.total.startswith("state_"):
            known[relation.total] = relation.terms
        else:
            found.append(relation)
    if any(relation.total == "resid_mid" for relation in found):
        return found
    renamed = {"resid_mid_sum": (Term(1.0, "resid_mid"),)}  # no norm between: the sum is resid_mid itself
    return [
        replace(relation.substitute(renamed), total=relation.total.replace("resid_mid_sum", "resid_mid"))
        for relation in found
    ]


def _mixer_type(branches: list[Branch], values: Values, seq: int) -> BranchInfo:
    kinds = dict.fromkeys(_mixer_kind(values, branch.ops, seq) for branch in branches)
    return BranchInfo(type="+".join(kinds))


def _mixer_kind(values: Values, ops: list[Operation], seq: int) -> str:
    def shape(op: Operation) -> tuple[int, ...]:
        return values.flow.tensors[op.outputs[0]].shape

    def weighs(op: Operation) -> bool:
        """A softmax over positions, or over positions and what was set beside them: sinks, compressed keys."""
        over = shape(op)
        return op.name == "_softmax" and (over.count(seq) >= 2 or (len(over) > 3 and over[-2] == seq < over[-1]))

    if any(aten.is_fused_attention(op.name) or weighs(op) for op in ops):
        return "attention"
    mixed = {op.name for op in mixing(values, ops, seq)}
    # A scan in chunks pads the positions away, and only its short convolution is seen to mix: its decay tells it apart.
    decays = any(op.name in ("exp", "softplus", "cumsum") for op in ops)
    return "convolution" if mixed <= {"convolution"} and not decays else "recurrent"


def _mlp_type(branches: list[Branch], values: Values, seq: int) -> BranchInfo:
    """Mixture of experts, where a top-k over more scores than it keeps chooses among weights."""
    best: tuple[int, int] | None = None
    for op in (op for branch in branches for op in branch.ops if op.name in aten.TOP_K):
        experts = values.flow.tensors[op.inputs[0]].shape[-1]
        kept = values.flow.tensors[op.outputs[0]].shape[-1]
        if (
            seq in values.flow.tensors[op.inputs[0]].shape[:-1]
            and kept < experts
            and (best is None or experts > best[0])
        ):
            best = (experts, kept)
    if best is None:
        return BranchInfo(type="dense")
    return BranchInfo(type="moe", experts=best[0], experts_per_token=best[1])
