"""Checks of attention heads: the attention weights, and the causes that one head's q, k and v are of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hookmap.maps.selectors import Term
from hookmap.maps.templates import BlockKind
from hookmap.verification.check import Check, relative_error
from hookmap.verification.context import Context
from hookmap.verification.runner import POSITIONS, Hook, forward, observe


def patterns(run: Context) -> Iterator[Check]:
    """No weight is negative, and the weights of a query sum to 1, or to less where an attention sink takes the rest."""
    layers = [layer for point, layer in run.values if point == "pattern" and layer is not None]
    if not layers:
        return
    weights = [run.pattern(layer).float() for layer in layers]
    sums = torch.stack([each.sum(-1).flatten() for each in weights if each.numel()])
    ahead = max(float(each.triu(1).abs().max()) for each in weights)
    least = min(float(each.min()) for each in weights)
    whole = float((sums - 1).abs().max()) <= run.tolerance
    rows = "sum to 1" if whole else "sum to less than 1 (attention sinks take the rest)"
    causal = "none looks ahead" if ahead <= run.tolerance else "some look ahead (this model is not causal)"
    passed = least >= 0 and bool((sums <= 1 + run.tolerance).all())
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
    if not layers or len(returned) != len(layers) or any(each.shape[-1] != POSITIONS for each in returned):
        return
    error = max(relative_error(run.pattern(i), each) for i, each in zip(layers, returned, strict=True))
    yield Check("attentions", tuple(layers), error <= run.tolerance, "pattern = attentions[i]", error)


def _returned_attentions(run: Context) -> list[Tensor]:
    try:
        output = forward(run.model, run.ids, output_attentions=True)
    except (TypeError, ValueError, NotImplementedError):
        return []  # the model cannot return them
    returned = getattr(output, "attentions", None) or ()
    return [each for each in returned if isinstance(each, Tensor) and each.dim() == 4]


def one_head(run: Context) -> Iterator[Check]:
    """Turn the sign of the last head's q or k at one position, and see which attention weights move.

    Only those of its heads may, and only at the queries that see the position: for q that position itself, for k it
    and those behind it. v is turned where something stands between it and z; else `z = pattern @ v` has proved it.
    """
    for kind in run.map.kinds:
        for point, read in (("q", "pattern"), ("k", "pattern"), ("v", "z")):
            if _is_to_be_turned(run, kind, point, read):
                yield _turn(run, point, read, kind.layers[0])


def _is_to_be_turned(run: Context, kind: BlockKind, point: str, read: str) -> bool:
    proved = point == "v" and "z = pattern @ v" in kind.relations
    return not proved and all((name, kind.layers[0]) in run.values for name in (point, read))


def _turn(run: Context, point: str, read: str, layer: int) -> Check:
    own, count = run.values[point, layer].shape[2], run.values[read, layer].shape[2]
    place = POSITIONS // 2
    turning = _turning(run.selector[point, layer].terms[0], own - 1, place)
    seen = [run.selector[name, layer] for name in {read, "pattern"} if (name, layer) in run.selector]
    after, _ = observe(run.model, run.ids, seen, [turning])
    if point == "v" and ("pattern", layer) in after:
        error = relative_error(after["pattern", layer], run.values["pattern", layer])
        if error > run.tolerance:
            return Check("head", (layer,), False, f"v of layer {layer} decides the pattern, as q or k does", error)
    before, turned = (_comparable(values[read, layer], read) for values in (run.values, after))
    change = (turned - before).abs().amax((0, 3))  # [position, head]
    moved = change > run.tolerance
    heads, places = moved.any(0).nonzero().flatten().tolist(), moved.any(1).nonzero().flatten().tolist()
    # The queries that share a key are neighbours, or (JetMoE) every own-th.
    shared = (list(range(count - count // own, count)), list(range(own - 1, count, own)))
    # A norm over all heads, behind z (BitNet) or q and k (ESM C), moves the others too, by less.
    most = any(int(change.amax(0).argmax()) in each for each in shared)
    right = heads in shared or (most and (point == "v" or heads == list(range(count))))
    what = f"the sign of {point} of head {own - 1} at position {place} turned in layer {layer}"
    detail = f"{what}: {read} moves in heads {heads} at positions {places}"
    return Check("head", (layer,), right and _see(run, point, layer, place, places), detail)


def _comparable(tensor: Tensor, point: str) -> Tensor:
    """Of attention weights their logarithms: where a head attends to one key alone, what moves is very small."""
    return tensor.double().clamp_min(1e-37).log() if point == "pattern" else tensor.double()


def _see(run: Context, point: str, layer: int, place: int, places: list[int]) -> bool:
    """Whether these are queries that see position `place`: with sparse attention not all behind it do."""
    if point == "q":
        return places == [place]
    if ("pattern", layer) not in run.values or run.pattern(layer).float().triu(1).any():
        return bool(places)  # every position may see every other
    behind = bool((run.pattern(layer)[:, :, place + 1 :, place] > 0.05).any())
    return bool(places) and places[0] >= place and (places[-1] > place or not behind)


def _turning(term: Term, head: int, place: int) -> Hook:
    """A hook that turns the sign of one head's features at one position in a module's output, in the term's call."""
    calls = itertools.count()

    def act(args: Any, kwargs: Any, output: Any) -> Any:
        if term.call not in (None, next(calls)):
            return None
        tensor = output if term.index is None else output[term.index]
        features = torch.arange(tensor.shape[-1], device=tensor.device)
        mine = Term(term.module, "output", None, heads=term.heads).resolve((), {}, features)[head]
        turned = tensor.clone()
        rows = turned.unflatten(0, (-1, POSITIONS)) if term.flat else turned
        rows = rows if term.axes is None else rows.movedim(term.axes.index("pos"), -2)  # positions first (FSMT)
        before = rows.shape[-2] - POSITIONS if term.rows == "last" else 0  # positions of no token (CPM-Ant)
        rows[..., before + place, mine] *= -1  # writes to `turned`, also where `rows` is a view of it
        if term.index is None:
            return turned
        return tuple(turned if number == term.index else each for number, each in enumerate(output))

    return Hook(term.module, "output", act)
