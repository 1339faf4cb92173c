"""Checks of attention heads: the attention weights, and the causes that one head's q, k and v are of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hookmap.maps.describe import layer_ranges
from hookmap.maps.templates import BlockKind
from hookmap.verification.check import Check, Key, relative_error
from hookmap.verification.context import Context
from hookmap.verification.runner import Hook, forward, observe


def patterns(run: Context) -> Iterator[Check]:
    """No weight is negative, and the weights of a query sum to 1, or to less where an attention sink takes the rest."""
    layers = [layer for point, layer in run.values if point == "pattern" and layer is not None]
    if not layers:
        return
    weights = [run.pattern(layer).float() for layer in layers]
    sums = torch.stack([each.sum(-1).flatten() for each in weights if each.numel()])
    ahead = max(float(each.triu(1).abs().max()) for each in weights)
    least = min(float(each.min()) for each in weights)
    limit = run.limit(*(("pattern", layer) for layer in layers))
    whole = float((sums - 1).abs().max()) <= limit
    rows = "sum to 1" if whole else "sum to less than 1 (attention sinks take the rest)"
    causal = "none looks ahead" if ahead <= run.tolerance else "some look ahead (this model is not causal)"
    passed = least >= 0 and bool((sums <= 1 + limit).all())
    detail = f"rows of pattern {rows}, none negative, {causal}"
    yield Check("pattern", tuple(layers), passed, detail, max(0.0, -least))


def attentions(run: Context) -> Iterator[Check]:
    """`pattern` is what Hugging Face returns as `attentions`."""
    layers = run.layers_with("pattern")
    returned = _returned_attentions(run) if layers else []
    if run.number < len(returned) == len(run.visits) > 0:
        returned = [returned[run.visits.index((layer, run.number))] for layer in layers]
    elif len(returned) == run.map.num_layers:
        returned = [returned[layer] for layer in layers]
    if not layers or len(returned) != len(layers) or any(each.shape[-1] != run.given.positions for each in returned):
        return
    error = max(relative_error(run.pattern(i), each) for i, each in zip(layers, returned, strict=True))
    yield Check("attentions", tuple(layers), error <= run.tolerance, "pattern = attentions[i]", error)


def _returned_attentions(run: Context) -> list[Tensor]:
    try:
        output = forward(run.model, run.given, output_attentions=True)
    except (TypeError, ValueError, NotImplementedError):
        return []  # the model cannot return them
    returned = getattr(output, "attentions", None) or ()
    return [each for each in returned if isinstance(each, Tensor) and each.dim() == 4]


def one_head(run: Context) -> Iterator[Check]:
    """Change the last head's q, k, v or z at one position, and see what moves.

    q decides the attention weights of its heads, and only at that position; k those of the queries that see the
    position; v and z decide none. Where no boundary exposes the weights, z or the mixer's output shows what moves,
    and by how much tells v and z from q and k. What a relation has proved (`z = pattern @ v`,
    `mixer_out_raw = o_proj(z)`) is left out.
    """
    for kind in run.map.kinds:
        layer = kind.layers[0]
        behind = ("z", "mixer_out_raw", "mixer_out")
        for point, among in (
            ("q", ("pattern", *behind)),
            ("k", ("pattern", *behind)),
            ("v", behind),
            ("z", behind[1:]),
        ):
            read = next((name for name in among if (name, layer) in run.values), None)
            if read is not None and (point, layer) in run.values and not _is_proved(kind, point):
                yield _turn(run, point, read, layer)


def _is_proved(kind: BlockKind, point: str) -> bool:
    """Whether arithmetic has shown what the point is, or v has: what v moves is z."""
    if point == "z":
        return "v" in kind.points or any(text.endswith("(z)") for text in kind.relations)
    return point == "v" and "z = pattern @ v" in kind.relations


def _turn(run: Context, point: str, read: str, layer: int) -> Check:
    own = run.values[point, layer].shape[2]
    place = run.given.positions // 2
    after = _under(run, point, layer, read, times(run, point, layer, own - 1, place, -1.0))
    is_key = point == "v" and _is_k(run, layer)
    if point in ("v", "z") and ("pattern", layer) in after and not is_key:
        error = relative_error(after["pattern", layer], run.values["pattern", layer])
        if error > run.tolerance:
            detail = f"{point} of layer {layer} decides the pattern, as q or k does"
            return Check("head", (layer,), False, detail, error)
    before, turned = (_comparable(values[read, layer], read) for values in (run.values, after))
    change = (turned - before).abs().amax((0, 3)) if before.dim() > 3 else (turned - before).abs().amax((0, 2))[:, None]
    moved = change > run.tolerance  # [position, head]
    heads, places = moved.any(0).nonzero().flatten().tolist(), moved.any(1).nonzero().flatten().tolist()
    what = f"the sign of {point} of head {own - 1} at position {place} turned in layer {layer}"
    where = f" in heads {heads}" if before.dim() > 3 else ""
    detail = f"{what}: {read} moves{where} at positions {layer_ranges(places)}"
    right = _are_its_heads(run, point, read, layer, change, heads) and _see(run, point, layer, place, places)
    if right and (is_key or ("pattern", layer) not in run.values):
        held = point in ("v", "z")
        right = _holds_values(run, point, read, layer, place, turned - before) == held
        detail += "" if right else f", {'not as' if held else 'as'} what is weighed does"
    return Check("head", (layer,), right, detail)


def _is_k(run: Context, layer: int) -> bool:
    """Whether the map says that keys and values are one tensor (DeepSeek-V4), which decides the pattern by right."""
    k, v = (run.selector.get((point, layer)) for point in ("k", "v"))
    return k is not None and v is not None and k.terms == v.terms


def _are_its_heads(run: Context, point: str, read: str, layer: int, change: Tensor, heads: list[int]) -> bool:
    """Whether what moves are the heads that the point's last one serves. `change`: [position, head]."""
    if run.values[read, layer].dim() == 3:
        return bool(heads)  # what the mixer gives has no heads
    own, count = run.values[point, layer].shape[2], run.values[read, layer].shape[2]
    # The queries that share a key are neighbours, or (JetMoE) every own-th.
    shared = (list(range(count - count // own, count)), list(range(own - 1, count, own)))
    # A norm over all heads, behind z (BitNet) or q and k (ESM C), moves the others too, by less.
    most = any(int(change.amax(0).argmax()) in each for each in shared)
    return heads in shared or (most and (point == "v" or heads == list(range(count))))


def _holds_values(run: Context, point: str, read: str, layer: int, place: int, turned: Tensor) -> bool:
    """Whether what is read depends on the point as on values: in proportion, or not on the tokens where it is zero.

    Keys or queries that are zero leave a mean of the values, which differs from token to token. A norm behind z
    (BitNet) ends the proportion, and values of an earlier block that are added to these the other.
    """
    zero, others = (
        _under(each, point, layer, read, times(run, point, layer, None, place, 0.0))[read, layer]
        for each in (run, replace(run, given=run.given.other()))
    )
    if all(relative_error(each, zero[:1, :1].expand_as(each)) <= run.tolerance for each in (zero, others)):
        return True
    one = _under(run, point, layer, read, times(run, point, layer, run.values[point, layer].shape[2] - 1, place, 0.0))
    change = (one[read, layer] - run.values[read, layer]).double()
    return relative_error(2 * change, turned) <= run.tolerance


def _under(run: Context, point: str, layer: int, read: str, hook: Hook) -> dict[Key, Tensor]:
    seen = [run.selector[name, layer] for name in {read, "pattern"} if (name, layer) in run.selector]
    return observe(run.model, run.given, seen, [hook])[0]


def _comparable(tensor: Tensor, point: str) -> Tensor:
    """Of attention weights their logarithms: where a head attends to one key alone, what moves is very small."""
    return tensor.double().clamp_min(1e-37).log() if point == "pattern" else tensor.double()


def _see(run: Context, point: str, layer: int, place: int, places: list[int]) -> bool:
    """Whether these are queries that see position `place`: with sparse attention not all behind it do."""
    if point in ("q", "z"):
        return places == [place]
    if ("pattern", layer) not in run.values:
        return places not in ([], [place])
    weights = run.pattern(layer).float()
    others = (weights[..., place] > 0.05).any(0).any(0)  # the queries that attend to it
    others[place] = False
    seen = places != [place] or not bool(others.any())
    return bool(places) and seen and (places[0] >= place or bool(weights.triu(1).any()))


def times(run: Context, point: str, layer: int, head: int | None, place: int, factor: float) -> Hook:
    """A hook that multiplies one head's features at one position, or all heads' at all, in the term's call."""
    term, width = run.selector[point, layer].terms[0], run.given.positions
    calls = itertools.count()

    def act(args: Any, kwargs: Any, output: Any) -> Any:
        if term.call not in (None, next(calls)):
            return None
        whole = term.whole(args, kwargs, output)
        features = torch.arange(whole.shape[-1], device=whole.device)
        mine = term.view(features)
        mine = mine.flatten() if head is None else mine[head]
        turned = whole if term.side == "input" else whole.clone()
        rows = turned.unflatten(0, (-1, width)) if term.flat else turned
        rows = rows if term.axes is None else rows.movedim(term.axes.index("pos"), -2)  # positions first (FSMT)
        before = rows.shape[-2] - width if term.rows == "last" else 0  # positions of no token (CPM-Ant)
        at_places = slice(before, before + width) if head is None else slice(before + place, before + place + 1)
        rows[..., at_places, mine] *= factor  # writes to `turned`, also where `rows` is a view of it
        if term.side == "input":
            return None
        if term.index is None:
            return turned
        return tuple(turned if number == term.index else each for number, each in enumerate(output))

    return Hook(term.module, term.side, act)
