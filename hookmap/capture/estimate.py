"""Estimate the size of a capture before it runs, and check that there is room for it."""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hookmap.capture.rows import DTYPES, NUMBERS, RowSelection
from hookmap.errors import CaptureError, StoreError
from hookmap.loading.memory import available
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector
from hookmap.maps.templates import Heads
from hookmap.wording import counted

_SMALLER = "choose fewer points or layers, positions=, every=, mean=, features=, keep_dtype=, or fewer new tokens"
STREAMING_BYTES = 160 * 2**20
"""upper bound of what a streaming run holds besides the model: blocks, two shards, the queue of the writer"""


@dataclass(frozen=True)
class Estimate:
    """The largest size a capture can have. It is smaller where a sequence ends before max_new_tokens."""

    samples: int
    rows: int
    """of each tensor, over all samples"""
    tensors: int
    bytes: int
    forward_passes: int
    largest: int = 0
    """bytes of the largest tensor of one forward pass, captured or computed for the capture"""

    def __str__(self) -> str:
        samples = counted(self.samples, "sample")
        tensors = counted(self.tensors, "tensor")
        return f"{samples}, {tensors} of up to {self.rows} rows, up to {in_words(self.bytes)}"

    def twice(self) -> "Estimate":
        """The size with the rows before the interventions stored too."""
        return replace(self, tensors=2 * self.tensors, bytes=2 * self.bytes, largest=2 * self.largest)

    def held(self, streaming: bool) -> int:
        """Upper bound of the bytes of memory that the rows take during the run."""
        # One forward pass yields all rows of a prompt, and a copy of them waits for the writer.
        if streaming:
            return max(min(self.bytes, STREAMING_BYTES + 2 * self.largest), self.largest)
        return max(self.bytes, self.largest)


def estimate(
    architecture_map: ArchitectureMap,
    selectors: Sequence[Selector],
    lengths: Sequence[int],
    max_new_tokens: int,
    itemsize: int,
    batches: Sequence[Sequence[int]],
    d_mlp: int | None = None,
    selection: RowSelection | None = None,
    every_logit: bool = False,
    d_expert: int | None = None,
) -> Estimate:
    """The size of a capture. `lengths`: tokens of each prompt; `itemsize`: bytes of one number of the model's dtype.

    `batches`: indices of the prompts that run together. `d_mlp`: width of an MLP's activations, which maps do not have,
    and `d_expert` of one expert's. `every_logit`: whether the model computes the logits of all tokens, even where few
    are stored.
    """
    selection = selection or RowSelection()
    selection.refuse(selectors)
    new = max(0, max_new_tokens - 1)
    rows = sum(_rows(selection, length, length + new) * often for length, often in Counter(lengths).items())
    keys = max(lengths, default=0) + new
    inside = {"d_mlp": d_mlp, "d_expert": d_expert}
    row = [_width(architecture_map, s, keys, inside, selection) * _itemsize(s, selection, itemsize) for s in selectors]
    at_once = {length: _rows(selection, length, length) for length in set(lengths)}
    largest = max((sum(at_once[lengths[n]] for n in batch) for batch in batches), default=0) * max(row, default=0)
    if every_logit and any("d_vocab" in PointName.of(s.point).definition.axes for s in selectors):
        columns = max((len(batch) * max(lengths[n] for n in batch) for batch in batches), default=0)
        largest = max(largest, columns * (architecture_map.d_vocab or 0) * itemsize)
    passes = max(1, max_new_tokens) * len(batches)
    return Estimate(len(lengths), rows, len(selectors), rows * sum(row), passes, largest)


def check_room(expected: Estimate, store: "str | os.PathLike[str] | None", resume: bool = False) -> None:
    """Raises CaptureError where the rows do not fit into memory, StoreError where they do not fit on the disk.

    `resume`: bytes that the folder holds already are not counted again.
    """
    needs, free = expected.held(store is not None), available()
    if needs > free:
        stream = "" if store is not None else "stream to a folder (store=FOLDER, -o DIR), or "
        raise CaptureError(
            f"this capture holds up to {in_words(needs)} in memory, and {in_words(free)} are free: {stream}{_SMALLER}."
        )
    if store is None:
        return
    folder = Path(store)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    already = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if resume else 0
    if expected.bytes - already > (room := shutil.disk_usage(there).free):
        raise StoreError(
            f"{folder} has room for {in_words(room)}, and this capture needs up to {in_words(expected.bytes)}: "
            f"{_SMALLER}, or write to another disk (-o DIR)."
        )


def in_words(size: float) -> str:
    """`1.23 GB`."""
    unit = "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}"


def _rows(selection: RowSelection, prompt: int, tokens: int) -> int:
    """Upper bound of the rows of one sample."""
    if selection.everything:
        return tokens
    if selection.one_row:
        return 1
    if selection.reads_tokens or selection.reads_images:  # each token may match
        return -(-tokens // selection.every)
    wanted = selection.wanted(prompt)
    return sum(wanted(position, -1) for position in range(tokens))


def _itemsize(selector: Selector, selection: RowSelection, itemsize: int) -> int:
    """Upper bound of the bytes of one number of a point. Routers of many models compute in float32."""
    name = PointName.of(selector.point).base
    if name in NUMBERS:
        return torch.int64.itemsize
    if selection.dtype is not None:
        return DTYPES[selection.dtype].itemsize
    return max(itemsize, torch.float32.itemsize) if name.startswith("router_") else itemsize


def _width(
    architecture_map: ArchitectureMap,
    selector: Selector,
    keys: int,
    inside: Mapping[str, int | None],
    selection: RowSelection,
) -> int:
    """Numbers in one row of a point. `inside`: the widths that maps do not have, by their axes."""
    if selector.width is not None:
        return selector.width * keys if selector.has_keys else _chosen(selection, selector.width)
    axes = PointName.of(selector.point).definition.axes
    mlp = architecture_map.kind_of(selector.layer).mlp if selector.layer is not None else None
    heads = selector.terms[-1].heads or _heads_before_rotation(architecture_map, selector)
    if heads is not None:
        each = architecture_map.d_model if "d_model" in axes else heads.d_head
        return heads.groups * (heads.stop - heads.start) // heads.d_head * _chosen(selection, each)
    widths = {
        "one": 1,
        "d_vocab": architecture_map.d_vocab,
        "key": keys * (architecture_map.num_heads or 1),
        "experts": mlp.experts if mlp else None,
        "k": mlp.experts_per_token if mlp else None,
        **inside,
    }
    if "k" in axes[:-1]:  # each chosen expert has a tensor as wide as the last axis
        return (widths["k"] or 1) * _chosen(selection, widths.get(axes[-1]) or architecture_map.d_model)
    width = next((width for axis in axes if (width := widths.get(axis))), architecture_map.d_model)
    return width if "key" in axes else _chosen(selection, width)


def _heads_before_rotation(architecture_map: ArchitectureMap, selector: Selector) -> Heads | None:
    """Of `q_rot` and `k_rot`: the heads of `q` and `k`. Keys that several projections make are as wide as queries."""
    name = PointName.of(selector.point).base
    if name not in ("q_rot", "k_rot") or selector.layer is None:
        return None
    points = architecture_map.kind_of(selector.layer).points
    known = [points[each].terms[0].heads for each in (name[0], "q") if each in points]
    return known[0] if known else None


def _chosen(selection: RowSelection, width: int) -> int:
    """How many of the `width` features are stored. Raises SelectionError where more are asked for."""
    columns = selection.columns(width)
    return width if columns is None else len(columns)
