"""Rows of which most numbers are 0: torch's sparse tensors (COO) [rows, width], and the three tensors of them on disk.

A shard holds `NAME.values`, the numbers that are not 0 (of row 0, then of row 1, …), `NAME.indices`, int32, which
number of its row each is, ascending in a row, and `NAME.offsets`, int64 [rows + 1]: row i has the values from
offsets[i] to offsets[i + 1].
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

Tensor = torch.Tensor
VALUES, INDICES, OFFSETS = "values", "indices", "offsets"
INDEX_DTYPE, OFFSET_DTYPE = "I32", "I64"
"""safetensors' names"""
CHUNK = 2**22
"""numbers of rows that are written out at a time"""


class Parts(NamedTuple):
    """Sparse rows as they are on disk."""

    values: Tensor
    """[n]"""
    indices: Tensor
    """int32 [n]"""
    offsets: Tensor
    """int64 [rows + 1]"""


def parts_of(rows: Tensor) -> Parts:
    """The three tensors of sparse rows [rows, width]."""
    rows = rows.coalesce()
    row, column = rows.indices()
    counts = torch.bincount(row, minlength=rows.shape[0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Parts(rows.values(), column.to(torch.int32), offsets)


def from_parts(parts: Parts, width: int) -> Tensor:
    """Sparse rows of their three tensors, whose offsets may begin anywhere. Raises RuntimeError for indices outside."""
    counts = parts.offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(counts)), counts)
    size = (len(counts), width)
    at = torch.stack([row, parts.indices.long()])
    return torch.sparse_coo_tensor(at, parts.values, size, is_coalesced=True, check_invariants=True)


def rows_at(rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """These rows of sparse ones."""
    return rows.index_select(0, torch.tensor(list(numbers), dtype=torch.long, device=rows.device)).coalesce()


def compact(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(columns, dense rows [rows, columns]): the features that are active in some of these sparse rows, ascending."""
    rows = rows.coalesce()
    row, column = rows.indices()
    columns, place = torch.unique(column, return_inverse=True)
    dense = rows.values().new_zeros(rows.shape[0], len(columns))
    dense[row, place] = rows.values()
    return columns, dense


def by_columns(rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same for some of the columns at a time, so that memory stays flat: (columns, dense rows of them)."""
    rows = rows.coalesce()
    row, column = rows.indices()
    columns, place = torch.unique(column, return_inverse=True)
    step = max(1, CHUNK // max(1, rows.shape[0]))
    for start in range(0, len(columns), step):
        here = (place >= start) & (place < start + step)
        dense = rows.values().new_zeros(rows.shape[0], min(step, len(columns) - start))
        dense[row[here], place[here] - start] = rows.values()[here]
        yield columns[start : start + step], dense


def finite(rows: Tensor) -> Tensor:
    """bool [rows]: whether each of these sparse rows is finite."""
    rows = rows.coalesce()
    found = torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
    found[rows.indices()[0][~rows.values().isfinite()]] = False
    return found


def pieces(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Sparse rows written out, so many at a time that memory stays flat: (the first row, dense rows)."""
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield start, rows_at(rows, range(start, min(start + step, rows.shape[0]))).to_dense()


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Sparse tensors of one shape as one with an axis in front."""
    return torch.stack(list(parts)).coalesce()


def rows_held(lengths: Mapping[str, int]) -> dict[str, int]:
    """Rows of each tensor of a shard, of sparse ones too, from the first axis of each that its header names."""
    end = f".{OFFSETS}"
    return {**lengths, **{name.removesuffix(end): n - 1 for name, n in lengths.items() if name.endswith(end)}}
