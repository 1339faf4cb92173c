"""Which operations of a branch move information between positions.

Follows which span of the sequence each tensor is: a piece (a slice, one position of a loop) begins where it was cut
out. Pieces that are joined again in their old places mix nothing, and neither does a computation with tensors of the
same span. Everything else mixes positions: also a piece that is computed with a longer one, as for all its positions.
"""

from __future__ import annotations

from typing import Any

import torch

from hookmap.discovery import aten
from hookmap.discovery.dataflow import Operation, TensorRef
from hookmap.discovery.values import Values

_Span = tuple[int, int]
"""where along the sequence a tensor begins, and how many positions it has"""


def mixing(values: Values, ops: list[Operation], seq: int) -> list[Operation]:
    """Those of `ops` that do not compute each of the `seq` positions alone, in their order."""
    whole = (0, seq)
    spans: dict[int, _Span | None] = {}
    found: list[Operation] = []
    last: int | None = None
    longer: set[int] = set()
    for op in sorted(ops, key=lambda op: op.time):
        if not op.outputs or not _is_number(values.flow.tensors[op.outputs[0]].dtype):
            continue
        given = [
            _of_constant(values, value, seq)
            if values.is_constant(value)
            else spans.get(value, whole if seq in values.shape(value) else None)
            for value in values.operands(op)
        ]
        results = _results(values, op, given, seq)
        longer |= _lengthened(values, op, seq)
        if results is None or _treats(values, op, seq) or _contracts(values, op, longer):
            found.append(op)
            results = [whole for _ in op.outputs]
        spans.update({values.value(tensor): span for tensor, span in zip(op.outputs, results, strict=True)})
        last = None if results[0] in (None, whole) else op.outputs[0]
    return found + [op for op in ops if last in op.outputs]


def is_shift(op: Operation) -> bool:
    """Whether an operation that mixes positions only shifts the sequence, as a token shift does."""
    return op.name in aten.SHIFTS


def _results(values: Values, op: Operation, given: list[_Span | None], seq: int) -> list[_Span | None] | None:
    """The span of each output; None where the operation combines different positions."""
    count, whole = len(op.outputs), (0, seq)
    present = {span for span in given if span is not None}
    if not present or op.name in aten.REORDERS:
        return [None] * count
    if op.name == "alias_update":
        return [whole]
    if op.name in aten.CUTS and given[0] == whole and _length(values, op, _axis(op)) == seq:
        return _cut(values, op)
    if op.name in aten.JOINS:
        return _joined(values, op, given, seq)
    if op.name == "constant_pad_nd":
        return [whole] if whole in present and not _moves(values, op, seq) else None
    return [next(iter(present))] * count if len(present) == 1 else None


def _of_constant(values: Values, value: int, seq: int) -> _Span | None:
    """The span of a piece of a new tensor. A piece of the sequence may be written to it."""
    op = values.producers.get(value)
    if op is None or op.name not in aten.CUTS or _length(values, op, _axis(op)) != seq:
        return None
    return dict(zip(map(values.value, op.outputs), _cut(values, op), strict=True))[value]


def _axis(op: Operation) -> int:
    """The axis that an operation cuts or joins along: the first, where its arguments do not say."""
    place = 1 + aten.CUTS.get(op.name, 0)
    axis = op.args[place] if len(op.args) > place else op.kwargs.get("dim", 0)
    return axis if isinstance(axis, int) else 0


def _length(values: Values, op: Operation, axis: int) -> int:
    return values.flow.tensors[op.inputs[0]].shape[axis]


def _cut(values: Values, op: Operation) -> list[_Span | None]:
    axis, start = _axis(op), 0
    shapes = [values.flow.tensors[tensor].shape for tensor in op.outputs]
    lengths = [1 if op.name in ("select", "unbind") else shape[axis] for shape in shapes]
    if op.name in ("slice", "select"):
        first: Any = op.args[2] if len(op.args) > 2 else 0
        begin = first + _length(values, op, axis) if isinstance(first, int) and first < 0 else first or 0
        return [(begin, lengths[0])]
    spans: list[_Span | None] = []
    for length in lengths:
        spans.append((start, length))
        start += length
    return spans


def _joined(values: Values, op: Operation, given: list[_Span | None], seq: int) -> list[_Span | None] | None:
    axis = _axis(op)
    shape = values.flow.tensors[op.outputs[0]].shape
    lengths = [1 if op.name == "stack" else _along(values, tensor, axis) for tensor in op.inputs]
    if shape[axis] != seq or seq in lengths:  # along the features, or more of the sequence than there is
        present = {span for span in given if span is not None}
        return [next(iter(present))] if len(present) == 1 else None
    places = [sum(lengths[:n]) for n in range(len(lengths))]
    in_place = all(span is None or span[0] == place for span, place in zip(given, places, strict=True))
    return [(0, seq)] if in_place else None


def _along(values: Values, tensor: int, axis: int) -> int:
    """The length of an axis. An empty cache has no axes and can be joined to anything."""
    shape = values.flow.tensors[tensor].shape
    return 0 if shape == (0,) else shape[axis]


def _moves(values: Values, op: Operation, seq: int) -> bool:
    """Whether the padding before the positions shifts them."""
    shape, pads = values.flow.tensors[op.inputs[0]].shape, op.args[1]
    return any(shape[-1 - n // 2] == seq and pads[n] != 0 for n in range(0, len(pads), 2))


def _lengthened(values: Values, op: Operation, seq: int) -> set[int]:
    """The new length, where an operation joins more entries to the positions (compressed keys, a prefix)."""
    if op.name != "cat":
        return set()
    axis = _axis(op)
    lengths = [_along(values, tensor, axis) for tensor in op.inputs]
    return {sum(lengths)} if seq in lengths and sum(lengths) > seq else set()


def _contracts(values: Values, op: Operation, lengths: set[int]) -> bool:
    """Whether a product of two activations sums over positions and the entries that were joined to them."""
    if op.name not in aten.BATCHED_PRODUCTS or any(map(values.is_constant, values.operands(op)[-2:])):
        return False
    return values.flow.tensors[op.inputs[-2]].shape[-1] in lengths


def _treats(values: Values, op: Operation, seq: int) -> bool:
    """Whether one operation mixes the whole sequence: a [pos, pos] product, a convolution, a sum over positions."""
    tensors = values.flow.tensors
    result = tensors[op.outputs[0]].shape
    sources = [tensors[t].shape for t in op.inputs]
    if any(shape.count(seq) >= 2 for shape in (result, *sources)) or aten.is_fused_attention(op.name):
        return True
    if op.name in aten.MATRIX_PRODUCTS or op.name == "mv":
        return sources[-2][-1] == seq
    if op.name == "convolution":  # of the positions, or of the positions and pads in front of them
        return seq in (*sources[0], *result) and max(sources[1][2:]) > 1
    if not sources or seq not in sources[0]:
        return False
    if op.name in ("index", "index_put"):
        return any(_permutes(values, index, sources[0][axis], seq) for axis, index in enumerate(op.args[1]))
    if op.name in aten.ALONG_AN_INDEX:
        return _permutes(values, op.args[2], sources[0][op.args[1]], seq)
    if op.name in aten.ALONG_AXES:
        return seq in [sources[0][axis] for axis in _axes(op, len(sources[0]))]
    return op.name in aten.RECURRENT or op.name == "as_strided" or _over_a_window(op, sources[0], seq)


def _over_a_window(op: Operation, shape: tuple[int, ...], seq: int) -> bool:
    """Whether it sorts the positions, pools or resamples them, or takes a statistic over them."""
    if op.name in aten.TOP_K:
        place = 2 if op.name == "topk" else 1
        axis: Any = op.args[place] if len(op.args) > place else op.kwargs.get("dim", -1)
        return len(shape) > 2 and isinstance(axis, int) and shape[axis] == seq
    if "_pool" in op.name and isinstance(op.args[1], list):
        windows = dict(zip(shape[-len(op.args[1]) :], op.args[1], strict=True))
        return bool(windows.get(seq, 1) > 1)
    if op.name in aten.NORMS:
        return isinstance(op.args[1], list) and seq in op.args[1]
    trains = "batch_norm" in op.name and any(each is True for each in op.args)
    return (trains or op.name == "native_group_norm" or op.name.startswith("upsample")) and seq in shape[2:]


def _axes(op: Operation, count: int) -> list[int]:
    """The axes that an operation works along: all where it names none."""
    place = aten.ALONG_AXES[op.name]
    named = op.args[place] if len(op.args) > place else op.kwargs.get("dim")
    if named is None or named == []:
        return list(range(count))
    if isinstance(named, TensorRef):  # the larger of two tensors
        return []
    return list(named) if isinstance(named, (list, tuple)) else [named]


def _permutes(values: Values, index: Any, length: int, seq: int) -> bool:
    """Whether positions are picked in an order that does not depend on the tokens; each repeated is no such order."""
    if not isinstance(index, TensorRef) or length != seq or not values.is_constant(values.value(index.id)):
        return False
    return not _counts(values, values.value(index.id), seq)


def _counts(values: Values, value: int, seq: int) -> bool:
    """Whether it is 0, 1, 2, … up to the positions, each or all of them repeated."""
    while (op := values.producers.get(value)) is not None and op.name in {*aten.RESHAPES, *aten.REPEATS, "clone"}:
        (value,) = values.operands(op)
    return op is not None and op.name == "arange" and values.shape(value) == (seq,)


def _is_number(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
