"""Statistics as a file: safetensors, whole or not at all, that a killed run goes on from.

The tensors are the sums; the metadata says what they are of, and which samples are in them.
"""

import os
from typing import Any, Final, Literal

import torch
from pydantic import Field

from hookmap.activations import Key, call_of, key_of
from hookmap.analysis.kept import Kind
from hookmap.analysis.reductions.statistics import Statistics, Sums, TensorSums
from hookmap.analysis.reductions.wanted import KINDS, wanted
from hookmap.documents import Frozen
from hookmap.stores.ledger import tensor_name
from hookmap.stores.number_set import NumberSet

FORMAT: Final = "hookmap-statistics"


class _Tensor(Frozen):
    """One tensor that was reduced."""

    point: str
    layer: int | None
    call: int | None = None
    row: tuple[int, ...] | None = Field(description="the shape of a row; null where no row has come")
    not_finite: int = 0
    first_not_finite: tuple[int, int | None] | None = None

    @property
    def key(self) -> Key:
        return key_of(self.point, self.layer, self.call)


class _Document(Frozen):
    """The metadata of the file."""

    format: Literal["hookmap-statistics"] = FORMAT
    format_version: Literal[1] = 1
    complete: bool
    reductions: tuple[str, ...]
    by: tuple[str, ...]
    edges: tuple[float, ...] | None = None
    tensors: tuple[_Tensor, ...]
    groups: dict[str, list[Any]]
    samples: tuple[tuple[int, int], ...] = Field(description="first and last number of each run of samples")
    about: dict[str, Any]


def _written(statistics: Statistics) -> tuple[_Document, dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    told = []
    for key in statistics.keys:
        held = statistics.tensors.get(key)
        named: dict[str, Any] = {"point": key[0], "layer": key[1], "call": call_of(key)}
        if held is None:
            told.append(_Tensor(**named, row=None))
            continue
        told.append(_Tensor(**named, row=held.row, not_finite=held.not_finite, first_not_finite=held.first_not_finite))
        for by, sums in held.sums.items():
            for (view, kind), each in sums.items():
                for name, value in each.state().items():
                    tensors["/".join((tensor_name(key), by, view, kind, name))] = value
    for layer, direction in statistics.wanted.directions.items():
        tensors[f"direction/{'all' if layer is None else layer}"] = direction
    document = _Document(
        complete=statistics.complete,
        **statistics.wanted.as_json(),
        tensors=tuple(told),
        groups=statistics.groups,
        samples=tuple(statistics.samples.ranges()),
        about=statistics.about,
    )
    return document, tensors


def _read(document: _Document, tensors: dict[str, torch.Tensor]) -> Statistics:
    directions = {
        None if (layer := name.removeprefix("direction/")) == "all" else int(layer): value
        for name, value in tensors.items()
        if name.startswith("direction/")
    }
    chosen = wanted(
        document.reductions,
        document.by,
        document.edges,
        (directions.get(None) if None in directions else directions) if directions else None,
    )
    samples = NumberSet.of_ranges(document.samples)
    keys = tuple(tensor.key for tensor in document.tensors)
    found = Statistics(chosen, keys, document.about, samples, document.complete, document.groups)
    for tensor in document.tensors:
        if tensor.row is None:
            continue
        sums: dict[str, Sums] = {by: {} for by in found.groupings}
        for by, own in sums.items():
            for view, kind in chosen.accumulators:
                start = "/".join((tensor_name(tensor.key), by, view, kind, ""))
                state = {n.removeprefix(start): value for n, value in tensors.items() if n.startswith(start)}
                own[view, kind] = KINDS[kind].from_state(state)
        found.tensors[tensor.key] = TensorSums(tensor.row, sums, tensor.not_finite, tensor.first_not_finite)
    return found


STATISTICS = Kind(
    "statistics.safetensors",
    "statistics",
    "hookmap stats MODEL --points resid_post --prompts FILE",
    _Document,
    _written,
    _read,
)


def open_statistics(folder: str | os.PathLike[str]) -> Statistics:
    """The statistics in a folder, or in the file itself; complete or not. Raises StoreError."""
    return STATISTICS.open(folder)
