"""Which features of a projection belong to which head: labels follow the recorded views, splits and transposes.

Each number of the projection's output is labelled with its feature. The operations that the model applied to the tensor
are applied to the labels. Where an operation computes (a rotary embedding, a norm), its result has the range of labels
that it is computed from. Labels that cannot be followed are given up, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookmap.discovery import aten
from hookmap.discovery.dataflow import ModuleCall, Operation
from hookmap.discovery.values import Values
from hookmap.maps.templates import Heads

_NOTHING = 2**40


@dataclass(frozen=True)
class Labels:
    """For each number of a tensor, the lowest and the highest label of the numbers that it is computed from."""

    low: Tensor
    high: Tensor

    def map(self, function: Any) -> list[Labels]:
        low = function(self.low)
        high = low if self.high is self.low else function(self.high)  # still one label each
        pairs = zip(low, high, strict=True) if isinstance(low, (list, tuple)) else [(low, high)]
        return [Labels(*pair) for pair in pairs]


def features(shape: tuple[int, ...]) -> Tensor:
    """The feature of each number: its index in the last axis."""
    return torch.arange(shape[-1]).expand(shape)


def push(values: Values, block: ModuleCall, source: int, labels: Tensor, target: int) -> Labels | None:
    """The labels of tensor `target`, where tensor `source` has `labels`; None where they cannot be followed."""
    known = {source: Labels(labels, labels)}
    lost: set[int] = set()
    statistics: set[int] = set()  # one number for many features, such as a norm divides by: it has no label
    for op in _between(values, block, source, target):
        reached = {t for t in op.inputs if t in known or t in lost or t in statistics}
        if not reached:
            continue
        steady = op.name in aten.POINTWISE | aten.MOVES
        reduces = op.name in {*aten.STATISTICS, "amax"} and values.flow.tensors[op.outputs[0]].shape[-1:] == (1,)
        if reached & lost:
            lost.update(op.outputs)
        elif reduces or (steady and reached <= statistics):
            statistics.update(op.outputs)
        elif (made := _apply(values, op, known)) is not None:
            known.update(zip(op.outputs, made, strict=False))
        else:
            lost.update(op.outputs)
    return known.get(target)


def _between(values: Values, block: ModuleCall, source: int, target: int) -> list[Operation]:
    """The block's operations that compute `target` from `source`, in their order."""
    found: dict[int, Operation] = {}
    stack, seen = [target], {source}
    while stack:
        tensor = stack.pop()
        op = values.flow.producer(tensor)
        if tensor in seen or op is None or op.time < block.enter:
            continue
        seen.add(tensor)
        found[op.time] = op
        stack += op.inputs
    return [found[time] for time in sorted(found)]


def _apply(values: Values, op: Operation, known: dict[int, Labels]) -> list[Labels] | None:
    shape = values.flow.tensors[op.outputs[0]].shape
    if op.name in aten.COPIES | aten.NORMS:
        return [known[op.inputs[0]]] if op.inputs[0] in known else None
    if op.name == "view_as_complex":
        (pair,) = (known[t] for t in op.inputs)
        return [Labels(pair.low.amin(-1), pair.high.amax(-1))]
    if op.name == "view_as_real":
        return known[op.inputs[0]].map(lambda t: t.unsqueeze(-1).expand(shape))
    if op.name in ("view", "_unsafe_view", "_reshape_alias"):  # the labels lie in memory in their own way
        return known[op.inputs[0]].map(lambda t: t.reshape(op.args[1]))
    if op.name in aten.VIEWS:
        function = getattr(torch.ops.aten, op.name)
        return known[op.inputs[0]].map(lambda t: function(t, *op.args[1:], **op.kwargs))
    if op.name in aten.JOINS:
        parts = [_of(values, ref.id, known) for ref in op.args[0]]
        axis = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
        join = torch.cat if op.name == "cat" else torch.stack
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            return None
        return [Labels(join([p.low for p in whole], axis), join([p.high for p in whole], axis))]
    if op.name in aten.POINTWISE:
        parts = [known[t] for t in op.inputs if t in known]
        low, high = ([getattr(p, side).expand(shape) for p in parts] for side in ("low", "high"))
        return [Labels(torch.stack(low).amin(0), torch.stack(high).amax(0))]
    return None


def _of(values: Values, tensor: int, known: dict[int, Labels]) -> Labels | None:
    """A tensor's labels. A constant (a key that belongs to no token) has labels that no feature has."""
    if tensor in known or not values.is_constant(values.value(tensor)):
        return known.get(tensor)
    shape = values.flow.tensors[tensor].shape
    return Labels(torch.full(shape, _NOTHING), torch.full(shape, -_NOTHING))


def heads_of(labels: Labels, width: int) -> Heads | None:
    """Where the heads `[heads, pos, d_head]` of a product's operand are in a last axis of `width` features.

    A head that several query heads share counts once. None where the heads are not slices of one width in even groups.
    """
    heads, _, size = labels.low.shape
    low, high = labels.low.reshape(heads, -1).amin(1), labels.high.reshape(heads, -1).amax(1)
    ends = dict.fromkeys(zip(low.tolist(), high.tolist(), strict=True))
    starts = [start for start, _ in ends]
    if any(end - start + 1 != size for start, end in ends) or starts[0] < 0:
        return None
    run = next((n for n in range(1, len(starts)) if starts[n] != starts[0] + n * size), len(starts))
    groups = len(starts) // run
    if width % groups:
        return None
    pitch = width // groups
    even = [starts[0] + (n // run) * pitch + (n % run) * size for n in range(groups * run)]
    if starts != even or starts[0] + run * size > pitch:
        return None
    return Heads(groups=groups, start=starts[0], stop=starts[0] + run * size, d_head=size)
