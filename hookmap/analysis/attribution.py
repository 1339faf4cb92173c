"""Direct logit attribution: how much of a logit, or of a difference of two, each branch wrote into the stream.

The stream behind the last block is a sum: what entered the first block, and what each branch added. The final norm
divides it by one number a position, its statistic. With that number held at what it was, norm and unembedding are
linear, and the logit is a sum too: one number for each summand, and one for the biases. Both sums are checked.
A stream in bfloat16 is its sum but for rounding, which is a summand by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import torch

from hookmap.activations import Key, Sample, key_of
from hookmap.analysis.branches import points_of
from hookmap.analysis.directions import Aim, aimed
from hookmap.analysis.head_outputs import close_to
from hookmap.analysis.stream_parts import Inside, inside_of, parts_of
from hookmap.analysis.tokens import row_positions, token_id, token_text, token_texts
from hookmap.analysis.unembedding import Unembedding, apply, unembedding_of
from hookmap.capture.engines.model_lock import lock_of
from hookmap.capture.finiteness import not_finite
from hookmap.capture.options import Layers, TemplateOptions
from hookmap.capture.result import Capture
from hookmap.capture.stacks import label, rounding
from hookmap.errors import SelectionError
from hookmap.maps.calls import last_run
from hookmap.maps.summands import summands
from hookmap.stores.interface import Store
from hookmap.wording import counted

if TYPE_CHECKING:
    from hookmap.analysis.steering import SteeringVector
    from hookmap.capture.hooked import Hooked

log = logging.getLogger("hookmap")

BIAS = "bias"
ROUNDING = "rounding"


@dataclass(frozen=True)
class Attribution:
    """The parts that a logit is the sum of. Tensors are float32, on the CPU."""

    parts: tuple[str, ...]
    """in forward order: `resid_pre[0]` (embedding, positions, scale), `mixer_out[0]`, `mlp_out[0]`, …, `bias`

    If the stream's dtype is narrower than float32, `rounding` precedes the bias: what its additions rounded away.
    """
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    """the text of each position's token"""
    values: torch.Tensor
    """[parts, positions]: what each part adds to the logit"""
    logit: torch.Tensor
    """[positions]: the model's logit (difference) at each position; before the soft-cap, where there is one"""
    target: tuple[str, ...]
    """the token of each position whose logit it is"""
    against: str | None
    """the token whose logit is subtracted, or None"""
    before_soft_cap: bool
    direction: str = ""
    """where the parts add to a direction and not to a logit: which stream it reads; `logit` is what it reads there"""

    def __repr__(self) -> str:
        sizes = f"{counted(len(self.parts), 'part')} × {counted(len(self.positions), 'position')}"
        if self.direction:
            return f"<Attribution of the {self.direction}: {sizes}>"
        return f"<Attribution of a logit: {sizes}>" if self.against is None else f"<Attribution of two logits: {sizes}>"

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        names = ("parts", "positions", "tokens", "target", "against", "before_soft_cap", "direction")
        found = {name: getattr(self, name) for name in names}
        return {**found, "values": self.values.tolist(), "logit": self.logit.tolist()}


def attribute(
    hm: Hooked,
    prompt: Any,
    target: int | str | None = None,
    against: int | str | None = None,
    *,
    positions: Any = "last",
    heads: bool = False,
    neurons: Layers = (),
    experts: Layers = (),
    direction: torch.Tensor | Sequence[float] | SteeringVector | None = None,
    layer: int | None = None,
    sample: int = 0,
    **template: Unpack[TemplateOptions],
) -> Attribution:
    """See `HookedModel.attribute`."""
    names = _summands(hm)
    if direction is None and layer is not None:
        raise SelectionError("layer= is of the stream that a direction reads: give direction=, or leave it out.")
    inside = inside_of(hm, heads, neurons, experts)
    aim = None if direction is None else aimed(hm.map, names, direction, layer, (target, against))
    names, whole = (names, key_of("resid_post", *last_run(hm.map))) if aim is None else (aim.names, aim.whole)
    unembedding = unembedding_of(hm) if aim is None else None
    if isinstance(prompt, Capture | Store):
        run: Capture | Store = prompt
        _refuse_missing(run, [*names, whole, *inside.keys(hm.map, names)], heads)
    else:
        run, sample = _captured(hm, prompt, [*names, whole], inside, positions, template), 0
    close = unembedding.tolerance if unembedding else close_to(run, whole)
    with lock_of(hm.model).shared():
        parts = parts_of(hm, run, names, inside, close, sample)
        stream = _Split(hm, run, run.sample(sample), whole, close, *parts)
        if unembedding is None:
            assert aim is not None
            return _projected(stream, aim)
        return _read(stream, unembedding, target, against)


@dataclass(frozen=True)
class _Split:
    """A sample's stream, and the parts that it is said to be the sum of."""

    hm: Hooked
    run: Capture | Store
    sample: Sample
    whole: Key
    close: float
    labels: list[str]
    parts: torch.Tensor


def _captured(hm: Hooked, prompt: Any, keys: list[Key], inside: Inside, positions: Any, template: Any) -> Capture:
    wanted: dict[str, Any] = points_of([keys[0], keys[-1], *inside.keys(hm.map, keys)])
    wanted |= dict.fromkeys([*(key[0] for key in keys[1:-1]), *(["z"] if inside.heads else [])], "all")
    encoded = hm.encode(prompt, **template)
    if len(encoded) != 1:
        raise SelectionError(f"an attribution is of one prompt, got {len(encoded)}: call it for each.")
    run = hm.capture(encoded, wanted, max_new_tokens=0, positions=positions)
    if not all(bool(run.read(0, *key).isfinite().all()) for key in run.keys):
        raise not_finite(hm, encoded[0], "direct logit attribution")
    return run


def _refuse_missing(run: Capture | Store, keys: list[Key], heads: bool) -> None:
    missing = [key for key in dict.fromkeys(keys) if key not in run.keys]
    missing += [("z", None)] if heads and "z" not in run.points else []
    if missing:
        shown = ", ".join(label(key) if key[1] is not None else key[0] for key in missing[:6])
        points = list(dict.fromkeys([*(key[0] for key in keys), *(["z"] if heads else [])]))
        raise SelectionError(
            f"this capture has no {shown}{', …' if len(missing) > 6 else ''}, which an attribution needs: "
            f"hm.capture(prompts, {points})."
        )


def _projected(split: _Split, aim: Aim) -> Attribution:
    """The parts of the stream, as the direction reads them."""
    positions = row_positions(split.sample)
    stream = split.run.read(split.sample.sample, *split.whole)
    labels, parts = _exact_parts(split.hm, stream, split.labels, split.parts, positions, split.close)
    return Attribution(
        tuple(labels),
        positions,
        token_texts(split.hm, split.sample.token_ids, positions, split.sample.image_positions or ()),
        parts @ aim.vector,
        stream.float() @ aim.vector,
        target=("",) * len(positions),
        against=None,
        before_soft_cap=False,
        direction=f"direction at {label(aim.whole)}",
    )


def _summands(hm: Hooked) -> list[Key]:
    """The summands of the stream, in forward order. Raises SelectionError where it is no sum."""
    found = summands(hm.map)
    if isinstance(found, str):
        raise _refused(hm, found)
    return [*found]


def _read(split: _Split, unembedding: Unembedding, target: int | str | None, against: int | str | None) -> Attribution:
    hm, sample, close = split.hm, split.sample, split.close
    positions, last = row_positions(sample), split.run.read(sample.sample, *split.whole)
    labels, parts = _exact_parts(hm, last, split.labels, split.parts, positions, close)
    logits = apply(unembedding.before_cap, last[None])[0]
    aim = logits.argmax(-1).cpu() if target is None else torch.full((len(positions),), token_id(hm, target))
    other = None if against is None else token_id(hm, against, "against")

    normed, shift = _frozen_norm(hm, unembedding, last, parts)
    reads, zero = _reads(hm, unembedding, shift, aim, other)
    values = torch.cat([(normed * reads).sum(-1), ((shift * reads).sum(-1) + zero)[None]])
    logit = _picked(logits.float().cpu(), aim, other)
    wrong = float((values.sum(0) - logit).abs().max() / logits.float().abs().max())
    if not wrong <= 4 * close:
        raise _refused(hm, f"what stands behind the final norm is not linear: the sum misses the logit by {wrong:.2g}")
    return Attribution(
        (*labels, BIAS),
        positions,
        token_texts(hm, sample.token_ids, positions, sample.image_positions or ()),
        values,
        logit,
        target=tuple(token_text(hm, token) for token in aim.tolist()),
        against=None if other is None else token_text(hm, other),
        before_soft_cap=bool(unembedding.cap),
    )


def _exact_parts(
    hm: Hooked,
    last: torch.Tensor,
    labels: list[str],
    parts: torch.Tensor,
    positions: tuple[int, ...],
    close: float,
) -> tuple[list[str], torch.Tensor]:
    """Parts whose sum is exactly the stream `last`: for a dtype narrower than float32, with the rounding as a part.

    Raises SelectionError where more than rounding is missing.
    """
    left, largest = last.float() - parts.sum(0), float(last.float().abs().max())
    allowed = rounding(parts, last.dtype)
    apart = float((left.abs() - allowed).max()) / largest
    if not apart <= close:
        raise _refused(
            hm,
            f"the stream is not the sum of what the branches add: {apart:.2g} of its largest is left, besides the "
            f"rounding of {_named(last.dtype)} ({float(allowed.max()) / largest:.2g} at most)",
        )
    if last.dtype == torch.float32:
        return labels, parts
    _tell_rounding(left, parts, labels, positions, last, close)
    return [*labels, ROUNDING], torch.cat([parts, left[None]])


def _picked(logits: torch.Tensor, aim: torch.Tensor, other: int | None) -> torch.Tensor:
    """[pos, d_vocab] -> [pos]: the logit of each position's token, minus that of the other token."""
    at = logits.gather(-1, aim[:, None])[:, 0]
    return at if other is None else at - logits[:, other]


def _reads(
    hm: Hooked, unembedding: Unembedding, like: torch.Tensor, aim: torch.Tensor, other: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the logit (difference) by the normed stream, [pos, d_model], and its value at stream 0, [pos].

    Steps after the norm are linear, so these two determine them, and parts can be multiplied in float32 in a narrower
    model, too. The gradient is taken at 0; a step that is not linear is then found, as the sum misses the logit.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(len(aim), like.shape[-1], dtype=unembedding.dtype, device=like.device, requires_grad=True)
        found = x[None]
        for step in unembedding.after:
            found = step(found)
        logits, ids = found[0], aim.to(found.device)
        try:
            (reads,) = torch.autograd.grad(logits.gather(-1, ids[:, None]).sum(), x, retain_graph=True)
            reads = reads.float()
            if other is not None:
                reads = reads - torch.autograd.grad(logits[:, other].sum(), x)[0].float()
        except RuntimeError as error:
            raise _refused(hm, f"no gradient goes through what stands behind the final norm ({error})") from error
    return reads.cpu(), _picked(logits.detach().float().cpu(), aim, other)


def _tell_rounding(
    left: torch.Tensor, parts: torch.Tensor, labels: list[str], rows: tuple[int, ...], last: torch.Tensor, close: float
) -> None:
    """Warns where rounding is not negligible: where the stream was far larger in between than it is at the end."""
    share = left.abs().amax(1) / last.float().abs().amax(1)
    worst = int(share.argmax())
    if float(share[worst]) <= close:
        return
    stream = parts[:, worst].cumsum(0).abs().amax(1)
    most = int(stream.argmax())
    log.warning(
        "the part `rounding` counts: at position %d the stream reached %.5g (behind %s), where %s has steps of %.3g, "
        "and it ends at %.5g; up to %.3g was rounded away. For parts that are exact, open the model in float32: "
        'dtype="float32" (--dtype float32)',
        rows[worst],
        float(stream[most]),
        labels[most],
        _named(last.dtype),
        float(torch.finfo(last.dtype).eps * 2 ** stream[most].log2().floor()),
        float(last[worst].abs().max()),
        float(left[worst].abs().max()),
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _frozen_norm(
    hm: Hooked, unembedding: Unembedding, last: torch.Tensor, parts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts [parts, pos, d] under the norm, with the whole stream's statistic, and the norm's bias [d]; float32.

    A layer norm is weight * (x - mean) / statistic + bias, an RMS norm the same without the mean and mostly without
    the bias. Which of them a module is, and its weight and bias, are determined from its outputs for three vectors.
    """
    stream = apply(unembedding.before, last[None])[0]
    parts = torch.stack([apply(unembedding.before, part[None])[0] for part in parts])
    if unembedding.norm is None:
        return parts.float().cpu(), torch.zeros_like(stream[0]).float().cpu()
    norm = unembedding.norm
    # Alternating signs have mean 0 and mean square 1; at this size the norm's epsilon is negligible.
    signs = torch.ones_like(stream[0])
    signs[1::2] = -1
    given = torch.stack([torch.zeros_like(signs), 64 * signs, 64 * torch.ones_like(signs)])
    bias, up, flat = apply((norm,), given[None])[0].float()
    weight: torch.Tensor = (up - bias) * signs.float().to(up.device)
    centred = bool((flat - bias).abs().max() < 1e-3 * weight.abs().max())

    def linear(x: torch.Tensor) -> torch.Tensor:
        x = x.float().to(weight.device)
        centre = x.mean(-1, keepdim=True) if centred else torch.zeros_like(x[..., :1])
        return weight * (x - centre)

    out = apply((norm,), stream[None])[0]
    whole = linear(stream)
    share = ((out.float() - bias) * whole).sum(-1, keepdim=True) / whole.square().sum(-1, keepdim=True)
    if not float((whole * share + bias - out.float()).abs().max()) <= unembedding.tolerance * float(out.abs().max()):
        raise _refused(hm, f"its final norm {norm.name} is neither a layer norm nor an RMS norm")
    return (linear(parts) * share).cpu(), bias.cpu()


def _refused(hm: Hooked, reason: str) -> SelectionError:
    return SelectionError(
        f"no direct logit attribution for {hm.map.architecture}: {reason}. A lens needs no sum: hookmap lens"
    )
