"""Tensors of several samples, or of several layers, as one; and what `read` is given."""

import itertools
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch

from hookmap.activations import Key, call_of
from hookmap.errors import SelectionError, deprecated
from hookmap.maps.points import PointName, parse_point
from hookmap.stores import sparse
from hookmap.wording import counted


class Rows(NamedTuple):
    """Rows of all samples behind each other."""

    values: torch.Tensor
    """[rows, d]"""
    offsets: tuple[int, ...]
    """[samples + 1]: rows of sample i are values[offsets[i] : offsets[i + 1]]"""

    def __repr__(self) -> str:
        return f"<Rows {list(self.values.shape)} of {counted(len(self.offsets) - 1, 'sample')}>"


def join(rows: Sequence[int], parts: Iterable[torch.Tensor]) -> "torch.Tensor | list[torch.Tensor]":
    """One tensor [batch, pos, d] where every part has as many rows, else the list of parts [pos, d].

    `rows`: rows of each part, so that one tensor is filled part by part and nothing is held twice.
    """
    if len(set(rows)) != 1:
        return list(parts)
    parts = iter(parts)
    joined: torch.Tensor | None = None
    for place, part in enumerate(parts):
        if part.is_sparse:
            return sparse.stacked([part, *parts])
        if joined is None:
            joined = part.new_empty((len(rows), *part.shape))
        joined[place] = part
    assert joined is not None  # there is at least one part
    return joined


def stacked(
    parts: "Iterable[torch.Tensor | list[torch.Tensor]]", count: int, name: str
) -> "torch.Tensor | list[torch.Tensor]":
    """Tensors of `count` layers as one, [layers, ..]; lists of tensors as a list. Raises SelectionError.

    Each is read when it is copied, so that nothing is held twice.
    """
    made: list[torch.Tensor] = []
    whole = True
    for place, part in enumerate(parts):
        whole = isinstance(part, torch.Tensor)
        pieces = [part] if isinstance(part, torch.Tensor) else part
        if pieces[0].is_sparse:
            raise SelectionError(f"{name} is of several layers, and sparse: say which layer.")
        if not made:
            made = [piece.new_empty((count, *piece.shape)) for piece in pieces]
        for target, piece in zip(made, pieces, strict=True):
            if target.shape[1:] != piece.shape or target.dtype != piece.dtype:
                raise SelectionError(
                    f"{name} has layers of different shapes, {list(target.shape[1:])} and {list(piece.shape)}: "
                    "they make no one tensor. Say which layer."
                )
            target[place] = piece
    return made[0] if whole else made


def layers_meant(held: Any, where: Any) -> tuple[Key, ...] | None:
    """The keys of every layer of a point that is named alone; None where one tensor is named, or none is held."""
    parsed = parse_point(where) if isinstance(where, str) else ""
    if isinstance(parsed, str) or parsed.layer is not None:
        return None
    keys = tuple(key for key in held.keys if key[0] == parsed.point)
    return keys if keys and keys[0][1] is not None else None


def flat_rows(held: Any, key: Key) -> Rows:
    """See `Store.rows`."""
    if "key" in PointName.of(key[0]).definition.axes:
        raise SelectionError(f"{key[0]} has a row for each query, as wide as its text: read it sample by sample.")
    samples = list(held.samples)
    offsets = tuple(itertools.accumulate((sample.rows for sample in samples), initial=0))
    values: torch.Tensor | None = None
    for place, sample in enumerate(samples):
        rows = held.read(sample.sample, key[0], key[1], call_of(key))
        if rows.is_sparse:
            every = (held.read(each.sample, key[0], key[1], call_of(key)) for each in samples)
            return Rows(torch.cat(list(every)).coalesce(), offsets)
        if values is None:
            values = rows.new_empty((offsets[-1], *rows.shape[1:]))
        values[offsets[place] : offsets[place + 1]] = rows
    if values is None:
        raise SelectionError("this capture has no finished samples yet.")
    return Rows(values, offsets)


def call_and_tokens(call: Any, tokens: Any) -> tuple[Any, Any]:
    """The call and the tokens that `read` is given; in 0.1 tokens stood in the place of the call."""
    if isinstance(call, Integral | None):
        return call, tokens
    if tokens is not None:
        raise SelectionError(f"read is given tokens twice, {call!r} and {tokens!r}: write tokens=… once.")
    deprecated("read(sample, point, layer, tokens)", "read(sample, point, layer, tokens=tokens)", gone_in="0.4")
    return None, call
