"""What each attention head adds to the stream: the output projection of its own part of `z`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hookmap.activations import Key, call_of, key_of
from hookmap.capture.options import Layers
from hookmap.capture.result import Capture
from hookmap.capture.stacks import Stack, label
from hookmap.errors import SelectionError
from hookmap.loading import modules
from hookmap.stores.interface import Store

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}


def head_outputs(
    hm: Hooked, run: Capture | Store, key: Key, close: float, sample: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """From a capture of z and mixer_out: [heads, pos, d_model], and the rest of mixer_out, a bias, [pos, d_model].

    `key`: of mixer_out, in one layer and one of its runs.
    `close`: how much the sum may be off, relative to the largest value. Raises SelectionError where the mixer adds more
    than heads and a bias.
    """
    layer, call = key[1], call_of(key)
    assert layer is not None
    (z_at,), (out_at,) = hm.map.selectors("z", layer, call or 0), hm.map.selectors("mixer_out", layer, call or 0)
    term, z, whole = z_at.terms[0], run.read(sample, "z", layer, call), run.read(sample, *key).float()
    if len(z_at.terms) > 1 or term.side != "input" or term.heads is None or term.heads.start or term.heads.groups > 1:
        raise _refused(hm, layer, "its output projection does not read the heads side by side")
    project, scale = hm.model.get_submodule(term.module), out_at.scale
    count = z.shape[1]
    alone = torch.zeros(count + 1, *z.shape, dtype=z.dtype)  # the last one has no head: it gives the bias
    for head in range(count):
        alone[head, :, head] = z[:, head]
    with torch.no_grad():
        given = alone.flatten(-2).to(modules.device_of(project))
        found = project(given if not term.flat else given.flatten(0, 1))
        found = (found[0] if isinstance(found, tuple) else found).float().cpu() * scale
    found = found.reshape(count + 1, len(z), -1)
    heads, bias = found[:-1] - found[-1], found[-1]
    if found.shape[1:] != whole.shape or not float((heads.sum(0) + bias - whole).abs().max()) <= close * float(
        whole.abs().max()
    ):
        raise _refused(hm, layer, "between its output projection and the stream stands more than a constant")
    return heads, whole - heads.sum(0)


def stack_head_results(hm: Hooked, run: Capture, layers: Layers) -> Stack:
    """See `HookedModel.stack_head_results`."""
    wanted = {s.key for s in hm.selectors("z", layers)}
    keys = [key for key in run.keys if key[0] == "z" and key in wanted]
    owners = [key_of("mixer_out", key[1], call_of(key)) for key in keys]
    if not keys or any(key not in run.keys for key in owners):
        raise SelectionError(
            'results of heads need z and mixer_out of the same layers: hm.capture(prompts, ["z", "mixer_out"]).'
        )
    labels: list[str] = []
    parts: list[torch.Tensor] = []
    for sample in run.samples:
        found = [head_outputs(hm, run, key, close_to(run, key), sample.sample)[0] for key in owners]
        labels = [f"{label(key)} head {n}" for key, own in zip(owners, found, strict=True) for n in range(len(own))]
        parts.append(torch.cat(found))
    same = len({part.shape for part in parts}) == 1
    return Stack(tuple(labels), torch.stack(parts, 1) if same else parts)


def close_to(run: Capture | Store, key: Key) -> float:
    """How much two sums of a tensor may differ, relative to its largest value."""
    return _CLOSE.get(run.read(run.samples[0].sample, *key).dtype, 4e-2)


def _refused(hm: Hooked, layer: int, reason: str) -> SelectionError:
    return SelectionError(
        f"no attribution to the heads of layer {layer} of {hm.map.architecture}: {reason}. Leave heads out: the "
        "mixer as a whole is attributed."
    )
