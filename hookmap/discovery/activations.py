"""Inside a dense MLP: what the activation function reads, and what its result is multiplied by."""

from __future__ import annotations

from collections.abc import Iterator

from hookmap.discovery import aten
from hookmap.discovery.locate import Location
from hookmap.discovery.operation_places import at_output, before_casts
from hookmap.discovery.wiring import Missing, Places, Wiring, attempt, is_product
from hookmap.maps.points import NOT_GATED

BENDS = {
    "silu", "gelu", "relu", "sigmoid", "tanh", "pow", "clamp", "clamp_min", "leaky_relu", "softplus", "exp", "where",
    "elu", "mish", "hardswish", "hardsigmoid", "abs", "minimum", "maximum",
}  # fmt: skip
"""operators that are no linear function"""
_SUMS = {"add", "sub"}


def before_activation(wiring: Wiring, post: int) -> Places:
    """mlp_pre and mlp_pre_linear of the tensor that the down projection reads."""
    arms = dict.fromkeys(_arms(wiring, post))
    bent = [tensor for tensor, is_bent in arms if is_bent]
    if any(_is_bent_before(wiring, tensor) for tensor in bent):
        reason = "what the activation function reads is no linear function of what this MLP reads"
        return dict.fromkeys(("mlp_pre", "mlp_pre_linear"), reason)
    plain = [tensor for tensor, is_bent in arms if not is_bent]
    return {
        "mlp_pre": attempt(lambda: _only(wiring, bent, "activation function")),
        "mlp_pre_linear": NOT_GATED
        if not plain
        else attempt(lambda: _only(wiring, plain, "product behind the activation function")),
    }


def _is_bent_before(wiring: Wiring, tensor: int) -> bool:
    """Whether what is projected to a tensor comes from the stream only through another projection and what bends."""
    products = [op for _, op in wiring.back(tensor) if is_product(op) and id(op) in wiring.own]
    return any(_is_bent(wiring, read) for op in products for read in op.inputs)


def _is_bent(wiring: Wiring, tensor: int) -> bool:
    value, stream = wiring.block.values.value, {*wiring.block.states}
    ops = [op for _, op in wiring.back(tensor) if id(op) in wiring.own]
    read = (tensor, *(each for op in ops if not is_product(op) for each in op.inputs))
    if any(value(each) in stream for each in read):  # a gate of hyper-connections bends, and multiplies the stream
        return False
    return any(map(is_product, ops)) and any(op.name in BENDS for op in ops)


def _only(wiring: Wiring, tensors: list[int], what: str) -> Location:
    if len(tensors) != 1:
        raise Missing(f"{len(tensors) or 'no'} tensors of this MLP are read by the {what}")
    (tensor,) = tensors
    shape = wiring.shape(tensor)
    for alike in before_casts(wiring.locator, tensor):
        for place in wiring.locator.places(wiring.block.values.value(alike)):
            if place.shape[-1] == shape[-1]:
                return wiring.locator.at(place)
        found = at_output(wiring.locator, alike, None)
        if found is not None and wiring.block.seq in shape[:-1]:
            return found
    raise Missing("the operation that makes it does not run in the same way for every text")


def _arms(wiring: Wiring, post: int) -> Iterator[tuple[int, bool]]:
    """The tensors in which the products' results come to something else than views and a bias, and if that bends."""
    on_way: set[int] = set()
    products: dict[int, int] = {}
    stack, seen = [post], set[int]()
    while stack:
        here = stack.pop()
        op = wiring.block.values.flow.producer(here)
        if here in seen or op is None or id(op) not in wiring.inside:
            continue
        seen.add(here)
        on_way.add(id(op))
        if is_product(op):
            products[op.time] = op.outputs[0]
        elif op.name in aten.LIGHT:
            stack += [t for t in op.inputs if not wiring.block.values.is_constant(wiring.block.values.value(t))]
    for start in products.values():
        yield from _ends(wiring, start, on_way, seen | {post})


def _ends(wiring: Wiring, tensor: int, on_way: set[int], seen: set[int]) -> Iterator[tuple[int, bool]]:
    readers = [op for op in wiring.readers.get(tensor, []) if id(op) in on_way]
    plain = len(readers) == 1 and not is_product(readers[0]) and readers[0].name in aten.MOVES | _SUMS
    parts = len(readers) > 1 and all(op.name in aten.CUTS for op in readers)  # two products in one tensor
    if not (plain or parts):
        bends = len(readers) > 1 or any(op.name in BENDS for op in readers)
        if readers and not any(map(is_product, readers)):
            yield tensor, bends
        return
    for output in (output for op in readers for output in op.outputs if output in seen):
        yield from _ends(wiring, output, on_way, seen)
