"""Inside a mixer that is no attention: its scan's input and output, and the gate of what it gives.

The way leads back from the output projection: through norms and functions of each number to the product with the gate,
on its one side to the projection that makes the gate, on the other to what the scan gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from hookmap.discovery import aten
from hookmap.discovery.dataflow import Operation
from hookmap.discovery.head_layout import features, heads_of, push
from hookmap.discovery.linear_steps import norm_source
from hookmap.discovery.locate import Location
from hookmap.discovery.mixing import is_shift
from hookmap.discovery.values import Exposure
from hookmap.discovery.wiring import Missing, Places, Wiring, attempt, is_product

SCAN = ("scan_in", "scan_out", "mixer_gate")
_PLAIN = {*aten.MOVES, *aten.POINTWISE, "alias_update", "copy"}
_NOWHERE = "the mixer's own code makes it, for one token by other operations than for a text, and no module shows it"


def scan_points(wiring: Wiring) -> Places:
    """scan_in, scan_out and mixer_gate of a mixer, or of the one of its parts that is no attention."""
    try:
        read = _read_by_projection(wiring)
        way = list(_way(wiring, read))
        gate, scanned = _factors(wiring, way[-1])
        ungated = way if scanned is None else list(_way(wiring, scanned))
        _check_scan(wiring, ungated[-1])
    except Missing as reason:
        return dict.fromkeys(SCAN, str(reason))
    places: Places = {"scan_out": attempt(lambda: _first(wiring, ungated, read))}
    places["mixer_gate"] = (
        "nothing is multiplied by a function of what the mixer reads before its output projection"
        if gate is None
        else attempt(lambda: _gate(wiring, list(_way(wiring, gate)), read))
    )
    places["scan_in"] = attempt(lambda: _entering(wiring, ungated, read))
    return places


def _read_by_projection(wiring: Wiring) -> int:
    """The value that the output projection reads."""
    parts = [part for part in wiring.branch.parts if len(wiring.branch.parts) == 1 or _looks_back(wiring, part, True)]
    if len(parts) > 1:
        raise Missing("the mixer branch is a sum of several scans")
    projections = wiring.projections(wiring.tensor_of(wiring.block.raw(parts[0]))) if parts else []
    varying = [v for op in projections for v in wiring.block.values.operands(op) if not _is_constant(wiring, v)]
    if len(projections) != 1 or len(varying) != 1:
        raise Missing("no one projection stands at the end of this mixer")
    return varying[0]


def _check_scan(wiring: Wiring, value: int) -> None:
    """What stands at the end of the way back must be what a scan gives: no projection of it, and nothing before it."""
    values = wiring.block.values
    if not _carries(wiring, values.cone(value, wiring.block.states, wiring.block.call)[0]):
        behind = _carries(wiring, wiring.branch.ops)
        raise Missing(
            "the scan is not in what the last projection reads"
            if behind
            else "no operation of this mixer is seen to carry a state along the text"
        )
    op = values.producers[value]
    if is_product(op) and _has_constant(wiring, op):
        raise Missing("another product with weights stands between the scan and the output projection")


def _carries(wiring: Wiring, ops: list[Operation]) -> bool:
    """Whether operations carry a state from position to position.

    One operator does, a loop computes one step for each position, or pieces of the text are multiplied by each other.
    """
    mixing = wiring.block.mixing(ops)
    steps = Counter(op.name for op in mixing if op.name in aten.POINTWISE)
    return (
        any(op.name in aten.RECURRENT | aten.CUMULATIVE for op in ops)
        or any(op.name in aten.BATCHED_PRODUCTS and not _has_constant(wiring, op) for op in mixing)
        or max(steps.values(), default=0) >= wiring.block.seq - 2
    )


def _has_constant(wiring: Wiring, op: Operation) -> bool:
    return any(_is_constant(wiring, each) for each in wiring.block.values.operands(op))


def has_scan(wiring: Wiring) -> bool:
    """Whether a part of the branch is no attention, and looks back."""
    return any(_looks_back(wiring, part, True) for part in wiring.branch.parts)


def _looks_back(wiring: Wiring, value: int, without_attention: bool = False) -> bool:
    """Whether a value is made by a scan or a convolution: more than a shift of positions."""
    ops, _ = wiring.block.values.cone(value, wiring.block.states, wiring.block.call)
    if without_attention and any(op.name in aten.SOFTMAXES or aten.is_fused_attention(op.name) for op in ops):
        return False
    decays = any(op.name in aten.DECAYS for op in ops)
    return decays or not all(map(is_shift, wiring.block.mixing(ops)))


def _way(wiring: Wiring, value: int) -> Iterator[int]:
    """Back from a value to what it is computed from alone: through norms, casts, and functions of each number."""
    values = wiring.block.values
    seen: set[int] = set()
    while value not in seen and values.made_in(value, wiring.block.call):
        seen.add(value)
        yield value
        if (source := norm_source(values, value)) is not None:
            value = source
            continue
        op = values.producers[value]
        varying = {v for v in values.operands(op) if not _is_constant(wiring, v)}
        if op.name not in _PLAIN or len(varying) != 1:
            return
        (value,) = varying


def _factors(wiring: Wiring, value: int) -> tuple[int | None, int | None]:
    """The gate and what it is multiplied by: of two factors that a value is the product of, the one that is no scan."""
    op = wiring.block.values.producers[value]
    sides = wiring.block.values.operands(op)
    if op.name != "mul" or len({*sides}) != 2 or any(_is_constant(wiring, side) for side in sides):
        return None, None
    back = [_looks_back(wiring, side) for side in sides]
    if back not in ([True, False], [False, True]):
        raise Missing("which of two factors is the scan's output is not to be told: both look back, or neither does")
    return (sides[1], sides[0]) if back[0] else (sides[0], sides[1])


def _first(wiring: Wiring, way: list[int], read: int) -> Location:
    """The first boundary where one of these values stands, from the last of the way on, with all of its features."""
    for value in way[::-1]:
        for place in _places(wiring, value):
            if wiring.block.values.size(value) == wiring.block.values.size(read):
                return _at(wiring, place)
    raise Missing(_NOWHERE)


def _gate(wiring: Wiring, way: list[int], read: int) -> Location:
    """The gate at a boundary, or as features of what a projection gives."""
    try:
        return _first(wiring, way, read)
    except Missing:
        values = wiring.block.values
        number = max(n for n, value in enumerate(way) if values.size(value) == values.size(read))
        tensor = wiring.tensor_of(way[number])
        place = wiring.written_by(tensor)
        source = wiring.boundary_tensor(place)
        labels = push(values, wiring.block.call, source, features(wiring.shape(source)), tensor)
        axes = _axes(wiring, wiring.shape(tensor), way[number])
        plain = all(values.producers[value].name in aten.MOVES | aten.PRODUCTS for value in way[number:])
        if (
            labels is None
            or not plain
            or axes not in ((), ("batch", "d_inner", "pos"))
            or len(wiring.shape(tensor)) != 3
        ):
            raise
        (last,) = labels.map(lambda each: each.movedim(1, 2) if axes else each)
        heads = heads_of(last, place.shape[-1])
        if heads is None or place.shape[:2] != (1, wiring.block.seq):
            raise
        return wiring.locator.at(place).with_terms(heads=heads)


def _entering(wiring: Wiring, way: list[int], read: int) -> Location:
    """The one tensor of all features that enters the module which gives the scan's output."""
    mixing = wiring.block.mixing(wiring.branch.ops)
    for place in _places(wiring, way[-1]):
        call = place.call
        inside = [op for op in mixing if call.enter < op.time < call.exit]
        if place.side == "output" and inside:
            entered = {t: p for p, t in call.inputs.items()}
            whole = [t for t in entered if wiring.shape(t) == place.shape]
            if len(whole) == 1:
                return _at(wiring, Exposure(call, "input", entered[whole[0]], place.shape))
    raise Missing(_NOWHERE)


def _places(wiring: Wiring, value: int) -> list[Exposure]:
    """The boundaries of modules of this layer where a value stands, in the order of the pass."""
    block = wiring.block
    return [
        each
        for each in block.values.exposures.get(value, [])
        if block.call.enter < each.call.enter
        and each.call.exit < block.call.exit
        and wiring.locator.is_of_one_layer(each.call)
        and _axes(wiring, each.shape, value) is not None
    ]


def _at(wiring: Wiring, place: Exposure) -> Location:
    value = wiring.block.values.value(wiring.boundary_tensor(place))
    axes = _axes(wiring, place.shape, value)
    found = wiring.locator.at(place)
    return found if not axes else found.with_terms(axes=axes, flat=False)


def _axes(wiring: Wiring, shape: tuple[int, ...], value: int) -> tuple[str, ...] | None:
    """The axes, () where they are the usual ones; None where positions cannot be told."""
    seq = wiring.block.seq
    if shape[:2] == (1, seq) or (len(shape) == 2 and shape[0] == seq):
        return ()
    if len(shape) == 3 and shape[0] == 1 and shape[2] == seq:
        return ("batch", "d_inner", "pos")
    if len(shape) == 4 and shape[0] == 1 and shape[2] == seq:
        return ("batch", "heads", "pos", "d_head")
    if len(shape) == 2 and shape[0] % seq == 0:
        values = wiring.block.values
        whole = (1, seq, shape[0] // seq, shape[1])
        same = (t for t, info in enumerate(values.flow.tensors) if info.shape == whole)
        return ("batch*pos*heads", "d_head") if any(values.value(t) == value for t in same) else None
    return None


def _is_constant(wiring: Wiring, value: int) -> bool:
    return wiring.block.values.is_constant(value)
