"""The residual stream of a capture by layer, and taken apart into what each branch added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from hookmap.activations import Key, Sample, call_of, key_of
from hookmap.errors import SelectionError
from hookmap.maps.calls import last_run
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.summands import summands
from hookmap.stores.joining import stacked
from hookmap.wording import counted

_CLOSE = 1e-4
"""what a sum may be off besides the rounding of its dtype, relative to the largest value of the stream"""


class Stack(NamedTuple):
    """Tensors of one shape on top of each other."""

    labels: tuple[str, ...]
    """`resid_pre[0]`, `mixer_out[0]`, …: what each part is"""
    values: torch.Tensor | list[torch.Tensor]
    """[parts, batch, pos, d_model], or of samples with different numbers of rows a list of [parts, pos, d_model]"""

    def __repr__(self) -> str:
        parts = counted(len(self.labels), "part")
        sizes = [list(each.shape) for each in ([self.values] if isinstance(self.values, torch.Tensor) else self.values)]
        shown = ", ".join(map(str, sizes[:3])) + (", …" if len(sizes) > 3 else "")
        return f"<Stack of {parts}, {self.labels[0]} to {self.labels[-1]}: {shown}>"


class Held(Protocol):
    """A capture with its map."""

    map: ArchitectureMap

    @property
    def keys(self) -> tuple[Key, ...]: ...
    @property
    def points(self) -> tuple[str, ...]: ...
    @property
    def samples(self) -> Sequence[Sample]: ...
    def read(self, sample: int, point: str, layer: int | None = None, call: Any = None) -> torch.Tensor: ...
    def __getitem__(self, where: Key) -> torch.Tensor | list[torch.Tensor]: ...


def label(key: Key) -> str:
    """`mlp_out[8]`; `mlp_out[8, 1]` of a layer's run 1."""
    return f"{key[0]}[{', '.join(map(str, key[1:]))}]"


def accumulated(run: Held, mid: bool) -> Stack:
    """See `Capture.accumulated_resid`."""
    last = _last(run)
    points = ("resid_pre", *(("resid_mid",) if mid else ()))
    missing = [name for name in (*points, "resid_post") if name not in run.points]
    if missing:
        raise SelectionError(
            f"accumulated_resid needs {', '.join(missing)} too: hm.capture(prompts, {[*points, 'resid_post']})."
        )
    return _stack(run, [*(key for key in run.keys if key[0] in points), last])


def decomposed(run: Held, layer: int | None) -> Stack:
    """See `Capture.decompose_resid`."""
    found = summands(run.map)
    if isinstance(found, str):
        raise SelectionError(
            f"no decomposition of the stream of {run.map.architecture}: {found}. accumulated_resid needs no sum."
        )
    keys, whole = _up_to(run, found, layer)
    missing = list(dict.fromkeys(key for key in (*keys, whole) if key not in run.keys))
    if missing:
        points = list(dict.fromkeys(key[0] for key in (*found, whole)))
        shown = ", ".join(map(label, missing[:6])) + (", …" if len(missing) > 6 else "")
        raise SelectionError(f"decompose_resid needs {shown} too: hm.capture(prompts, {points}).")
    for sample in run.samples:
        parts = torch.stack([run.read(sample.sample, k[0], k[1], call_of(k)) for k in keys])
        check_sum(parts, run.read(sample.sample, whole[0], whole[1], call_of(whole)), label(whole))
    return _stack(run, keys)


def check_sum(parts: torch.Tensor, whole: torch.Tensor, name: str) -> None:
    """Raises SelectionError where the parts [parts, rows, d] give `whole` neither exactly nor within their rounding."""
    left = (whole.double() - parts.double().sum(0)).abs() - rounding(parts.float(), whole.dtype)
    apart = float(left.max()) / (float(whole.abs().max()) or 1.0)
    if not apart <= _CLOSE:
        raise SelectionError(
            f"no decomposition: {name} is not the sum of what the branches add: {apart:.2g} of its largest value is "
            "left, besides rounding. accumulated_resid needs no sum."
        )


def rounding(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[rows, d_model]: the most that the additions of the stream may have rounded away in its dtype.

    Each addition rounds by up to half a unit in the last place of the stream at that layer, which may be far larger
    than at the end. Twice that is allowed, because the output of a branch may be a sum itself.
    """
    return torch.finfo(dtype).eps * (parts.cumsum(0).abs().sum(0) + parts.abs().sum(0))


def _up_to(run: Held, keys: Sequence[Key], layer: int | None) -> tuple[list[Key], Key]:
    """The summands of the stream that enters a layer, and the key of that stream; None: that leaves the last."""
    if layer is None:
        return [*keys], key_of("resid_post", *last_run(run.map))
    if any(kind.calls > 1 for kind in run.map.kinds):
        raise SelectionError("layers of this model run several times in one forward pass: leave `layer` out.")
    if not isinstance(layer, int) or not -run.map.num_layers <= layer < run.map.num_layers:
        raise SelectionError(f"layer {layer!r}: expected a number from 0 to {run.map.num_layers - 1}, or None.")
    layer %= run.map.num_layers
    return [keys[0], *(key for key in keys[1:] if (key[1] or 0) < layer)], ("resid_pre", layer)


def _last(run: Held) -> Key:
    found = [key for key in run.keys if key[0] == "resid_post"]
    return found[-1] if found else ("resid_post", None)


def _stack(run: Held, keys: Sequence[Key]) -> Stack:
    def tensors() -> Iterator[torch.Tensor | list[torch.Tensor]]:
        yield from (run[key] for key in keys)

    return Stack(tuple(map(label, keys)), stacked(tensors(), len(keys), "the stream"))
