"""The operations of blocks, as one forward pass shows them: their names, shapes, and what reads what they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hookmap.discovery.dataflow import Dataflow, ModuleCall, Operation
from hookmap.discovery.discover import flow_of
from hookmap.discovery.layer_choice import find_layers
from hookmap.discovery.values import Values
from hookmap.errors import SelectionError
from hookmap.maps.grammar import Place, selector_text

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OperationRow:
    """One operation in a module's own forward."""

    name: str
    """as a selector names it, without a side: `model.layers.8.self_attn:bmm#1`"""
    module: str
    module_class: str
    inputs: tuple[Shape, ...]
    """shapes of the tensors that it reads, in the order of `.input[0]`, `.input[1]`, …"""
    outputs: tuple[Shape, ...]
    readers: tuple[str, ...]
    """operations and modules' inputs that read what it gives, and modules' outputs that it is"""


def operations_of(
    source: Any, layers: str | Sequence[int] = "all", *, trust_remote_code: bool = False
) -> tuple[list[OperationRow], int]:
    """The operations inside the blocks of these layers, in the order of the forward pass, with eager attention.

    `source`: as for `hookmap.discover`. Also the number of tokens of the one text that the shapes are of.
    Raises SelectionError for a layer that is not there, and what `discover` raises.
    """
    flow, seq = flow_of(str(source) if isinstance(source, Path) else source, trust_remote_code)
    found = find_layers(Values(flow), seq)
    wanted = range(found.length) if isinstance(layers, str) else layers
    if wrong := [layer for layer in wanted if not -found.length <= layer < found.length]:
        raise SelectionError(f"layers {wrong} are not there: the model has layers 0 to {found.length - 1}.")
    names, readers = _names(flow), _readers(flow)
    calls = [found.calls[layer % found.length, 0] for layer in wanted if (layer % found.length, 0) in found.calls]
    return [row for call in calls for row in _rows(flow, call, names, readers)], seq


def _rows(
    flow: Dataflow, block: ModuleCall, names: dict[int, str], readers: dict[int, list[str]]
) -> Iterator[OperationRow]:
    def shape(tensor: int) -> Shape:
        return flow.tensors[tensor].shape

    for op in flow.operations:
        if block.enter < op.time < block.exit and op.time in names:
            call = flow.calls[op.call]
            yield OperationRow(
                names[op.time],
                call.path,
                type(call.module).__name__,
                tuple(map(shape, op.inputs)),
                tuple(map(shape, op.outputs)),
                tuple(dict.fromkeys(reader for tensor in op.outputs for reader in readers.get(tensor, ()))),
            )


def _names(flow: Dataflow) -> dict[int, str]:
    """Time of each operation -> its name. Without a number where it is the only one in its module's forward."""
    alike: dict[tuple[int, str], list[Operation]] = {}
    for op in flow.operations:
        if op.call >= 0 and op.name != "alias_update":
            alike.setdefault((op.call, op.name), []).append(op)
    found = {}
    for (call, name), ops in alike.items():
        for number, op in enumerate(ops):
            place = Place(flow.calls[call].path, "output", None, name, number if len(ops) > 1 else None)
            found[op.time] = selector_text(place).removesuffix(".output")
    return found


def _readers(flow: Dataflow) -> dict[int, list[str]]:
    """Tensor -> what reads it, and which modules' output it is."""
    found: dict[int, list[str]] = {}
    names = _names(flow)
    for op in flow.operations:
        for number, tensor in enumerate(op.inputs):
            if op.time in names:
                found.setdefault(tensor, []).append(f"{names[op.time]}.input[{number}]")
    for call in flow.calls:
        for side, places in (("input", call.entered), ("output", call.outputs)):
            for place, tensor in places.items():
                index = 0 if side == "input" and place is None else place
                found.setdefault(tensor, []).append(selector_text(Place(call.path, side, index)))
    return found
