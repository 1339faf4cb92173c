"""What each attention head adds to the stream: the output projection of its own part of `z`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hookmap.activations import Key, call_of
from hookmap.capture.result import Capture
from hookmap.errors import SelectionError
from hookmap.loading import modules

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked


def head_outputs(hm: Hooked, run: Capture, key: Key, close: float) -> tuple[torch.Tensor, torch.Tensor]:
    """From a capture of z and mixer_out: [heads, pos, d_model], and the rest of mixer_out, a bias, [pos, d_model].

    `key`: of mixer_out, in one layer and one of its runs.
    `close`: how much the sum may be off, relative to the largest value. Raises SelectionError where the mixer adds more
    than heads and a bias.
    """
    layer, call = key[1], call_of(key)
    assert layer is not None
    (z_at,), (out_at,) = hm.map.selectors("z", layer, call or 0), hm.map.selectors("mixer_out", layer, call or 0)
    term, z, whole = z_at.terms[0], run.read(0, "z", layer, call), run.read(0, *key).float()
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


def _refused(hm: Hooked, layer: int, reason: str) -> SelectionError:
    return SelectionError(
        f"no attribution to the heads of layer {layer} of {hm.map.architecture}: {reason}. Leave heads out: the "
        "mixer as a whole is attributed."
    )
