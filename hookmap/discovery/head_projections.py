"""The weights before and behind an attention's heads: what is compressed before them, and each head's rows behind."""

from __future__ import annotations

from hookmap.discovery import aten
from hookmap.discovery.dataflow import Operation
from hookmap.discovery.locate import Location
from hookmap.discovery.operation_places import at_output
from hookmap.discovery.wiring import Missing, Wiring, is_product
from hookmap.maps.points import POINTS


def is_expanded(wiring: Wiring, tensor: int) -> bool:
    """Whether the projection reads another projection's output, as in multi-head latent attention."""
    return bool(_compressed(wiring, tensor))


def _compressed(wiring: Wiring, tensor: int) -> list[int]:
    """The tensors that the projections behind a tensor read, if a projection of this branch makes them."""
    found, beside = [], _beside(wiring, tensor)
    for read in (t for op in wiring.projections(tensor) if op.time not in beside for t in op.inputs):
        behind = [op for _, op in wiring.back(read) if is_product(op) and id(op) in wiring.own]
        if any(op.name != "convolution" or wiring.shape(op.inputs[1])[-1] == 1 for op in behind):
            found.append(read)
    return found


def _beside(wiring: Wiring, tensor: int) -> set[int]:
    """The times of projections added to another whose input theirs are compressed from: low-rank adapters (LoRA)."""
    found: set[int] = set()
    for _, addition in wiring.back(tensor):
        if addition.name not in aten.ADDITIONS:
            continue
        sides = [{op.time: op for op in wiring.projections(t)} for t in addition.inputs]
        for own, other in ((a, b) for a in sides for b in sides if a and b and not a.keys() & b.keys()):
            read = {wiring.block.values.value(t) for op in other.values() for t in op.inputs}
            for time, op in own.items():
                behind = [each for t in op.inputs for _, each in wiring.back(t) if is_product(each)]
                if any(wiring.block.values.value(t) in read for each in behind for t in each.inputs):
                    found.add(time)
    return found


def latent(wiring: Wiring, tensor: int, name: str) -> Location:
    """What the one projection behind queries or values reads, where its own module projects that, too."""
    try:
        found = list(dict.fromkeys(map(wiring.block.values.value, _compressed(wiring, tensor))))
        found = [value for value in found if _is_made_beside(wiring, value, tensor)]
    except Missing:
        found = []
    if len(found) != 1:
        raise Missing(POINTS[name].absent)
    tensor = wiring.tensor_of(found[0])
    if len(wiring.shape(tensor)) > 3:
        raise Missing("the model makes it with an axis of its own beside batch and positions")
    places = [place for place in wiring.locator.places(found[0]) if place.shape == wiring.shape(tensor)]
    outputs = [place for place in places if place.side == "output"]
    if not places and wiring.block.seq in wiring.shape(tensor)[:-1]:
        made = at_output(wiring.locator, tensor, None)
        if made is not None:
            return made
    if not places:
        raise Missing(wiring.locator.why_nowhere(found[0]))
    # Of a cache, the projection may read more than these tokens'.
    return wiring.locator.at(outputs[0]) if outputs else wiring.locator.at(places[0]).with_terms(rows="last")


def _is_made_beside(wiring: Wiring, value: int, tensor: int) -> bool:
    """Whether the module of the block in which a tensor is projected makes the value; what the mixer reads it does not.

    A mixture of several streams before the mixer (hyper-connections) is a product, too.
    """
    calls, block = wiring.block.values.flow.calls, wiring.block.call

    def branch_of(op: Operation) -> int:
        index = op.call
        while index >= 0 and index != block.index and (parent := calls[index].parent) not in (None, block.index):
            index = parent
        return index

    own = {branch_of(op) for op in wiring.projections(tensor)}
    op = wiring.block.values.producers.get(value)
    return op is not None and branch_of(op) in own


def result(wiring: Wiring, projections: list[Operation], z: Location | str) -> Location:
    """z through each head's rows of the output projection. `projections`: those that read the heads' outputs."""
    if isinstance(z, str):
        raise Missing(f"z is unavailable: {z}")
    (op,) = projections
    weight = op.inputs[2 if op.name == "addmm" else 1]
    flow, turned = wiring.block.values.flow, False
    while (path := flow.parameters.get(weight)) is None:
        made = flow.producer(weight)
        if made is None or made.name not in (*aten.TURNS, *aten.ALIASES):
            raise Missing("the weights of the output projection are packed, or no parameter as it is")
        turned ^= made.name in aten.TURNS
        weight = made.inputs[0]
    if op.name not in ("mm", "addmm") or len(flow.tensors[weight].shape) != 2:
        raise Missing(f"the output projection is a {op.name}, which has no rows for each head")
    return z.with_terms(through=wiring.locator.templated(path) + (".T" if turned else ""))
