"""Captured tensors as xarray's, with named axes; xarray is not needed for anything else.

NumPy has no bfloat16: such rows are given as float32, which holds each of them exactly; `attrs["dtype"]` says so.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hookmap.activations import Key, Sample
from hookmap.errors import CaptureError, SelectionError
from hookmap.maps.points import parse_point


class Run(Protocol):
    """What the conversion asks of a capture or a store."""

    @property
    def keys(self) -> tuple[Key, ...]: ...
    @property
    def samples(self) -> Sequence[Sample]: ...

    def sample(self, number: int) -> Sample:
        """One sample."""

    def key(self, point: str, layer: int | None = None) -> Key:
        """The tensor that these names mean."""

    def axes(self, point: str, layer: int | None, ndim: int) -> tuple[str, ...]:
        """Names of the axes of `run[point, layer]`, which has `ndim`."""

    def __getitem__(self, where: tuple[str, int | None]) -> torch.Tensor | list[torch.Tensor]:
        """[batch, pos, ...], or a list of [pos, ...]."""


MISSING = "conversion to xarray needs it: pip install xarray"


def to_xarray(run: Run, point: str, layer: int | None, sample: int | None) -> Any:
    """See `Capture.to_xarray`."""
    try:
        import xarray
    except ImportError as error:
        raise CaptureError(f"{MISSING}\n({error})") from error
    parsed = parse_point(point)
    name = point if isinstance(parsed, str) else parsed.point
    of_each = [one for held, one in run.keys if held == name and one is not None]
    if not of_each or layer is not None or isinstance(parsed, str) or parsed.layer is not None:
        return _array(xarray, run, point, layer, sample)
    arrays = [_array(xarray, run, name, one, sample) for one in of_each]
    return xarray.concat(arrays, dim=xarray.Variable("layer", of_each), combine_attrs="drop_conflicts")


def _array(xarray: Any, run: Run, point: str, layer: int | None, sample: int | None) -> Any:
    found = run[point, layer]
    name, number = run.key(point, layer)
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
    rows = [tuple(range(s.rows)) if s.positions is None else s.positions for s in samples]
    if len(set(rows)) == 1:
        return {axis: list(rows[0])}
    return {"position": (("batch", axis), [list(each) for each in rows])}
