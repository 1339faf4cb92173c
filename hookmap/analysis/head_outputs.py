"""What each attention head, or each neuron of an MLP, adds to the stream: the output projection of its own part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hookmap.activations import Key, call_of, key_of
from hookmap.capture.options import Layers
from hookmap.capture.result import Capture
from hookmap.capture.stacks import Stack, label
from hookmap.errors import SelectionError
from hookmap.loading import modules
from hookmap.maps.points import PointName
from hookmap.stores.interface import Store

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

MORE = "between its output projection and the stream stands more than a constant"
"""why a branch is not the sum of what its parts give"""
_TOGETHER = 256
"""neurons that are projected together"""
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
        raise refused(hm, layer, "its output projection does not read the heads side by side")
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
        raise refused(hm, layer, MORE)
    return heads, whole - heads.sum(0)


def neuron_outputs(
    hm: Hooked, run: Capture | Store, key: Key, close: float, sample: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """From a capture of mlp_post and mlp_out: [neurons, pos, d_model], and the rest of mlp_out, a bias, [pos, d_model].

    As `head_outputs`. Raises SelectionError where the MLP has no such neurons, or adds more than them and a bias.
    """
    layer, call = key[1], call_of(key)
    assert layer is not None
    point = PointName.of(key[0]).numbered("mlp_post")
    (post_at,), (out_at,) = hm.map.selectors(point, layer, call or 0), hm.map.selectors(key[0], layer, call or 0)
    term, post, whole = post_at.terms[0], run.read(sample, point, layer, call), run.read(sample, *key).float()
    if len(post_at.terms) > 1 or term.side != "input" or term.operation is not None:
        raise refused(hm, layer, f"{point} is not what one module reads", "neurons", "MLP")
    project, count = hm.model.get_submodule(term.module), post.shape[-1]

    def added(first: int, last: int) -> torch.Tensor:
        """Of neurons first to last, each alone; of none, the bias."""
        alone = torch.zeros(max(1, last - first), *post.shape, dtype=post.dtype)
        for neuron in range(first, last):
            alone[neuron - first, :, neuron] = post[:, neuron]
        with torch.no_grad():
            given = alone.to(modules.device_of(project))
            found = project(given.flatten(0, 1) if term.flat else given)
        found = (found[0] if isinstance(found, tuple) else found).float().cpu() * out_at.scale
        rows: torch.Tensor = found.reshape(len(alone), len(post), -1)
        return rows

    bias = added(0, 0)[0]
    parts = [added(start, min(start + _TOGETHER, count)) - bias for start in range(0, count, _TOGETHER)]
    neurons = torch.cat(parts)
    apart = (neurons.sum(0) + bias - whole).abs().max() if bias.shape == whole.shape else torch.tensor(float("nan"))
    if not float(apart) <= close * float(whole.abs().max()):
        raise refused(hm, layer, MORE, "neurons", "MLP")
    return neurons, whole - neurons.sum(0)


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


def refused(hm: Hooked, layer: int, reason: str, what: str = "heads", branch: str = "mixer") -> SelectionError:
    """The error that says why a branch is no sum of these."""
    return SelectionError(
        f"no attribution to the {what} of layer {layer} of {hm.map.architecture}: {reason}. Leave {what} out: the "
        f"{branch} as a whole is attributed."
    )
