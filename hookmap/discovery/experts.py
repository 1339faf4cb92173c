"""Inside an MLP: mlp_post where it is dense, the router where it is a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from hookmap.discovery import aten
from hookmap.discovery.activations import before_activation
from hookmap.discovery.dataflow import Operation
from hookmap.discovery.expert_rows import EXPERTS, expert_points
from hookmap.discovery.locate import Location
from hookmap.discovery.operation_places import at_output
from hookmap.discovery.wiring import Found, Missing, Wiring, attempt
from hookmap.maps.points import POINTS
from hookmap.maps.relations import Relation, Term

ROUTER = ("router_logits", "router_indices", "router_weights", *EXPERTS)
"""the points of mixtures of experts"""
_MONOTONE = {*aten.MOVES, "_softmax", "sigmoid", "_log_softmax", "softplus", "sqrt"}
_TOP_K = Relation("router_indices", (Term(1.0, "router_logits"),), "applied", "topk")


def mlp_points(wiring: Wiring, choice: Operation | None) -> Found:
    """mlp_post of a dense MLP; router_logits, router_indices and router_weights where `choice` chooses experts."""
    return _dense(wiring) if choice is None else _mixture(wiring, choice)


def _dense(wiring: Wiring) -> Found:
    no_router = {name: POINTS[name].absent for name in ROUTER}
    raw = wiring.block.raw(wiring.branch.parts[0])
    try:
        projections = wiring.projections(wiring.tensor_of(raw))
        if len(wiring.branch.parts) > 1:
            raise Missing("the MLP branch is a sum of several modules")
        place = wiring.read_by(projections)
    except Missing as reason:
        return Found({**dict.fromkeys(("mlp_pre", "mlp_pre_linear", "mlp_post"), str(reason)), **no_router})
    before = before_activation(wiring, wiring.boundary_tensor(place))
    relations = wiring.applied(place, raw, "mlp_out_raw", "mlp_post")
    return Found({**before, "mlp_post": wiring.locator.at(place), **no_router}, relations)


def _mixture(wiring: Wiring, choice: Operation) -> Found:
    no_post = "the MLP is a mixture of experts: each token has activations in each of its experts"
    scoring = [op for _, op in wiring.back(choice.inputs[0]) if id(op) in wiring.own]
    logits = attempt(lambda: _logits(wiring, choice, scoring))
    indices = attempt(lambda: _indices(wiring, choice))
    weights = attempt(lambda: _weights(wiring, choice))
    no_post_either = dict.fromkeys(("mlp_pre", "mlp_pre_linear", "mlp_post"), no_post)
    places = {**no_post_either, "router_logits": logits, "router_indices": indices, "router_weights": weights}
    places |= expert_points(wiring, choice, indices)
    ordered = isinstance(logits, Location) and _keeps_order(wiring, choice, scoring)
    return Found(places, (_TOP_K,) if ordered else ())


def _logits(wiring: Wiring, choice: Operation, scoring: list[Operation]) -> Location:
    """The first boundary where the scores stand behind the one product; `scoring` makes them, last to first."""
    scorers = _scorers(wiring, choice, scoring)
    if len(scorers) != 1:
        raise Missing("no one product with weights gives a score to each expert")
    later = [op for op in scoring[::-1] if op.name in aten.MOVES | {"add"}]
    return _first(wiring, [op.outputs[0] for op in (*scorers, *later)], wiring.shape(choice.inputs[0])[-1])


def _scorers(wiring: Wiring, choice: Operation, scoring: list[Operation]) -> list[Operation]:
    """The products that give a score to each expert."""
    experts = wiring.shape(choice.inputs[0])[-1]
    return [op for op in scoring if op.name in aten.PRODUCTS and wiring.shape(op.outputs[0])[-1] == experts]


def _keeps_order(wiring: Wiring, choice: Operation, scoring: list[Operation]) -> bool:
    """Whether what is done to the logits before the choice keeps their order."""
    scorers = _scorers(wiring, choice, scoring)
    return {op.name for op in scoring if op is not scorers[0]} <= _MONOTONE


def _indices(wiring: Wiring, choice: Operation) -> Location:
    """The first boundary where the numbers of the chosen experts stand."""
    chosen = choice.outputs[1]
    copies = [tensor for tensor, _ in wiring.forward(chosen, aten.MOVES)]
    try:
        return _first(wiring, [chosen, *copies], wiring.shape(chosen)[-1])
    except Missing:
        found = at_output(wiring.locator, chosen, None)
        if found is None or wiring.block.seq not in wiring.shape(chosen)[:-1]:
            raise
        return found


def _first(wiring: Wiring, tensors: list[int], width: int) -> Location:
    """The first boundary of the first of these tensors that has one of this width."""
    for value in dict.fromkeys(map(wiring.block.values.value, tensors)):
        for place in wiring.locator.places(value):
            if place.shape[-1] == width:
                return wiring.locator.at(place)
    raise Missing(wiring.locator.why_nowhere(wiring.block.values.value(tensors[0])))


def _weights(wiring: Wiring, choice: Operation) -> Location:
    """The last boundary where the weights of the chosen experts stand, before any expert is multiplied by them."""
    width = wiring.shape(choice.outputs[0])[-1]
    places = [
        (op.time, place)
        for tensor, op in _weighting(wiring, choice)
        for place in wiring.locator.places(wiring.block.values.value(tensor))
        if place.shape[-1] == width
    ]
    if not places:
        raise Missing("no module hands over one weight for each chosen expert")
    return wiring.locator.at(max(places, key=lambda each: each[0])[1])


def _weighting(wiring: Wiring, choice: Operation) -> Iterator[tuple[int, Operation]]:
    """Tensors of numbers [tokens, k] made of the chosen scores, or looked up at the chosen indices."""
    values, shape = wiring.block.values, wiring.shape(choice.outputs[0])
    yield choice.outputs[0], choice
    stack, seen = list(choice.outputs), set()
    while stack:
        for op in wiring.readers.get(stack.pop(), []):
            for tensor in op.outputs[:1]:
                same = wiring.shape(tensor)[-1:] == shape[-1:] or op.name == "sum"
                if tensor in seen or op.name in aten.PRODUCTS or not same:
                    continue
                seen.add(tensor)
                stack.append(tensor)
                is_number = values.flow.tensors[tensor].dtype.is_floating_point
                if is_number and values.size(values.value(tensor)) == prod(shape):
                    yield tensor, op
