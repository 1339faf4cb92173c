"""Which parameters write to and read from a point, by dataflow: the products with weights on both sides of its tensor.

A parameter is given in the orientation `x @ W`: how the model turns, cuts and reshapes it on the way to the product is
recorded, and done again with the model's own parameter. So it is a view, whatever the parameter's layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hookmap.discovery import aten
from hookmap.discovery.dataflow import Dataflow, Operation, TensorRef
from hookmap.discovery.discover import flow_of
from hookmap.discovery.values import Values
from hookmap.errors import DiscoveryError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector, layers_of
from hookmap.maps.terms import Term

POINTS_WITH_WEIGHTS = ("mixer_in", "z", "mixer_out", "mlp_in", "mlp_out")
_PASSING = aten.MOVES | aten.POINTWISE | {"alias_update", "copy", "nan_to_num", "cat", "_fused_rms_norm", "mean"}
_BENDS = {"silu", "gelu", "relu", "sigmoid", "tanh", "pow", "clamp", "minimum", "leaky_relu", "softplus", "exp"}
_TAKES_WEIGHT = {"mm": 1, "addmm": 2, "bmm": 1, "baddbmm": 2, "_grouped_mm": 1, "convolution": 1, "mv": 0}
"""products -> which of their tensors is the weight, of `x @ W`"""


@dataclass(frozen=True)
class WeightPlace:
    """One parameter, and how the product that uses it gets from it to `x @ W`."""

    name: str
    """W_Q, W_K, W_V, W_O, W_in, W_gate, W_out, W_router, W_E, W_U; of another, the name of its module"""
    path: str
    side: Literal["writes", "reads"]
    steps: tuple[Operation, ...] = ()
    """the views on the way from the parameter to the product"""
    cuts: tuple[Operation, ...] = ()
    """what takes these features out of the product's result"""
    conv: bool = False
    bias: str | None = None
    heads: Term | None = None
    """the term whose heads lie on what it gives, or of W_O on what it reads"""

    def view(self, parameter: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """`[in, out]`, experts in front, heads as an axis; and the names of the axes. Raises DiscoveryError."""
        found = parameter.detach()
        if self.conv:
            found = found.squeeze(-1).mT
        for op in self.steps:
            found = _again(op, found, parameter.ndim)
        for op in self.cuts:
            found = _cut(op, found)
        if found.ndim == 1:
            return found, ("d_model",)
        axes = ("experts",) * (found.ndim - 2)
        if self.heads is None:
            return found, (*axes, "in", "out")
        if self.name != "W_O":
            return self.heads.view(found), (*axes, "in", "heads", "d_head")
        return self.heads.view(found.mT).movedim(0, -1), ("heads", "d_head", "out")


@dataclass(frozen=True)
class _Use:
    """A product with weights, as the dataflow shows it."""

    place: WeightPlace
    op: Operation
    bent: bool = False
    """whether its result passes a function that is not linear"""

    @property
    def key(self) -> tuple[int, ...]:
        """The same for uses of one weight: the product, and which of its features."""
        return (self.op.time, *(n for cut in self.place.cuts for n in (cut.time, *cut.outputs)))

    def named(self, name: str, heads: Term | None = None) -> _Use:
        heads = heads if heads is not None and heads.heads is not None else None
        return replace(self, place=replace(self.place, name=name, heads=heads))


def _is_end(name: str, base: str) -> bool:
    """Whether a weight with this name writes to a point or reads it, other than as what a branch reads."""
    ends = {
        "W_Q": "q",
        "W_K": "k",
        "W_V": "v",
        "W_O": "z attn_result mixer_out mixer_out_raw cross_attn_out cross_attn_out_raw",
        "W_in": "mlp_pre mlp_pre_linear mlp_post",
        "W_gate": "mlp_pre mlp_post",
        "W_out": "mlp_post mlp_out mlp_out_raw shared_expert_out",
        "W_router": "router_logits",
        "W_E": "embed",
        "W_U": "logits logits_raw",
    }
    return base in ends[name].split()


class Weights:
    """The weights of one model, from its dataflow."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow, self._values = flow, Values(flow)
        self._readers: dict[int, list[Operation]] = {}
        for op in flow.operations:
            for tensor in dict.fromkeys(op.inputs):
                self._readers.setdefault(tensor, []).append(op)

    def of(self, point: str, beside: Mapping[str, Selector]) -> list[WeightPlace]:
        """The parameters that write to a point of a layer, and then those that read from it.

        `beside`: the points of its layer, or of the whole model, in the same run. Raises DiscoveryError.
        """
        name = PointName.of(PointName.of(point).as_mixer())
        uses = list(self._uses(name, beside))
        found = [use.place for use in uses if _is_end(use.place.name, name.base)]
        if name.base in ("final_norm", "mixer_in", "cross_attn_in", "mlp_in"):
            tensor = self._tensor(beside[point].terms[-1])
            found += self._norm(tensor)
        if name.base in ("mixer_in", "cross_attn_in", "mlp_in"):
            reached = {id(op) for op in self._reached(tensor)}
            read = [replace(use.place, side="reads") for use in uses if id(use.op) in reached]
            found += read
            if not read:  # a mixer that is no attention
                others = (self._product(op, "reads") for op in self._reached(tensor))
                queries = name.base == "cross_attn_in"  # keys and values are the encoder's
                found += [replace(each, name="W_Q") if queries else each for each in others if each is not None]
        return list({(place.name, place.path, place.side): place for place in found}.values())

    def _uses(self, name: PointName, beside: Mapping[str, Selector]) -> Iterator[_Use]:
        """The products with weights of the branch that a point is of, named."""
        for base, own in (("q", "W_Q"), ("k", "W_K"), ("v", "W_V")):
            if name.base in ("mixer_in", base) and (selector := beside.get(name.numbered(base))) is not None:
                term = selector.terms[-1]
                yield from (use.named(own, heads=term) for use in self._behind(self._tensor(term)))
        if name.base in ("z", "attn_result") and (selector := beside.get(name.numbered("z"))) is not None:
            term = selector.terms[-1]
            for op in self._reached(self._tensor(term), aten.MOVES):
                if (place := self._product(op, "reads" if name.base == "z" else "writes")) is not None:
                    yield _Use(replace(place, name="W_O", heads=term), op)
        for bases, own in (
            (("mixer_out", "mixer_out_raw", "cross_attn_out", "cross_attn_out_raw"), "W_O"),
            (("shared_expert_out",), "W_out"),
        ):
            if name.base in bases:
                yield from (use.named(own) for use in self._ends(str(name), beside))
        if name.base in ("mlp_in", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "mlp_out_raw"):
            yield from self._of_mlp(name, beside)
        for base, own in (("router_logits", "W_router"), ("embed", "W_E"), ("logits", "W_U"), ("logits_raw", "W_U")):
            if name.base == base or (name.base, base) == ("mlp_in", "router_logits"):
                selector = beside.get(name.numbered(base))
                yield from (
                    ()
                    if selector is None
                    else (use.named(own) for use in self._behind(self._tensor(selector.terms[-1])))
                )

    def _of_mlp(self, name: PointName, beside: Mapping[str, Selector]) -> Iterator[_Use]:
        for out in self._ends(name.numbered("mlp_out_raw"), beside):
            reads = name.base == "mlp_post"
            yield replace(out, place=replace(out.place, name="W_out", side="reads" if reads else "writes"))
            weight = _TAKES_WEIGHT[out.op.name]
            for tensor in (t for n, t in enumerate(out.op.inputs) if n != weight):
                inner = list(self._behind(tensor))
                bent = {use.key for use in inner if use.bent}
                gated = bool(bent) and len({use.key for use in inner}) > 1
                for use in inner:
                    if name.base not in ("mlp_pre", "mlp_pre_linear") or (name.base == "mlp_pre") == (use.key in bent):
                        yield use.named("W_gate" if gated and use.key in bent else "W_in")

    def _ends(self, point: str, beside: Mapping[str, Selector]) -> Iterator[_Use]:
        """The products whose results a branch gives, whatever order the tokens of its experts have."""
        selector = beside.get(point) or beside.get(point.replace("_raw", ""))
        for tensor in () if selector is None else map(self._tensor, selector.terms):
            width = self.flow.tensors[tensor].shape[-1]  # what the experts' outputs are weighted by is no output
            behind = self._behind(tensor, _PASSING | aten.REORDERS | {"sum"})
            yield from (use for use in behind if self.flow.tensors[use.op.outputs[0]].shape[-1] == width)

    def _tensor(self, term: Term) -> int:
        if term.experts is not None:
            raise DiscoveryError(f"{term} is of each chosen expert: the experts' weights write to mlp_out.")
        calls = [call for call in self.flow.calls if call.path == term.module]
        call = calls[term.call or 0] if len(calls) > (term.call or 0) else None
        if term.operation is not None and call is not None:
            alike = [op for op in self.flow.operations if (op.call, op.name) == (call.index, term.operation)]
            for op in alike[term.occurrence or 0 :][:1]:
                return (op.inputs if term.side == "input" else op.outputs)[int(term.index or 0)]
        places = {} if call is None else call.inputs if term.side == "input" else call.outputs
        if term.operation is not None or term.index not in places:
            raise DiscoveryError(f"{term} is not in this model's dataflow: make its map anew.")
        return places[term.index]

    def shape(self, path: str) -> tuple[int, ...] | None:
        """The shape of the parameter at this path; None where it is packed."""
        return next((self.flow.tensors[t].shape for t, each in self.flow.parameters.items() if each == path), None)

    # The two directions ---------------------------------------------------------------------------------------------

    def _behind(self, tensor: int, passing: set[str] | None = None) -> Iterator[_Use]:
        """Back to the products with weights, through what treats each number by itself."""
        stack: list[tuple[int, bool, tuple[Operation, ...]]] = [(tensor, False, ())]
        seen: set[tuple[int, bool]] = set()
        while stack:
            here, bent, cuts = stack.pop()
            op = self.flow.producer(here)
            if op is None or (here, bent) in seen or (here, True) in seen:
                continue
            seen.add((here, bent))
            if op.name == "embedding":
                if (path := self.flow.parameters.get(op.inputs[0])) is not None:
                    yield _Use(WeightPlace("W_E", path, "writes"), op)
            elif op.name in _TAKES_WEIGHT:
                if (place := self._product(op, "writes")) is not None:
                    yield _Use(replace(place, cuts=cuts[::-1]), op, bent)
            elif op.name in aten.CUTS and self._cuts_features(op):
                number = op.outputs.index(here)
                stack.append((op.inputs[0], bent, (*cuts, replace(op, outputs=(number,)))))
            elif op.name in (passing or _PASSING):
                bends = bent or op.name in _BENDS
                stack += [(t, bends, cuts) for t in op.inputs if not self._is_constant(t)]

    def _cuts_features(self, op: Operation) -> bool:
        place, shape = 1 + aten.CUTS[op.name], self.flow.tensors[op.inputs[0]].shape
        axis = op.args[place] if len(op.args) > place else op.kwargs.get("dim", 0)
        whole = shape == self.flow.tensors[op.outputs[0]].shape
        return not whole and op.name not in ("select", "unbind") and axis in (-1, len(shape) - 1)

    def _reached(self, tensor: int, passing: set[str] | None = None) -> list[Operation]:
        """The products with weights that read a tensor, through views and copies alone, or reordered for experts."""
        value, found, seen = self._values.value(tensor), list[Operation](), set[int]()
        stack = [t for t in range(len(self.flow.tensors)) if self._values.value(t) == value]
        while stack:
            if (here := stack.pop()) in seen:
                continue
            seen.add(here)
            for op in self._readers.get(here, []):
                if op.name in _TAKES_WEIGHT and op.inputs[_TAKES_WEIGHT[op.name]] != here:
                    found.append(op)
                elif op.name in (passing or aten.MOVES | aten.REORDERS):
                    stack += op.outputs
        return sorted(found, key=lambda op: op.time)

    def _norm(self, tensor: int) -> Iterator[WeightPlace]:
        """The weight and bias of the norm that gives a tensor."""
        for _ in range(4):
            op = self.flow.producer(tensor)
            if op is None or op.name not in {*aten.MOVES, *aten.NORMS, "mul", "add"}:
                return
            for part in op.inputs:
                made = self.flow.producer(part)
                part = made.inputs[0] if made is not None and made.inputs and self._is_constant(part) else part
                path = self.flow.parameters.get(part)
                if path is not None and self.flow.tensors[part].shape == self.flow.tensors[op.outputs[0]].shape[-1:]:
                    yield WeightPlace("b_norm" if path.endswith("bias") else "w_norm", path, "writes")
            varying = [t for t in op.inputs if not self._is_constant(t)]
            if op.name in aten.NORMS or not varying:
                return
            tensor = varying[0]

    def _is_constant(self, tensor: int) -> bool:
        return self._values.is_constant(self._values.value(tensor))

    def _product(self, op: Operation, side: Literal["writes", "reads"]) -> WeightPlace | None:
        """The parameter that a product multiplies by; None where both are activations."""
        operand = op.inputs[_TAKES_WEIGHT[op.name]]
        if not self._is_constant(operand):
            return None
        steps: list[Operation] = []
        while (path := self.flow.parameters.get(operand)) is None:
            made = self.flow.producer(operand)
            if made is None or made.name not in aten.MOVES:
                # A quantised layer's weight is no parameter of this shape: its module says which it is.
                module = self.flow.calls[op.call].path
                return WeightPlace(module.rpartition(".")[2], f"{module}.weight", side)
            steps.append(replace(made, outputs=(made.outputs.index(operand),)))
            operand = made.inputs[0]
        biases = op.inputs[:1] if op.name == "addmm" else op.inputs[2:] if op.name == "convolution" else ()
        bias = next((self.flow.parameters[t] for t in biases if t in self.flow.parameters), None)
        name = path.removesuffix(".weight").rpartition(".")[2]
        return WeightPlace(name, path, side, tuple(steps[::-1]), conv=op.name == "convolution", bias=bias)


def _again(op: Operation, tensor: Tensor, ndim: int) -> Tensor:
    """A view that the model made of its parameter, made again. One expert's part becomes that of every expert."""
    if op.name in aten.COPIES | aten.ALIASES:
        return tensor
    if ndim == 3 and op.name == "select" and op.args[1] == 0:
        return tensor
    if ndim == 3 and op.name in ("t", "transpose", "permute"):
        return tensor.mT
    if any(isinstance(arg, TensorRef) for arg in op.args[1:]):
        raise DiscoveryError(f"{op.name} takes other tensors: this weight is no view of its parameter.")
    if op.name in ("view", "_unsafe_view", "_reshape_alias"):
        return tensor.view(op.args[1])
    made: Any = getattr(torch.ops.aten, op.name)(tensor, *op.args[1:], **op.kwargs)
    found: Tensor = made[op.outputs[0]] if isinstance(made, (list, tuple)) else made
    return found


def _cut(op: Operation, tensor: Tensor) -> Tensor:
    """The features that a cut takes out of the product's result, of the weight's last axis."""
    place = 1 + aten.CUTS[op.name]
    args = list(op.args)
    axis = args[place] if len(args) > place else op.kwargs.get("dim", 0)
    if op.name in ("select", "unbind"):
        raise DiscoveryError(f"{op.name} takes parts of a weight that are no features.")
    args[place : place + 1] = [-1]
    made: Any = getattr(torch.ops.aten, op.name)(tensor, *args[1:])
    found: Tensor = made[op.outputs[0]] if isinstance(made, (list, tuple)) else made
    return found if axis is not None else tensor


def listed(
    source: Any, found: ArchitectureMap, layers: Any, trust_remote_code: bool = False
) -> Iterator[tuple[str, str, str, str]]:
    """Name, point, path and axes with their sizes, of the weights beside the points of these layers and of the model.

    `source`: as for `hookmap.discover`; `found`: its map.
    """
    known = Weights(flow_of(source, trust_remote_code)[0])
    of_layers = [(layer, POINTS_WITH_WEIGHTS) for layer in layers_of(found, layers)]
    for layer, names in ((None, ("embed",)), *of_layers, (None, ("final_norm", "logits"))):
        there = found.model_points if layer is None else found.kind_of(layer).points
        wanted = "all" if layer is None else [layer]
        beside = {each.point: each for each in found.selectors(list(there), wanted, 0)} if there else {}
        for name in (name for name in names if name in there):
            for place in known.of(name, beside):
                shape = known.shape(place.path)
                sizes = "quantised" if shape is None else _sizes(place, shape)
                where = name if layer is None else f"{name}[{layer}]"
                yield place.name, f"{place.side} {where}", place.path, sizes


def _sizes(place: WeightPlace, shape: tuple[int, ...]) -> str:
    tensor, axes = place.view(torch.empty(shape, device="meta"))
    return "[" + ", ".join(f"{axis} {size}" for axis, size in zip(axes, tensor.shape, strict=True)) + "]"
