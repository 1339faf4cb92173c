"""One block: the path of the residual stream through it, and the branches that are added to the stream on the way.

No module name is asked: a branch is a mixer because it mixes positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

from hookmap.discovery import aten
from hookmap.discovery.dataflow import ModuleCall, Operation
from hookmap.discovery.layer_list import LayerList
from hookmap.discovery.linear_steps import Step, has_weights, steps, summands
from hookmap.discovery.mixing import is_shift, mixing
from hookmap.discovery.nested_sums import unfolded
from hookmap.discovery.second_streams import Streams, streams_of
from hookmap.discovery.values import Exposure, Values

Role = Literal["mixer", "cross_attn", "mlp", "other"]
ROLES: tuple[Role, ...] = ("mixer", "cross_attn", "mlp")
"""those whose branches have points"""
_MUCH = 8
"""times as much work, of two branches that are not alike"""
_Cone = tuple[list[int], list[Operation], set[int]]


@dataclass(frozen=True)
class Branch:
    """What one addition adds to the stream by branches of one role."""

    role: Role
    """other: it reads nothing of the stream, or multiplies it with no matrix"""
    step: int
    """index of its addition on the block's residual path"""
    added: list[int]
    """values whose sum is added"""
    parts: list[int]
    """what is added, without the stream in it (`x + rate * (branch - x)`): values that the branch computes"""
    factor: float | None
    """of what is added; None: not a constant"""
    gate: int | None
    """weights that what is added is multiplied by, too"""
    ops: list[Operation]
    reads: set[int]
    """values of the residual path that it reads"""
    shifts: bool = False
    """it only shifts positions, or leaves them where they are"""
    short: bool = False
    """it does no more than that, and convolve each feature alone"""

    def joined_with(self, other: Branch) -> Branch:
        """Both as one branch, where one addition adds both."""
        return replace(
            self,
            added=self.added + other.added,
            parts=self.parts + other.parts,
            ops=self.ops + [op for op in other.ops if op not in self.ops],
            reads=self.reads | other.reads,
            shifts=self.shifts and other.shifts,
            short=self.short and other.short,
        )


def has_matrix(ops: list[Operation]) -> bool:
    """Whether they multiply with a matrix, as far as the names of operators tell."""
    return any(op.name not in aten.LIGHT for op in ops)


def _is_wide(branch: Branch) -> bool:
    """Whether it multiplies with matrices, and mixes by a short convolution only."""
    return branch.short and any(op.name in aten.MATRIX_PRODUCTS for op in branch.ops)


def _without_mixing(branch: Branch) -> Branch:
    return replace(branch, role="mlp" if has_matrix(branch.ops) else "other")


@dataclass(frozen=True)
class Block:
    """One run of a block of a list, as its dataflow shows it."""

    values: Values
    layers: LayerList
    number: int
    run: int = 0

    @property
    def call(self) -> ModuleCall:
        return self.layers.calls[self.number, self.run]

    @property
    def entry(self) -> int:
        """The value of the stream that enters."""
        return self.layers.streams[self.number, self.run][0]

    @property
    def exit(self) -> int:
        """The value of the stream that leaves."""
        return self.layers.streams[self.number, self.run][1]

    @property
    def seq(self) -> int:
        return self.layers.seq

    @cached_property
    def path(self) -> list[Step]:
        """The linear steps of the stream from entry to exit; empty where there are none.

        Of a reversible block, those of both streams, in the order of the pass; the second stream begins with a step
        that changes nothing.
        """
        own, twin = self.streams.own, self.streams.twin
        if self.streams.mixed or not twin:
            return [] if self.streams.mixed else unfolded(self.values, self.call, own)
        steps = sorted(own + twin, key=lambda step: self.values.producers[step.result].time)
        return [Step("cast", twin[0].source, twin[0].source), *steps]

    @cached_property
    def streams(self) -> Streams:
        """The way of the stream, and of a second one."""
        return streams_of(self.values, self.call, self.entry, self.exit)

    @cached_property
    def states(self) -> list[int]:
        """The values of the stream, from entry to exit."""
        return [self.entry, *(step.result for step in self.path)]

    @cached_property
    def branches(self) -> list[Branch]:
        """What is added to the stream, in the order of the additions."""
        found = [branch for number, step in enumerate(self.path) for branch in self._branches_of(number, step)]
        mixers = [branch for branch in found if branch.role == "mixer"]
        if all(branch.shifts for branch in mixers):
            return found
        # Next to a branch that mixes more, one that takes in the position before (RWKV's channel mixing) is the MLP.
        found = [_without_mixing(each) if each.role == "mixer" and each.shifts else each for each in found]
        if any(branch.role == "mlp" for branch in found) or all(branch.short for branch in mixers):
            return found
        # And so is one with a short convolution before its weights, where nothing else is.
        return [_without_mixing(each) if each.role == "mixer" and _is_wide(each) else each for each in found]

    def role(self, role: Role) -> list[Branch]:
        return [branch for branch in self.branches if branch.role == role]

    def main(self, role: Role) -> list[Branch]:
        """The branches of a role that do most of its work: attentions, and none that is much lighter than another.

        An adapter beside an MLP, or a short convolution before an attention, is none of them.
        """
        found = self.role(role)
        kept = [branch for branch in found if role == "mixer" and self.is_attention(branch)] or found
        work = [self._work(branch.ops) for branch in kept]
        return [branch for branch, own in zip(kept, work, strict=True) if own * _MUCH >= max(work)]

    def numbered(self, role: Role) -> list[tuple[str, Branch]]:
        """The branches of a role in their order, each with the suffix of its points: none for the first main one."""
        main = self.main(role)
        return [("" if each is main[0] else f".{number}", each) for number, each in enumerate(self.role(role))]

    def is_attention(self, branch: Branch) -> bool:
        """Whether a branch weighs positions by a softmax over them."""
        return any(aten.is_fused_attention(op.name) or self._is_softmax_over_keys(op) for op in branch.ops)

    def _is_softmax_over_keys(self, op: Operation) -> bool:
        """A softmax over positions, or over positions and further keys beside them (sinks, compressed keys)."""
        if op.name != "_softmax":
            return False
        shape, seq = self.values.flow.tensors[op.outputs[0]].shape, self.seq
        return shape.count(seq) >= 2 or (len(shape) > 3 and shape[-2] == seq < shape[-1])

    def _work(self, ops: list[Operation]) -> int:
        """How many multiplications the products among operations take, for one sequence."""
        return sum(self._multiplications(op) for op in ops if op.name in aten.PRODUCTS)

    def _multiplications(self, op: Operation) -> int:
        shapes = [self.values.flow.tensors[t].shape for t in (*op.inputs, *op.outputs)]
        if op.name == "convolution":  # each output reads a window of some features
            return prod(shapes[-1]) * prod(shapes[1][1:])
        return prod(shapes[-1]) * (shapes[-3 if len(shapes) > 2 else 0] or (1,))[-1]

    def mixing(self, ops: list[Operation]) -> list[Operation]:
        """Those of `ops` that move information between positions of the stream, or between tokens."""
        return [op for n in {self.seq, self.layers.tokens} for op in mixing(self.values, ops, n)]

    def boundaries(self, value: int, side: Literal["input", "output"]) -> list[Exposure]:
        """The inputs, or the outputs, of modules inside the block where a value stands."""
        return [
            e
            for e in self.values.exposures.get(value, [])
            if e.side == side
            and self.call.enter < e.call.enter
            and e.call.exit < self.call.exit
            and e.call.index != self.call.index  # of a block that ends with an addition behind its own module
        ]

    # The end of a branch --------------------------------------------------------------------------------------------

    @cached_property
    def tails(self) -> dict[int, list[Step]]:
        """Part of a branch -> the steps behind its last module with weights, such as a post-norm; outermost first."""
        return {part: list(self._tail(part)) for branch in self.branches for part in branch.parts}

    def raw(self, part: int) -> int:
        """The part before post-norm, scale and gate."""
        tail = self.tails[part]
        bare = tail[-1].source if tail else part
        while tail and not self.boundaries(bare, "output"):
            casts = [step for step in steps(self.values, bare) if step.kind == "cast"]
            if not casts or not self.values.made_in(casts[0].source, self.call):
                break
            bare = casts[0].source
        return bare

    def _tail(self, part: int) -> Iterator[Step]:
        casts: list[Step] = []
        while True:
            if (short := self._convolution(part)) is not None:
                yield from (*casts, short)
                part, casts = short.source, []
            if self._is_bare(part):
                return
            linear = [s for s in steps(self.values, part) if s.branch is None or self.values.is_constant(s.branch)]
            linear = linear or self._gated(part)
            if not linear or not self.values.made_in(linear[0].source, self.call):
                return
            casts.append(linear[0])
            if linear[0].kind != "cast":
                yield from casts
                casts = []
            part = linear[0].source

    def _gated(self, value: int) -> list[Step]:
        """The step by which a gate of the tokens, a function of a number or what does less work, multiplies a value."""
        op = self.values.producers.get(value)
        if op is None or op.name != "mul":
            return []
        sides = [v for v in self.values.operands(op) if self.values.size(v) == self.values.size(value)]
        sides = [v for v in sides if not self.values.is_constant(v)]
        if len(sides) == 2:
            gates = [v for v in sides if (made := self.values.producers.get(v)) and made.name in aten.ACTIVATIONS]
            work = [self._work(self.values.cone(v, self.states, self.call)[0]) for v in sides]
            gates = gates if len(gates) == 1 else [v for v, own in zip(sides, work, strict=True) if own < max(work)]
            sides = [v for v in sides if v not in gates] if len(gates) == 1 else []
        return [Step("gate", v, value, factor=None) for v in sides if self.values.made_in(v, self.call)]

    def _convolution(self, value: int) -> Step | None:
        """The convolution of each feature alone, by a module, of what another module computed (Inkling)."""
        for exposure in self.boundaries(value, "output"):
            heavy = [op for op in self.values.inside(exposure.call) if op.name in aten.PRODUCTS]
            entered = {v for t in exposure.call.entered.values() if self._is_bare(v := self.values.value(t))}
            if heavy and all(map(self._is_depthwise, heavy)) and len(entered) == 1 and value not in entered:
                return Step("convolve", entered.pop(), value, factor=None)
        return None

    def _is_depthwise(self, op: Operation) -> bool:
        return op.name == "convolution" and self.values.flow.tensors[op.inputs[1]].shape[1] == 1

    def _is_short(self, op: Operation) -> bool:
        return is_shift(op) or (op.name == "convolution" and self._is_depthwise(op))

    def _is_bare(self, value: int) -> bool:
        """Whether a module with weights gives the value."""
        return any(has_weights(self.values, e.call) for e in self.boundaries(value, "output"))

    def _across(self, ops: list[Operation]) -> bool:
        """Whether a branch attends to keys that are not made of the stream, such as an encoder's positions."""
        if not any(op.name in aten.SOFTMAXES or aten.is_fused_attention(op.name) for op in ops):
            return False
        of_stream = {*self.states, *(self.values.value(t) for op in ops for t in op.outputs)}
        products = [op for op in ops if op.name in aten.BATCHED_PRODUCTS or aten.is_fused_attention(op.name)]
        others = {v for op in products for v in self.values.operands(op)} - of_stream
        return any(not self.values.is_constant(value, of_tokens=True) for value in others)

    # The branches of an addition ------------------------------------------------------------------------------------

    def _branches_of(self, number: int, step: Step) -> list[Branch]:
        """What an addition adds: one branch of each role."""
        if step.branch is None:
            return []
        found: dict[str, Branch] = {}
        for added, (parts, ops, reads) in self._cones(step.branch).items():
            mixed = [op for part in parts for op in self._mixed(part, ops)]
            role: Role = "mixer" if mixed else "cross_attn" if self._across(ops) else "mlp"
            if not reads or (role == "mlp" and not has_matrix(ops)):
                role = "other"
            shifts = all(map(is_shift, mixed))
            short = all(map(self._is_short, mixed)) and not any(op.name in aten.DECAYS for op in ops)
            branch = Branch(role, number, [added], parts, step.factor, step.gate, ops, reads, shifts, short)
            found[role] = found[role].joined_with(branch) if role in found else branch
        return list(found.values())

    def _cones(self, value: int) -> dict[int, _Cone]:
        """Each part of a sum that is added -> what of it is not the stream, with its operations and what it reads."""
        cones = {part: self._cone(part) for part in self._parts(value)}
        heavy = {part for part, (_, ops, _) in cones.items() if any(op.name in aten.PRODUCTS for op in ops)}
        light_reads = any(reads for part, (_, _, reads) in cones.items() if part not in heavy)
        if len(cones) > 1 and (len(heavy) < 2 or light_reads):  # one branch with a residual stream of its own
            return {value: self._cone(value)}
        return cones

    def _cone(self, added: int) -> _Cone:
        terms = [term.value for term in summands(self.values, self.call, added, self.states)]
        # Blended with the stream itself: what the branch computes is the rest.
        parts = [value for value in terms if value not in self.states] if set(terms) & set(self.states) else [added]
        cones = [self.values.cone(part, self.states, self.call) for part in parts]
        ops = {op.time: op for part_ops, _ in cones for op in part_ops}
        return parts, list(ops.values()), set().union(*(reads for _, reads in cones))

    def _parts(self, value: int) -> list[int]:
        """The terms of a sum that no module inside the block gives as a whole; else the value itself."""
        if self.boundaries(value, "output") or not self.values.made_in(value, self.call):
            return [value]
        op = self.values.producers[value]
        sides = self.values.operands(op) if op.name == "add" else ()
        whole = all(self.values.size(v) == self.values.size(value) and not self.values.is_constant(v) for v in sides)
        return [part for side in sides for part in self._parts(side)] if len(sides) == 2 and whole else [value]

    def _mixed(self, part: int, ops: list[Operation]) -> list[Operation]:
        """The operations of a part that mix positions, without a short convolution of all of the branch at its end."""
        tail = list(self._tail(part))
        if any(step.kind == "convolve" for step in tail):
            ops = self.values.cone(tail[-1].source, self.states, self.call)[0]
        return self.mixing(ops)
