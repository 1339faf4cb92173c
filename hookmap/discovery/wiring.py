"""The operations of one block, tensor by tensor: forward from one, and back to the projections that make it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from hookmap.discovery import aten
from hookmap.discovery.block import Block, Branch
from hookmap.discovery.dataflow import Operation
from hookmap.discovery.locate import Location, Locator
from hookmap.discovery.values import Exposure
from hookmap.maps.relations import Relation, Term

Places = dict[str, Location | str]
"""point -> where it is, or the reason why it is unavailable"""


@dataclass(frozen=True)
class Found:
    """Points inside a branch, and exact relations among them."""

    places: Places = field(default_factory=dict)
    relations: tuple[Relation, ...] = ()


class Missing(Exception):
    """The reason why a point is unavailable."""


def attempt(locate: Callable[[], Location]) -> Location | str:
    """What `locate` returns, or the reason why the point is unavailable."""
    try:
        return locate()
    except Missing as reason:
        return str(reason)


@dataclass(frozen=True)
class Wiring:
    """The operations of one block, as one of its branches uses them."""

    block: Block
    branch: Branch
    locator: Locator

    @cached_property
    def own(self) -> set[int]:
        """The branch's operations, by `id`."""
        return {id(op) for op in self.branch.ops}

    @cached_property
    def inside(self) -> set[int]:
        """The block's operations, by `id`."""
        return {id(op) for op in self.block.values.inside(self.block.call)}

    @cached_property
    def readers(self) -> dict[int, list[Operation]]:
        """tensor -> the block's operations that read it"""
        found: dict[int, list[Operation]] = {}
        for op in self.block.values.inside(self.block.call):
            for tensor in dict.fromkeys(op.inputs):
                found.setdefault(tensor, []).append(op)
        return found

    def shape(self, tensor: int) -> tuple[int, ...]:
        return self.block.values.flow.tensors[tensor].shape

    def tensor_of(self, value: int) -> int:
        """The tensor that first held a value."""
        op = self.block.values.producers.get(value)
        return value if op is None else next(t for t in op.outputs if self.block.values.value(t) == value)

    def boundary_tensor(self, place: Exposure) -> int:
        """The tensor at a module's boundary."""
        return (place.call.inputs if place.side == "input" else place.call.outputs)[place.place]

    def forward(self, tensor: int, passing: frozenset[str] | set[str]) -> Iterator[tuple[int, Operation]]:
        """What reads a tensor, through operations that are `passing`: (the tensor as it is read, the reader)."""
        stack, seen = [tensor], set()
        while stack:
            here = stack.pop()
            for op in self.readers.get(here, []):
                if op.name not in passing:
                    yield here, op
                elif id(op) not in seen:
                    seen.add(id(op))
                    stack += op.outputs

    def back(self, tensor: int, stop: int | None = None) -> Iterator[tuple[int, Operation]]:
        """The operations that make a tensor, back to the products and with them; not beyond the value `stop`."""
        stack, seen = [tensor], set()
        while stack:
            here = stack.pop()
            op = self.block.values.flow.producer(here)
            outside = op is None or op.time < self.block.call.enter
            if here in seen or outside or op is None or self.block.values.value(here) == stop:
                continue
            seen.add(here)
            yield here, op
            if not is_product(op):
                stack += op.inputs

    def projections(self, tensor: int, stop: int | None = None) -> list[Operation]:
        """The products with weights that a tensor comes from without another product between, in their order."""
        found = {}
        for _, op in self.back(tensor, stop):
            if is_product(op) and id(op) in self.own:
                self._check_projection(op)
                found[op.time] = op
        return [found[time] for time in sorted(found)]

    def _check_projection(self, op: Operation) -> None:
        if not any(map(self.block.values.is_constant, self.block.values.operands(op))):
            raise Missing("it is computed from products of activations, not by a projection")
        if op.name == "convolution" and self.shape(op.inputs[1])[-1] > 1:
            raise Missing("a convolution over positions stands between the projection and the attention")

    def _is_of_tokens_before(self, tensor: int) -> bool:
        """Whether it is made, without a product, of tokens' tensors that enter the block, and not of the stream."""
        block = self.block
        sources = block.values.sources(block.values.value(tensor), block.states, block.call)
        reads = block.values.cone(block.values.value(tensor), block.states, block.call)[1]
        return bool(sources) and not reads

    def written_by(self, tensor: int) -> Exposure:
        """The output of the module that computes the projection that `tensor` comes from."""
        projections = self.projections(tensor)
        if not projections:
            enters = self.block.values.value(tensor) != self.block.entry and self._is_of_tokens_before(tensor)
            raise Missing(
                "it is computed before this block, and enters it beside the stream"
                if enters
                else "no projection makes it: the mixer reads the stream directly"
            )
        values = dict.fromkeys(self.block.values.value(t) for t, _ in self.back(tensor))
        places = [
            place
            for value in values
            for place in self.locator.places(value)
            if place.side == "output" and _is_around(place, projections) and not self.projections(tensor, stop=value)
        ]
        if places:
            return min(places, key=lambda e: e.time)
        calls = self.block.values.flow.calls
        names = dict.fromkeys(calls[op.call].path.rpartition(".")[2] for op in projections)
        if len(names) > 1:
            raise Missing(f"several projections make it together: {', '.join(names)}")
        raise Missing(self.locator.why_nowhere(*values))

    def read_by(self, projections: list[Operation]) -> Exposure:
        """The input of the module that applies the one projection."""
        if not projections:
            raise Missing("no projection stands at the end of this branch")
        varying = [v for v in self.block.values.operands(projections[0]) if not self.block.values.is_constant(v)]
        places = [
            place
            for value in (varying[:1] if len(projections) == 1 else [])
            for place in self.locator.places(value)
            if place.side == "input" and _is_around(place, projections)
        ]
        if not places:
            raise Missing(self.locator.why_nowhere(*varying[:1]))
        return min(places, key=lambda e: (len(e.call.entered), e.call.path.count(".")))

    def applied(self, place: Exposure, value: int, result: str, point: str) -> tuple[Relation, ...]:
        """`result = down_proj(point)`, where the module that `point` enters gives the value; else no relation."""
        given = {self.block.values.value(t) for t in place.call.outputs.values()}
        alone = len(place.call.entered) == len(place.call.outputs) == 1 and place.place in (None, 0)
        # The path from the block on; the whole template where the module is in a list beside the block's.
        name = self.locator.templated(place.call.path).removeprefix(self.block.layers.path).lstrip(".")
        relation = Relation(result, (Term(1.0, point),), "applied", name)
        return (relation,) if value in given and alone else ()


def is_product(op: Operation) -> bool:
    """Whether it multiplies matrices."""
    return op.name in aten.PRODUCTS or aten.is_fused_attention(op.name)


def _is_around(place: Exposure, ops: list[Operation]) -> bool:
    return all(place.call.enter < op.time < place.call.exit for op in ops)
