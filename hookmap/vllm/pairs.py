"""Pairs: blocks that hand the residual stream on as two tensors, whose sum it is.

vLLM leaves the last addition of a block to the first norm of the next, whose kernel adds and normalises at once. Where
a pass shows that, the blocks are made to add it themselves, and the next pass shows one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.layer_list import Numbered, numbered_modules
from hookmap.discovery.values import Values


@dataclass(frozen=True)
class Pair:
    """Where a block's output holds the two halves of the stream."""

    module: nn.Module
    hidden: int
    residual: int
    last: bool
    """nothing takes a block without the second half behind it"""


def pairs(values: Values) -> list[Pair]:
    """The blocks that hand on two tensors which the next block adds before anything else reads either."""
    return [pair for group in numbered_modules(values) for pair in _pairs_of(values, group)]


def _pairs_of(values: Values, group: Numbered) -> Iterator[Pair]:
    runs = [group.calls[run] for run in group.order]
    places = {_added(values, here, after) for here, after in pairwise(runs)}
    if len(places) != 1 or (found := next(iter(places))) is None:
        return
    first, second = found
    # The first block has no second half: what enters it is the whole stream.
    for call in runs:
        yield Pair(call.module, first, second, call is runs[-1])


def _added(values: Values, here: ModuleCall, after: ModuleCall) -> tuple[int, int] | None:
    """Places in the output of `here` of two tensors that enter `after` and are first read by one addition of both."""
    entering = {values.value(tensor) for tensor in after.entered.values()}
    handed = [(p, v) for p, t in here.outputs.items() if isinstance(p, int) and (v := values.value(t)) in entering]
    for (p, left), (q, right) in ((a, b) for a in handed for b in handed if a[0] < b[0]):
        readers = [op for v in (left, right) for op in values.consumers.get(v, []) if op.time > here.exit]
        if readers and all(op.name == "add" and {*values.operands(op)} == {left, right} for op in readers):
            return p, q
    return None


def join(found: list[Pair]) -> Callable[[], None]:
    """Makes each block return the sum for the first half and None for the second. Returns what undoes it."""
    handles = [pair.module.register_forward_hook(_joined(pair)) for pair in found]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _joined(pair: Pair) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        parts = list(output)
        if parts[pair.residual] is None:
            return output
        parts[pair.hidden] = parts[pair.hidden] + parts[pair.residual]
        parts[pair.residual] = torch.zeros_like(parts[pair.hidden]) if pair.last else None
        return tuple(parts)

    return hook
