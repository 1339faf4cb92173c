"""Captured tensors as xarray's, with named axes; xarray is not needed for anything else.

NumPy has no bfloat16: such rows are given as float32, which holds each of them exactly; `attrs["dtype"]` says so.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hookmap.activations import Key, Sample, call_of
from hookmap.errors import SelectionError
from hookmap.extras import needed
from hookmap.maps.points import parse_point


class Run(Protocol):
    """What the conversion asks of a capture or a store."""

    @property
    def keys(self) -> tuple[Key, ...]: ...
    @property
    def samples(self) -> Sequence[Sample]: ...

    def sample(self, number: int) -> Sample:
        """One sample."""

    def key(self, point: str, layer: int | None = None, call: int | None = None) -> Key:
        """The tensor that these names mean."""

    def keys_of(self, point: str, layer: int | None = None, call: int | None = None) -> tuple[Key, ...]:
        """The tensors of one point: of each layer and call that is not named."""

    def axes(self, point: str, layer: int | None, ndim: int) -> tuple[str, ...]:
        """Names of the axes of `run[point, layer]`, which has `ndim`."""

    def __getitem__(self, where: Key) -> torch.Tensor | list[torch.Tensor]:
        """[batch, pos, ...], or a list of [pos, ...]."""


def to_xarray(run: Run, point: str, layer: int | None, sample: int | None, call: int | None = None) -> Any:
    """See `Capture.to_xarray`."""
    xarray = needed("xarray", "conversion to xarray needs it: pip install xarray")
    keys = run.keys_of(point, layer, call)
    parsed = parse_point(point)
    in_name = None if isinstance(parsed, str) else parsed.layer
    one_layer, several = layer is not None or in_name is not None, any(len(key) == 3 for key in keys)
    arrays = [_array(xarray, run, key, sample) for key in keys]
    if keys[0][1] is None or call is not None or (one_layer and not several):
        return arrays[0]
    layers, calls = [key[1] for key in keys], [call_of(key) or 0 for key in keys]
    axis, labels = ("call", calls) if one_layer else ("run", range(len(keys))) if several else ("layer", layers)
    found = xarray.concat(arrays, dim=xarray.Variable(axis, list(labels)), combine_attrs="drop_conflicts")
    return found.assign_coords(layer=("run", layers), call=("run", calls)) if axis == "run" else found


def _array(xarray: Any, run: Run, key: Key, sample: int | None) -> Any:
    found = run[key]
    name, number = key[:2]
    if found[0].is_sparse:
        raise SelectionError(f"{name} is sparse, and xarray has only dense arrays: take run[{name!r}, {number}].")
    if isinstance(found, list) and sample is None:
        rows = sorted({each.rows for each in run.samples})
        raise SelectionError(
            f"the samples have {rows[0]} to {rows[-1]} rows, and an array has one length: give sample=N, one at a "
            f"time, or take run[{name!r}, {number}], a list."
        )
    samples = list(run.samples)
    if sample is not None:
        chosen = run.sample(sample)
        found = found[samples.index(chosen)][None]
        samples = [chosen]
    assert isinstance(found, torch.Tensor)
    dims = _axes(run, name, number, found)
    array = xarray.DataArray(
        (found.float() if found.dtype is torch.bfloat16 else found).numpy(),
        dims=dims,
        coords={"batch": [each.sample for each in samples], **_positions(samples, dims)},
        name=name,
        attrs={"dtype": str(found.dtype).removeprefix("torch."), **({} if number is None else {"layer": number})},
    )
    return array if sample is None else array.isel(batch=0)


def _axes(run: Run, point: str, layer: int | None, found: torch.Tensor) -> tuple[str, ...]:
    axes = run.axes(point, layer, found.ndim)
    if found.ndim != len(axes):
        raise SelectionError(f"{point} is {list(found.shape)} here, and its axes are {', '.join(axes)}: take run[…].")
    return axes


def _positions(samples: list[Sample], dims: tuple[str, ...]) -> dict[str, Any]:
    """Which token each row is of: one axis of positions where they are the same in every sample."""
    axis = "query" if "query" in dims else "pos"
    if any(sample.positions == "mean" for sample in samples):
        return {}
    rows = [tuple(s.row_positions) for s in samples]
    if len(set(rows)) == 1:
        return {axis: list(rows[0])}
    return {"position": (("batch", axis), [list(each) for each in rows])}
