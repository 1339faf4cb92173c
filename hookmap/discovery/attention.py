"""Inside an attention: q, k, v, z and pattern.

An attention is told by its shape: a softmax over positions between two products of activations. From there the way
leads back to the projections that made the queries, keys and values, and on to the one that reads the heads' outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from torch import Tensor

from hookmap.discovery import aten
from hookmap.discovery.dataflow import Operation
from hookmap.discovery.head_layout import features, heads_of, push
from hookmap.discovery.head_projections import is_expanded, latent, result
from hookmap.discovery.locate import Location
from hookmap.discovery.operation_places import at_input, at_output
from hookmap.discovery.values import Exposure
from hookmap.discovery.wiring import Found, Missing, Places, Wiring, attempt
from hookmap.maps.reading import BY_DATAFLOW
from hookmap.maps.relations import Relation, Term
from hookmap.maps.templates import Heads, TermTemplate

ATTENTION = ("q_latent", "k_latent", "q", "k", "v", "q_rot", "k_rot", "attn_scores", "pattern", "z", "attn_result")
_ON_SCORES = {
    *aten.MOVES, "maximum", "minimum", "clamp", "clamp_min", "add", "sub", "mul", "div", "tanh", "where", "masked_fill",
    "alias_update", "cat", "sigmoid",
}  # fmt: skip
_AFTER_SOFTMAX = {*aten.MOVES, "add", "mul", "masked_fill", "where", "nan_to_num"}


@dataclass(frozen=True)
class _Core:
    """One attention: the tensors that its two products read, and what they give."""

    query: int
    key: int
    value: int
    pattern: int | None
    """the weights as the second product reads them; None where one fused operation computes them"""
    result: int
    softmax: Operation | None = None
    product: Operation | None = None
    """of queries and keys"""


def attention_points(wiring: Wiring) -> Found:
    """q, k, v, z and pattern of a mixer."""
    try:
        core = _core(wiring)
    except Missing as reason:
        return Found(dict.fromkeys(ATTENTION, str(reason)))
    places: Places = {
        "q": attempt(partial(_operand, wiring, core.query, "q")),
        "k": attempt(partial(_operand, wiring, core.key, "k")),
        "v": attempt(partial(_operand, wiring, core.value, "v")),
        "z": attempt(partial(_heads_out, wiring, core)),
        "pattern": attempt(partial(_pattern, wiring, core)),
        "attn_scores": attempt(partial(_scores, wiring, core)),
    }
    places |= {
        "q_latent": attempt(partial(latent, wiring, core.query, "q_latent")),
        "k_latent": attempt(partial(latent, wiring, core.value, "k_latent")),
        "attn_result": attempt(lambda: result(wiring, _output_projections(wiring, core.result), places["z"])),
    }
    places |= {name: attempt(partial(_as_read, wiring, core, name, places[name[0]])) for name in ("q_rot", "k_rot")}
    return Found(places, tuple(_relations(wiring, core, places)))


def _relations(wiring: Wiring, core: _Core, places: Places) -> Iterator[Relation]:
    plain = _only_views_before(wiring, core.value) and _only_views_behind(wiring, core.result)
    if plain and not any(isinstance(places[name], str) for name in ("z", "pattern", "v")):
        yield Relation("z", (Term(1.0, "pattern"), Term(1.0, "v")), "product")
    if not isinstance(places["z"], str) and len(wiring.branch.parts) == 1:
        raw = wiring.block.raw(wiring.branch.parts[0])
        yield from wiring.applied(_reader_of_heads(wiring, core), raw, "mixer_out_raw", "z")


# The two products -----------------------------------------------------------------------------------------------


def _core(wiring: Wiring) -> _Core:
    cores = {core.result: core for op in wiring.branch.ops for core in _cores_of(wiring, op)}
    if not cores:
        raise Missing("no softmax over positions stands between two products in this block's mixer")
    if len(cores) > 1:
        raise Missing(f"this block's mixer has {len(cores)} attentions")
    return next(iter(cores.values()))


def _cores_of(wiring: Wiring, op: Operation) -> Iterator[_Core]:
    """The attentions whose weights one operation computes."""
    if aten.is_fused_attention(op.name):
        query, key, value = op.inputs[:3]
        yield _Core(query, key, value, None, op.outputs[0])
    seq = wiring.block.seq
    if op.name not in aten.SOFTMAXES or wiring.shape(op.outputs[0])[-2:-1] != (seq,):
        return
    for pattern, product in wiring.forward(op.outputs[0], _AFTER_SOFTMAX):
        square = wiring.shape(pattern)[-2:] == (seq, seq)
        if product.name == "bmm" and product.inputs[0] == pattern and square:
            scores = _product_of_scores(wiring, op.inputs[0])
            if scores is not None:
                query, key = scores.inputs[-2:]
                yield _Core(query, key, product.inputs[1], pattern, product.outputs[0], op, scores)


def _product_of_scores(wiring: Wiring, scores: int) -> Operation | None:
    """The one product that the scores come from, of queries [heads, pos, d] and keys [heads, d, pos].

    A mask that is computed from the tokens (an index of the keys worth reading) is no part of the scores.
    """
    products = {}
    stack, seen = [scores], set()
    while stack:
        here = stack.pop()
        op = wiring.block.values.flow.producer(here)
        if here in seen or op is None or id(op) not in wiring.inside:
            continue
        seen.add(here)
        if _is_batched_product(op) and id(op) in wiring.own:
            products[op.time] = op
        elif op.name in _ON_SCORES:
            stack += op.inputs
    if len(products) != 1:
        return None
    (product,) = products.values()
    return product if wiring.shape(product.outputs[0])[-2:] == (wiring.block.seq,) * 2 else None


def _is_batched_product(op: Operation) -> bool:
    return op.name in aten.BATCHED_PRODUCTS


# q, k, v --------------------------------------------------------------------------------------------------------


def _operand(wiring: Wiring, tensor: int, name: str) -> Location:
    """Back from a product's operand to the projection, and which of its features belong to which head."""
    block = wiring.block
    place = wiring.written_by(tensor)
    source = wiring.boundary_tensor(place)
    labels = push(block.values, block.call, source, features(wiring.shape(source)), tensor)
    heads = None
    if labels is not None:
        across = name == "k" and _are_keys_across(wiring, tensor)
        (first,) = labels.map(partial(_heads_first, across=across))
        heads = heads_of(first, place.shape[-1])
    if heads is None:
        raise Missing("its heads are no even slices of the projection's output")
    # While generating, all keys and values so far are expanded again from a cache of compressed ones.
    rows = {"rows": "last"} if name != "q" and is_expanded(wiring, tensor) else {}
    return _with_heads(wiring, place, heads, **rows)


def _are_keys_across(wiring: Wiring, tensor: int) -> bool:
    """Whether the keys are [heads, d_head, pos], as a product of matrices reads them."""
    op = next(iter(wiring.readers.get(tensor, [])), None)
    return op is not None and _is_batched_product(op)


def _heads_first(tensor: Tensor, across: bool) -> Tensor:
    """[..., pos, d_head], or where `across` [..., d_head, pos] -> [heads, pos, d_head]."""
    moved = tensor.transpose(-1, -2) if across else tensor
    return moved.reshape(-1, *moved.shape[-2:])


def _with_heads(wiring: Wiring, place: Exposure, heads: Heads, **update: object) -> Location:
    shape = place.shape
    if len(shape) > 3:
        if shape[-2] != wiring.block.seq or set(shape[:-2]) != {1}:
            raise Missing("the projection's output has axes of its own")
        update["axes"] = None  # the selector merges what stands before the positions
    return wiring.locator.at(place).with_terms(heads=heads, **update)


# z and pattern --------------------------------------------------------------------------------------------------


def _heads_out(wiring: Wiring, core: _Core) -> Location:
    """On from the second product to the projection that reads the heads side by side."""
    place = _reader_of_heads(wiring, core)
    *heads, _, size = shape = wiring.shape(core.result)
    width = prod(heads) * size
    labels = features((width,)).view(*heads, 1, size).expand(shape)
    target = wiring.boundary_tensor(place)
    seen = push(wiring.block.values, wiring.block.call, core.result, labels, target)
    side_by_side = features((width,))
    if (
        seen is None
        or wiring.shape(target)[-1] != width
        or not all((side == side_by_side).all() for side in (seen.low, seen.high))
    ):
        raise Missing("the output projection does not read the heads side by side")
    return _with_heads(wiring, place, Heads(stop=width, d_head=size))


def _reader_of_heads(wiring: Wiring, core: _Core) -> Exposure:
    """The input of the module that applies the output projection."""
    projections = _output_projections(wiring, core.result)
    if len(projections) != 1:
        raise Missing("no one projection reads the heads' outputs")
    return wiring.read_by(projections)


def _output_projections(wiring: Wiring, tensor: int) -> list[Operation]:
    """The first products with weights behind a tensor, whatever is done to each number on the way."""
    found = {}
    stack, seen = [tensor], set()
    while stack:
        for op in wiring.readers.get(stack.pop(), []):
            if op.name in aten.PRODUCTS:
                found[op.time] = op
            elif id(op) not in seen and (op.name in aten.MOVES or id(op) in wiring.own):
                seen.add(id(op))
                stack += op.outputs
    return [found[time] for time in sorted(found)]


def _pattern(wiring: Wiring, core: _Core) -> Location:
    """Where the attention weights stand at a module boundary, as they are or as a copy."""
    if core.pattern is None:
        raise Missing("one fused operation computes the attention: load the model with eager attention")
    if wiring.locator.rows != "all":
        raise Missing("the model adds positions of its own, which are keys too")
    copies = [core.pattern, *(t for t, op in wiring.back(core.pattern) if op.name in aten.MOVES | {"_softmax"})]
    for value in dict.fromkeys(map(wiring.block.values.value, copies)):
        places = [place for place in wiring.locator.places(value) if _is_of_pairs(wiring, place)]
        if places:
            # Of the modules inside the block the outermost one; the block itself only where there is no other.
            outermost = min(places, key=lambda p: (p.call is wiring.block.call, p.call.path.count("."), p.time))
            found = wiring.locator.at(outermost).with_terms(axes=("batch", "heads", "pos", "key"), flat=False)
            return replace(found, write=_written(wiring, core))
    if (term := _written(wiring, core)) is not None:
        return Location((term,), core.softmax.time if core.softmax else 0, BY_DATAFLOW)
    raise Missing("no module boundary exposes the attention weights")


_PAIRS = ("batch", "heads", "pos", "key")
_FUSED = "one fused operation computes the attention: load the model with eager attention"


def _written(wiring: Wiring, core: _Core) -> TermTemplate | None:
    """Where the weights are written: as softmax gives them, if the second product reads them so."""
    op = core.softmax
    if op is None or core.pattern is None or wiring.locator.rows != "all":
        return None
    tensor = core.pattern
    while (made := wiring.block.values.flow.producer(tensor)) is not None and made is not op:
        if made.name not in aten.MOVES:
            return None
        tensor = made.inputs[0]
    try:
        axes = _axes_of_pairs(wiring, op.outputs[0])
    except Missing:  # more than the weights of the keys
        return None
    found = at_output(wiring.locator, op.outputs[0], axes) if made is op else None
    return None if found is None else found.terms[0]


def _axes_of_pairs(wiring: Wiring, tensor: int) -> tuple[str, ...]:
    """The axes of scores or weights. Raises Missing where they are no pairs of positions."""
    shape = wiring.shape(tensor)
    if shape[-2:] != (wiring.block.seq,) * 2:
        raise Missing("softmax reads more than the scores of the keys: a sink, or keys of no token")
    if len(shape) == 4 and shape[0] == 1:
        return _PAIRS
    if len(shape) == 3:
        return ("batch*heads", "pos", "key")
    raise Missing(f"the scores have axes of their own, {list(shape)}")


def _scores(wiring: Wiring, core: _Core) -> Location:
    """What softmax reads."""
    if core.softmax is None:
        raise Missing(_FUSED)
    if wiring.locator.rows != "all":
        raise Missing("the model adds positions of its own, which are keys too")
    found = at_input(wiring.locator, core.softmax, 0, _axes_of_pairs(wiring, core.softmax.inputs[0]))
    if found is None:
        raise Missing("the softmax runs in a module that several layers share")
    return found


def _as_read(wiring: Wiring, core: _Core, name: str, projected: Location | str) -> Location:
    """Queries or keys as the product of the scores reads them: back from it, through views, to what computes them."""
    if core.softmax is None:
        raise Missing(_FUSED)
    flow, values = wiring.block.values.flow, wiring.block.values
    tensor, size = core.query if name == "q_rot" else core.key, wiring.shape(core.query)[-1]
    seen = [tensor]
    while (op := flow.producer(tensor)) is not None and id(op) in wiring.inside:
        full = [t for t in op.inputs if 0 not in wiring.shape(t)]  # a cache is empty yet
        if op.name not in aten.MOVES and not (op.name == "cat" and len(full) == 1):
            break
        tensor = full[0]
        seen.append(tensor)
    else:
        raise Missing("they are computed before this block, and enter it beside the stream")
    if isinstance(projected, Location) and (
        values.value(tensor) in _values_at(wiring, projected) or op.name in aten.PRODUCTS
    ):
        return projected  # nothing is done to what the projection gives
    for place in wiring.locator.places(values.value(tensor)):
        axes = _axes_of_heads(wiring, tensor, size)
        if place.side == "output" and place.shape == wiring.shape(tensor) and axes is not None:
            return wiring.locator.at(place).with_terms(axes=axes, flat=False)
    for here in seen[::-1]:  # the first of its views that has heads, and places for these tokens alone
        axes = _axes_of_heads(wiring, here, size)
        joins = getattr(flow.producer(here), "name", "") == "cat"
        if axes is None or (joins and _caches_early(wiring, core)):
            continue
        if (found := at_output(wiring.locator, here, axes)) is not None:
            return found
    return _operand_of_scores(wiring, core, name)


def _caches_early(wiring: Wiring, core: _Core) -> bool:
    """Whether a cache may join its entries before keys and values are made: of latent ones they are made anew."""
    try:
        return any(is_expanded(wiring, tensor) for tensor in (core.key, core.value))
    except Missing:
        return True


def _operand_of_scores(wiring: Wiring, core: _Core, name: str) -> Location:
    """What the product itself reads; the keys with those of a cache, of which the last ones are the tokens'."""
    assert core.product is not None
    number = len(core.product.inputs) - (2 if name == "q_rot" else 1)
    axes = ("batch*heads", "pos", "d_head") if name == "q_rot" else ("batch*heads", "d_head", "pos")
    found = at_input(wiring.locator, core.product, number, axes)
    if found is None:
        raise Missing("the product of the scores runs in a module that several layers share")
    return found if name == "q_rot" else found.with_terms(rows="last")


def _values_at(wiring: Wiring, place: Location) -> set[int]:
    """The values at the boundary of a location."""
    paths = {term.module for term in place.terms}
    calls = [c for c in wiring.block.values.flow.calls if wiring.locator.templated(c.path) in paths]
    inside = [c for c in calls if wiring.block.call.enter <= c.enter and c.exit <= wiring.block.call.exit]
    return {wiring.block.values.value(t) for c in inside for t in c.outputs.values()}


def _axes_of_heads(wiring: Wiring, tensor: int, size: int) -> tuple[str, ...] | None:
    """The axes of [1, heads, pos, d_head], [1, pos, heads, d_head] or [heads, pos, d_head]; None of another shape."""
    shape, seq = wiring.shape(tensor), wiring.block.seq
    if len(shape) == 4 and shape[0] == 1 and shape[-1] == size and seq in shape[1:3]:
        return ("batch", "heads", "pos", "d_head") if shape[2] == seq else ("batch", "pos", "heads", "d_head")
    if len(shape) == 3 and shape[1] == seq and shape[2] == size:
        return ("batch*heads", "pos", "d_head")
    return None


def _is_of_pairs(wiring: Wiring, place: Exposure) -> bool:
    """Whether the tensor is [batch, heads, pos, key]."""
    return len(place.shape) == 4 and place.shape[-2:] == (wiring.block.seq,) * 2


def _only_views_before(wiring: Wiring, tensor: int) -> bool:
    """Whether a tensor is its projection's output as it is: a bias that is added behind the module makes another."""
    try:
        written = wiring.written_by(tensor).time
    except Missing:
        return False
    plain = aten.MOVES | aten.PRODUCTS
    return all(op.name in plain or (op.name == "add" and op.time < written) for _, op in wiring.back(tensor))


def _only_views_behind(wiring: Wiring, tensor: int) -> bool:
    """Whether only projections read a tensor, as it is."""
    return {op.name for _, op in wiring.forward(tensor, aten.MOVES)} <= aten.PRODUCTS
