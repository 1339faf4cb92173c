"""Checks of the points inside a branch, by arithmetic: the model's own modules applied to what was captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hookmap.maps.points import PointName
from hookmap.maps.relations import Relation
from hookmap.maps.templates import BlockKind, is_template
from hookmap.verification.check import Check, relative_error
from hookmap.verification.context import Context, modules_of

_ONE_TENSOR = (
    "mixer_in", "cross_attn_in", "mlp_in", "q_latent", "k_latent", "q", "k", "v", "q_rot", "k_rot", "attn_scores",
    "pattern", "z",
    "mlp_pre", "mlp_pre_linear", "mlp_post",
    "router_logits", "router_indices", "router_weights",
)  # fmt: skip


def bare(run: Context) -> Iterator[Check]:
    """What a branch reads or has inside is one tensor as it is; its bare output is what modules of it return."""
    wrong = []
    for kind in run.map.kinds:
        for point, template in kind.points.items():
            name, terms = PointName.of(PointName.of(point).as_mixer()).base, template.terms
            if name in _ONE_TENSOR and (len(terms) > 1 or terms[0].scale != 1 or terms[0].weight):
                wrong.append(f"{point} is a sum or has a factor")
            elif name.endswith("_raw") and not _is_bare(run, kind, point):
                wrong.append(f"{point} is not what its branch returns")
    detail = "; ".join(dict.fromkeys(wrong)) or "what branches read, hold and return are tensors as they are"
    yield Check("bare", (), not wrong, detail)


def _is_bare(run: Context, kind: BlockKind, point: str) -> bool:
    """Whether `mixer_out_raw` is an output of a module of its branch, shaped as `mixer_in`.

    Or a sum, as of two mixers or a branch with a residual of its own: then `mixer_out` is a multiple of it, and the
    stream itself is none of its terms.
    """
    terms, layer = kind.points[point].terms, kind.layers[0]
    ends = (PointName.of(point).end(name) for name in ("out_raw", "out", "in"))
    bare, added, read = (run.values.get((name, layer)) for name in ends)
    if any(term.scale != 1 or term.weight for term in terms) or len(set(terms)) < len(terms):
        return False
    if len(terms) > 1:
        if any(point.terms[0] in terms for name, point in kind.points.items() if name.startswith("resid_")):
            return False
        return bare is None or added is None or _is_multiple(added, bare, run.tolerance)
    path = run.map.at_layer(terms[0].module, layer)
    roots = modules_of(run, kind, point, layer)  # of a branch without weights (FNet) there are none
    own = not roots or any(f"{path}.".startswith(f"{root}.") for root in roots)
    return own and terms[0].side == "output" and (bare is None or read is None or bare.shape == read.shape)


def _is_multiple(of: Tensor, bare: Tensor, tolerance: float) -> bool:
    return relative_error(bare * ((bare * of).sum() / bare.square().sum()), of) <= tolerance


def branches(run: Context) -> Iterator[Check]:
    """What each kind of block computes inside its branches: its relations that are no sums, and its router."""
    for kind in run.map.kinds:
        yield from _products(run, kind)
        yield from _router(run, kind)


def _products(run: Context, kind: BlockKind) -> Iterator[Check]:
    """`mixer_out_raw = o_proj(z)`, `z = pattern @ v`, `router_indices = topk(router_logits)`, …"""
    for text in kind.relations:
        relation = Relation.parse(text)
        if relation is not None and relation.form == "sum":
            continue  # see verification.relations
        compute = None if relation is None else _right_side(run, relation)
        if relation is None or compute is None:
            yield Check("inside", kind.layers, False, f"{text}: hookmap knows no such relation")
            continue
        layers = [i for i in kind.layers if all((name, i) in run.values for name in relation.points())]
        errors = [_error(run, relation.total, layer, compute(layer)) for layer in layers]
        holds = len(layers) == len(kind.layers) and max(errors) <= run.tolerance
        yield Check("inside", kind.layers, holds, text, max(errors, default=None))


def _right_side(run: Context, relation: Relation) -> Callable[[int], Tensor] | None:
    """How to compute it on a layer; None where hookmap knows no such relation."""
    names = [term.name for term in relation.terms]
    if relation.form == "product":
        return partial(_mixed, run) if names == ["pattern", "v"] else None
    if relation.function == "topk":
        return partial(_top, run) if names == ["router_logits"] else None
    return partial(_projected, run, relation.function, names[0]) if names[0] in ("z", "mlp_post") else None


def _error(run: Context, point: str, layer: int, expected: Tensor) -> float:
    found = run.values[point, layer]
    if point == "router_indices":  # a set: of two equal scores, either may come first
        found, expected = found.sort(-1).values, expected.sort(-1).values
    return relative_error(found, expected if point == "z" else expected.reshape(found.shape))


def _projected(run: Context, path: str, point: str, layer: int) -> Tensor:
    whole = path if is_template(path) else f"{run.map.layers_path}.{path}"
    module = run.model.get_submodule(run.map.at_layer(whole, layer))
    with torch.no_grad():
        returned = module(run.values[point, layer].flatten(2))
    output: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return output


def _mixed(run: Context, layer: int) -> Tensor:
    pattern, v = run.pattern(layer), run.values["v", layer].movedim(2, 1)
    queries_per_key = pattern.shape[1] // v.shape[1]
    return (pattern.to(v.dtype) @ v.repeat_interleave(queries_per_key, 1)).movedim(1, 2)


def _top(run: Context, layer: int) -> Tensor:
    count = run.values["router_indices", layer].shape[-1]
    return run.values["router_logits", layer].topk(count, -1).indices


def _router(run: Context, kind: BlockKind) -> Iterator[Check]:
    """The indices are different experts of each token, and as many as there are weights."""
    layers = tuple(layer for layer in kind.layers if ("router_indices", layer) in run.values)
    wrong = [layer for layer in layers if not _are_experts(run, layer)]
    if layers:
        detail = f"wrong on layers {wrong}" if wrong else "router_indices are different experts, one per weight"
        yield Check("router", layers, not wrong, detail)


def _are_experts(run: Context, layer: int) -> bool:
    indices = run.values["router_indices", layer]
    weights = run.values.get(("router_weights", layer), indices.float())
    scores = run.values.get(("router_logits", layer))
    if indices.is_floating_point() or not weights.is_floating_point():
        return False
    twice = bool((indices.sort(-1).values.diff(dim=-1) == 0).any())
    beyond = scores is not None and not 0 <= int(indices.min()) <= int(indices.max()) < scores.shape[-1]
    return indices.shape == weights.shape and not twice and not beyond
