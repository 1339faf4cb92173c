"""Inside one branch: q, k, v, z and pattern of an attention, mlp_post of a dense MLP, the router of a mixture.

The attention is told by its shape: a softmax over positions between two products of activations. From there the way
leads back to the projections that made the queries, keys and values, and on to the one that reads the heads' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from hookmap.discovery import aten
from hookmap.discovery.block import Block, Branch
from hookmap.discovery.dataflow import Operation
from hookmap.discovery.head_layout import features, heads_of, push
from hookmap.discovery.locate import Location, Locator
from hookmap.discovery.values import Exposure
from hookmap.maps.relations import Relation, Term
from hookmap.maps.templates import Heads

ATTENTION = ("q", "k", "v", "z", "pattern")
ROUTER = ("router_logits", "router_indices", "router_weights")
_ON_SCORES = {
    *aten.MOVES, "maximum", "minimum", "clamp", "clamp_min", "add", "sub", "mul", "div", "tanh", "where", "masked_fill",
    "alias_update", "cat", "sigmoid",
}  # fmt: skip
_AFTER_SOFTMAX = {"add", "mul", "masked_fill", "where", "nan_to_num"}
_MONOTONE = {*aten.MOVES, "_softmax", "sigmoid", "_log_softmax", "softplus", "sqrt"}


@dataclass
class Found:
    """Points of one branch, the reasons for those it lacks, and exact relations among them."""

    locations: dict[str, Location] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    relations: list[Relation] = field(default_factory=list)


@dataclass(frozen=True)
class _Core:
    """One attention: tensors that its two products read, and what they give."""

    query: int
    key: int
    value: int
    pattern: int | None
    """the weights as the second product reads them; None where one fused operation computes them"""
    result: int


class _Missing(Exception):
    """Why a point is unavailable."""


def attention_points(block: Block, branch: Branch, locator: Locator) -> Found:
    """q, k, v, z and pattern of a mixer."""
    return _Attention(block, branch, locator).read()


def mlp_points(block: Block, branch: Branch, locator: Locator) -> Found:
    """mlp_post of a dense MLP."""
    wires, found = _Wires(block, branch, locator), Found()
    try:
        if _choice(wires) is not None:
            raise _Missing("the MLP is a mixture of experts: each token has activations in each of its experts")
        projections = wires.projections(wires.tensor_of(block.raw(branch.parts[0])))
        if len(branch.parts) > 1:
            raise _Missing("the MLP branch is a sum of several modules")
        exposure = wires.read_by(projections)
        found.locations["mlp_post"] = locator.at(exposure)
        found.relations += wires.applied(exposure, projections, block.raw(branch.parts[0]), "mlp_out_raw", "mlp_post")
    except _Missing as reason:
        found.unavailable["mlp_post"] = str(reason)
    return found


def router_points(block: Block, branch: Branch, locator: Locator) -> Found:
    """router_logits, router_indices and router_weights of a mixture of experts."""
    return _Router(block, branch, locator).read()


class _Wires:
    """The operations of one block, tensor by tensor: forward from one, and back to the weights."""

    def __init__(self, block: Block, branch: Branch, locator: Locator) -> None:
        self.block, self.branch, self.locator, self.values = block, branch, locator, block.values
        self.flow, self.seq = block.values.flow, block.seq
        self.own = {id(op) for op in branch.ops}
        self.readers: dict[int, list[Operation]] = {}
        self.inside = {id(op) for op in block.values.inside(block.call)}
        for op in block.values.inside(block.call):
            for tensor in dict.fromkeys(op.inputs):
                self.readers.setdefault(tensor, []).append(op)

    def shape(self, tensor: int) -> tuple[int, ...]:
        return self.flow.tensors[tensor].shape

    def tensor_of(self, value: int) -> int:
        """The tensor that first held a value."""
        return self.values.producers[value].outputs[0] if value in self.values.producers else value

    def forward(self, tensor: int, passing: set[str]) -> Iterator[tuple[int, Operation]]:
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
        """The operations that a tensor is made by, back to and with the products; not beyond the value `stop`."""
        stack, seen = [tensor], set()
        while stack:
            here = stack.pop()
            op = self.flow.producer(here)
            outside = op is None or op.time < self.block.call.enter
            if here in seen or outside or op is None or self.values.value(here) == stop:
                continue
            seen.add(here)
            yield here, op
            if op.name not in aten.PRODUCTS and not aten.is_fused_attention(op.name):
                stack += op.inputs

    def projections(self, tensor: int, stop: int | None = None) -> list[Operation]:
        """The products with weights that a tensor comes from without another product between."""
        found = {}
        for _, op in self.back(tensor, stop):
            if (op.name in aten.PRODUCTS or aten.is_fused_attention(op.name)) and id(op) in self.own:
                if not any(map(self.values.is_constant, self.values.operands(op))):
                    raise _Missing("it is computed from products of activations, not by a projection")
                if op.name == "convolution" and self.shape(op.inputs[1])[-1] > 1:
                    raise _Missing("a convolution over positions stands between the projection and the attention")
                found[op.time] = op
        return [found[time] for time in sorted(found)]

    def written_by(self, tensor: int) -> Exposure:
        """The boundary of the module that computes the projection that `tensor` comes from."""
        projections = self.projections(tensor)
        if not projections:
            raise _Missing("no projection makes it: the mixer reads the stream directly")
        places = []
        for value in dict.fromkeys(self.values.value(t) for t, _ in self.back(tensor)):
            for place in self.locator.places(value):
                around = all(place.call.enter < op.time < place.call.exit for op in projections)
                if place.side == "output" and around and not self.projections(tensor, stop=value):
                    places.append(place)
        if places:
            return min(places, key=lambda e: e.time)
        names = dict.fromkeys(self.flow.calls[op.call].path.rpartition(".")[2] for op in projections)
        if len(names) > 1:
            raise _Missing(f"several projections make it together: {', '.join(names)}")
        raise _Missing("no module boundary exposes it")

    def read_by(self, projections: list[Operation]) -> Exposure:
        """The input boundary of the module that applies these projections."""
        if not projections:
            raise _Missing("no projection stands at the end of this branch")
        for op in projections[:1] if len(projections) == 1 else []:
            varying = [v for v in self.values.operands(op) if not self.values.is_constant(v)]
            places = [
                place
                for place in (self.locator.places(varying[0]) if varying else [])
                if place.side == "input" and place.call.enter < op.time < place.call.exit
            ]
            if places:
                return min(places, key=lambda e: (len(e.call.entered), e.call.path.count(".")))
        raise _Missing("no module boundary exposes it")

    def applied(self, place: Exposure, ops: list[Operation], value: int, result: str, point: str) -> list[Relation]:
        """`result = down_proj(point)`, where the module at whose input the point stands gives that value."""
        given = {self.values.value(t) for t in place.call.outputs.values()}
        bare = len(place.call.entered) == 1 and place.place in (None, 0) and len(place.call.outputs) == 1
        # From the block on; whole, with its `{i}`, where the module is in a list beside the block's.
        name = self.locator.templated(place.call.path).removeprefix(self.block.layers.path).lstrip(".")
        return [Relation(result, (Term(1.0, point),), "applied", name)] if value in given and bare and ops else []

    def boundary_tensor(self, place: Exposure) -> int:
        return (place.call.inputs if place.side == "input" else place.call.outputs)[place.place]


class _Attention:
    def __init__(self, block: Block, branch: Branch, locator: Locator) -> None:
        self.wires = _Wires(block, branch, locator)
        self.block, self.branch, self.locator = block, branch, locator
        self.found = Found()

    def read(self) -> Found:
        try:
            core = self._core()
        except _Missing as reason:
            self.found.unavailable.update(dict.fromkeys(ATTENTION, str(reason)))
            return self.found
        for name, tensor in (("q", core.query), ("k", core.key), ("v", core.value)):
            self._try(name, self._operand, tensor, name)
        self._try("z", self._heads_out, core)
        self._try("pattern", self._pattern, core)
        locations = self.found.locations
        if all(name in locations for name in ("z", "pattern", "v")) and self._is_plain(core):
            self.found.relations.insert(0, Relation("z", (Term(1.0, "pattern"), Term(1.0, "v")), "product"))
        return self.found

    def _try(self, name: str, read: Callable[..., Location], *arguments: Any) -> None:
        try:
            self.found.locations[name] = read(*arguments)
        except _Missing as reason:
            self.found.unavailable[name] = str(reason)

    # The two products -------------------------------------------------------------------------------------------

    def _core(self) -> _Core:
        cores = {core.result: core for op in self.branch.ops for core in self._cores_of(op)}
        if not cores:
            raise _Missing("no softmax over positions stands between two products in this block's mixer")
        if len(cores) > 1:
            raise _Missing(f"this block's mixer has {len(cores)} attentions")
        return next(iter(cores.values()))

    def _cores_of(self, op: Operation) -> Iterator[_Core]:
        if aten.is_fused_attention(op.name):
            q, k, v = op.inputs[:3]
            yield _Core(q, k, v, None, op.outputs[0])
        if op.name not in aten.SOFTMAXES:
            return
        if self.wires.shape(op.outputs[0])[-2:-1] != (self.wires.seq,):
            return
        seq = self.wires.seq
        for pattern, product in self.wires.forward(op.outputs[0], aten.MOVES | _AFTER_SOFTMAX):
            square = self.wires.shape(pattern)[-2:] == (seq, seq)
            if product.name == "bmm" and product.inputs[0] == pattern and square:
                scores = self._scores(op.inputs[0])
                if scores is not None:
                    yield _Core(scores[0], scores[1], product.inputs[1], pattern, product.outputs[0])

    def _scores(self, tensor: int) -> tuple[int, int] | None:
        """The operands (queries [heads, pos, d], keys [heads, d, pos]) of the one product that the scores come from.

        A mask that is computed from the tokens (an index of the keys worth reading) is no part of the scores.
        """
        products = {}
        stack, seen = [tensor], set()
        while stack:
            here = stack.pop()
            op = self.wires.flow.producer(here)
            if here in seen or op is None or id(op) not in self.wires.inside:
                continue
            seen.add(here)
            if op.name in aten.BATCHED_PRODUCTS and id(op) in self.wires.own:
                products[op.time] = op
            elif op.name in _ON_SCORES:
                stack += op.inputs
        if len(products) != 1:
            return None
        (product,) = products.values()
        q, k = product.inputs[-2:]
        return (q, k) if self.wires.shape(product.outputs[0])[-2:] == (self.wires.seq,) * 2 else None

    # Points -----------------------------------------------------------------------------------------------------

    def _operand(self, tensor: int, name: str) -> Location:
        """Back from a product's operand to the projection, and which of its features are which head's."""
        place = self.wires.written_by(tensor)
        source = self.wires.boundary_tensor(place)
        labels = push(self.block.values, self.block.call, source, features(self.wires.shape(source)), tensor)
        heads = None
        if labels is not None:
            across = name == "k" and self._keys_across(tensor)
            (first,) = labels.map(lambda t: _heads_first(t, across))
            heads = heads_of(first, place.shape[-1])
        if heads is None:
            raise _Missing("its heads are no even slices of the projection's output")
        location = self._with_heads(place, heads)
        if name != "q" and self._is_expanded(tensor):
            # While generating, all keys and values so far are expanded again from a cache of compressed ones.
            location = location.with_terms(rows="last")
        return location

    def _is_expanded(self, tensor: int) -> bool:
        """Whether the projection reads another projection's output, as in multi-head latent attention."""
        reads = [t for op in self.wires.projections(tensor) for t in op.inputs]
        return any(self.wires.projections(t) for t in reads)

    def _keys_across(self, tensor: int) -> bool:
        """Whether the keys are [heads, d_head, pos], as a product of matrices reads them."""
        op = next(iter(self.wires.readers.get(tensor, [])), None)
        return op is not None and op.name in aten.BATCHED_PRODUCTS

    def _with_heads(self, place: Exposure, heads: Heads) -> Location:
        location, shape = self.locator.at(place), place.shape
        update: dict[str, object] = {"heads": heads}
        if len(shape) > 3:
            if shape[-2] != self.wires.seq or set(shape[:-2]) != {1}:
                raise _Missing("the projection's output has axes of its own")
            update["axes"] = None  # the selector merges what stands before the positions
        return location.with_terms(**update)

    def _heads_out(self, core: _Core) -> Location:
        """On from the second product to the projection that reads the heads side by side."""
        readers = self._output_projections(core.result)
        if len(readers) != 1:
            raise _Missing("no one projection reads the heads' outputs")
        place = self.wires.read_by(readers)
        shape = self.wires.shape(core.result)
        heads, size = shape[:-2], shape[-1]
        count = prod(heads)
        labels = features((count * size,)).view(*heads, 1, size).expand(shape)
        target = self.wires.boundary_tensor(place)
        seen = push(self.block.values, self.block.call, core.result, labels, target)
        width = self.wires.shape(target)[-1]
        if (
            seen is None
            or width != count * size
            or not all((t == features((width,))).all() for t in (seen.low, seen.high))
        ):
            raise _Missing("the output projection does not read the heads side by side")
        raws = [self.block.raw(part) for part in self.branch.parts]
        if len(raws) == 1:
            self.found.relations += self.wires.applied(place, readers, raws[0], "mixer_out_raw", "z")
        return self._with_heads(place, Heads(stop=width, d_head=size))

    def _output_projections(self, tensor: int) -> list[Operation]:
        """The first products with weights behind a tensor, whatever is done to each number on the way."""
        found = {}
        stack, seen = [tensor], set()
        while stack:
            for op in self.wires.readers.get(stack.pop(), []):
                if op.name in aten.PRODUCTS:
                    found[op.time] = op
                elif id(op) not in seen and (op.name in aten.MOVES or id(op) in self.wires.own):
                    seen.add(id(op))
                    stack += op.outputs
        return [found[time] for time in sorted(found)]

    def _pattern(self, core: _Core) -> Location:
        if core.pattern is None:
            raise _Missing("one fused operation computes the attention: load the model with eager attention")
        if self.locator.rows != "all":
            raise _Missing("the model adds positions of its own, which are keys too")
        seq, values = self.wires.seq, self.block.values
        copies = [core.pattern, *(t for t, op in self.wires.back(core.pattern) if op.name in aten.MOVES | {"_softmax"})]
        for value in dict.fromkeys(map(values.value, copies)):
            places = [p for p in self.locator.places(value) if p.shape[-2:] == (seq, seq) and len(p.shape) == 4]
            if places:
                inner = min(places, key=lambda p: (p.call is self.block.call, p.call.path.count("."), p.time))
                location = self.locator.at(inner)
                return location.with_terms(axes=("batch", "heads", "pos", "key"), flat=False)
        raise _Missing("no module boundary exposes the attention weights")

    def _is_plain(self, core: _Core) -> bool:
        """Whether z is the second product as it is, of the weights and the values as they are."""
        return self._only_views(core.value) and self._only_views_on(core)

    def _only_views(self, tensor: int) -> bool:
        return all(op.name in aten.MOVES | aten.PRODUCTS | {"add"} for _, op in self.wires.back(tensor))

    def _only_views_on(self, core: _Core) -> bool:
        reads = {op.name for _, op in self.wires.forward(core.result, aten.MOVES)}
        return reads <= aten.PRODUCTS


def _heads_first(tensor: Tensor, across: bool) -> Tensor:
    """[..., pos, d_head], or where `across` [..., d_head, pos] -> [heads, pos, d_head]."""
    moved = tensor.transpose(-1, -2) if across else tensor
    return moved.reshape(-1, *moved.shape[-2:])


def _choice(wires: _Wires) -> Operation | None:
    """The top-k that chooses experts: of those with the most to choose from, the last."""
    best: tuple[int, int] | None = None
    chosen = None
    for op in wires.branch.ops:
        if op.name not in aten.TOP_K:
            continue
        scores, kept = wires.shape(op.inputs[0]), wires.shape(op.outputs[0])[-1]
        if wires.seq in scores[:-1] and kept < scores[-1]:
            rank = (scores[-1], op.time)
            if best is None or rank > best:
                best, chosen = rank, op
    return chosen


class _Router:
    def __init__(self, block: Block, branch: Branch, locator: Locator) -> None:
        self.wires, self.locator, self.values = _Wires(block, branch, locator), locator, block.values
        self.found = Found()

    def read(self) -> Found:
        choice = _choice(self.wires)
        if choice is None:
            self.found.unavailable.update(dict.fromkeys(ROUTER, "this block has no mixture of experts"))
            return self.found
        self._logits(choice)
        self._indices(choice)
        self._weights(choice)
        return self.found

    def _logits(self, choice: Operation) -> None:
        experts = self.wires.shape(choice.inputs[0])[-1]
        way = [op for _, op in self.wires.back(choice.inputs[0]) if id(op) in self.wires.own]
        products = [op for op in way if op.name in aten.PRODUCTS and self.wires.shape(op.outputs[0])[-1] == experts]
        if len(products) != 1:
            self.found.unavailable["router_logits"] = "no one product with weights gives a score to each expert"
            return
        after = [products[0], *(op for op in way[::-1] if op.name in aten.MOVES | {"add"})]
        for value in dict.fromkeys(self.values.value(op.outputs[0]) for op in after):
            for place in self.locator.places(value):
                if place.shape[-1] == experts:
                    self.found.locations["router_logits"] = self.locator.at(place)
                    between = {op.name for op in way if op is not products[0]}
                    if between <= _MONOTONE and "router_indices" not in self.found.unavailable:
                        self.found.relations.append(
                            Relation("router_indices", (Term(1.0, "router_logits"),), "applied", "topk")
                        )
                    return
        self.found.unavailable["router_logits"] = "no module boundary exposes it"

    def _indices(self, choice: Operation) -> None:
        kept = self.wires.shape(choice.outputs[1])[-1]
        value = self.values.value(choice.outputs[1])
        copies = [self.values.value(t) for t, _ in self.wires.forward(choice.outputs[1], aten.MOVES)]
        for each in dict.fromkeys([value, *copies]):
            for place in self.locator.places(each):
                if place.shape[-1] == kept:
                    self.found.locations["router_indices"] = self.locator.at(place)
                    return
        self.found.unavailable["router_indices"] = "no module boundary exposes it"

    def _weights(self, choice: Operation) -> None:
        """The last boundary where the chosen experts' weights stand, before an expert is multiplied by them."""
        shape = self.wires.shape(choice.outputs[0])
        best: Exposure | None = None
        last = -1
        for tensor, op in self._weighed(choice):
            for place in self.locator.places(self.values.value(tensor)):
                if place.shape[-1] == shape[-1] and op.time > last:
                    best, last = place, op.time
        if best is None:
            self.found.unavailable["router_weights"] = "no module boundary exposes it"
        else:
            self.found.locations["router_weights"] = self.locator.at(best)

    def _weighed(self, choice: Operation) -> Iterator[tuple[int, Operation]]:
        """Tensors of numbers [tokens, k] that are made of the chosen scores, or looked up at the chosen places."""
        shape = self.wires.shape(choice.outputs[0])
        yield choice.outputs[0], choice
        stack, seen = list(choice.outputs), set()
        while stack:
            for op in self.wires.readers.get(stack.pop(), []):
                for tensor in op.outputs[:1]:
                    dtype = self.wires.flow.tensors[tensor].dtype
                    same = self.wires.shape(tensor)[-1:] == shape[-1:] or op.name == "sum"
                    if tensor not in seen and op.name not in aten.PRODUCTS and same:
                        seen.add(tensor)
                        stack.append(tensor)
                        if dtype.is_floating_point and self.values.size(self.values.value(tensor)) == prod(shape):
                            yield tensor, op
