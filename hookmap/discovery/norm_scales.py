"""What a norm multiplies the stream by, one number for each token: an operation in the norm's own forward."""

from __future__ import annotations

from hookmap.discovery import aten
from hookmap.discovery.locate import Location, Locator
from hookmap.discovery.operation_places import at_output

_ON_THE_WAY = aten.MOVES | {"mul", "add", "_to_copy"}
_FACTORS = {"native_layer_norm": 2, "_fused_rms_norm": 1}
"""norms in one operation -> which of its results is the factor"""
NO_NORM = "no norm of its own stands before it"
_DIVIDES = "the norm does not multiply by one number for each token"


def scale_of(locator: Locator, value: int) -> Location | str:
    """The factor of the norm that gives a value, or why there is none."""
    values = locator.values
    op = values.producers.get(value)
    tensor = op.outputs[0] if op is not None else None
    for _ in range(9):
        op = None if tensor is None else values.flow.producer(tensor)
        if op is None or tensor is None:
            return _DIVIDES
        if (index := _FACTORS.get(op.name)) is not None and len(op.outputs) > index:
            return (_of_tokens(locator, op.outputs[index]) and at_output(locator, op.outputs[index], None)) or _DIVIDES
        if op.name not in _ON_THE_WAY:
            return _DIVIDES
        for part in op.inputs:
            if (factor := _factor(locator, part)) is not None:
                return factor
        varying = [t for t in op.inputs if not values.is_constant(values.value(t))]
        tensor = varying[0] if varying else None
    return _DIVIDES


def _factor(locator: Locator, tensor: int) -> Location | None:
    """The tensor, if it is one number for each token that a reciprocal root gives, through views and casts."""
    while (op := locator.values.flow.producer(tensor)) is not None and op.name in aten.MOVES:
        tensor = op.inputs[0]
    if op is None or op.name != "rsqrt" or not _of_tokens(locator, tensor):
        return None
    return at_output(locator, tensor, None)


def _of_tokens(locator: Locator, tensor: int) -> bool:
    return locator.values.flow.tensors[tensor].shape[-2:] == (locator.seq, 1)
