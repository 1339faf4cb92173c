"""Checks of what no module hands over: attention scores, rotated queries and keys, activations, the scales of norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from hookmap.maps.points import NOT_GATED, PointName
from hookmap.verification.check import Check, relative_error
from hookmap.verification.context import Context, first_and_last, made_into, module_at
from hookmap.verification.ends import read_times
from hookmap.verification.runner import Hook, forward

_FEW = 0.01
_MASKED = -1e4
"""a score below is a mask's"""


def scores(run: Context) -> Iterator[Check]:
    """softmax(attn_scores) is the pattern; and the scores are those that q_rot and k_rot have by hand."""
    for layer in run.layers_with("attn_scores"):
        found = run.values["attn_scores", layer].movedim(2, 1).float()
        if ("pattern", layer) in run.values:
            weights, by_softmax = run.pattern(layer).float(), found.softmax(-1)
            seen = weights.sum(-1, keepdim=True) > 0  # a query of no key: its row is set to 0 afterwards
            error = relative_error(weights * seen, by_softmax * seen)
            holds = error <= run.limit(("pattern", layer), ("attn_scores", layer))
            yield Check("scores", (layer,), holds, "pattern = softmax(attn_scores)", error)
        if {("q_rot", layer), ("k_rot", layer)} <= run.values.keys():
            error = _products_misfit(run, layer, found)
            holds = error <= max(10 * run.tolerance, run.limit(("q_rot", layer), ("k_rot", layer)))
            yield Check("scores", (layer,), holds, "attn_scores = f(q_rot · k_rot) + what keys do not change", error)


def _products_misfit(run: Context, layer: int, found: Tensor) -> float:
    """How far the scores are from a function of the products of queries and keys, and a bias."""
    q, k = (run.values[name, layer].movedim(2, 1).float() for name in ("q_rot", "k_rot"))
    times = q.shape[1] // k.shape[1]
    # The queries that share a key are neighbours, or (JetMoE) every so many heads.
    ways = [q @ k.repeat_interleave(times, 1).mT, q @ k.repeat(1, times, 1, 1).mT][: 2 if times > 1 else 1]
    fits = (_linear, _ordered, _by_key, _by_query)
    error = min(fit(found, products) for products in ways for fit in fits)
    if error > 10 * run.tolerance:  # the bias depends on the queries' tokens (Inkling): what keys alone change
        twice, none = (
            read_times(run, "k_rot", "attn_scores", layer, factor).movedim(2, 1).float() for factor in (2.0, 0.0)
        )
        free = (found > _MASKED) & (twice > _MASKED)
        if relative_error(twice[free], found[free]) <= run.tolerance:
            return float("inf")  # what is said to be the keys moves no score
        bent = relative_error((twice - found)[free], (found - none)[free])
        error = max(bent, min(_factor_misfit(products[free], (twice - found)[free]) for products in ways))
    return error


def _factor_misfit(a: Tensor, b: Tensor) -> float:
    """How far b is from a times one number."""
    return relative_error(a * ((a * b).sum() / a.square().sum().clamp_min(1e-12)), b) if len(a) else float("inf")


def _linear(found: Tensor, products: Tensor) -> float:
    """How far from factor * products + what is the same for each text: a mask, a bias of distances."""
    if len(found) < 2:  # one picture
        return float("inf")
    free = (found > _MASKED).all(0)  # [heads, query, key]
    a, b = ((each[0] - each[1])[free] for each in (products, found))
    return _factor_misfit(a, b)


def _by_key(found: Tensor, products: Tensor) -> float:
    """As `_linear`, where each key has a bias of its own, which its token decides: two queries of one key differ."""
    return _side_by_side(found, products, 2)


def _by_query(found: Tensor, products: Tensor) -> float:
    """As `_linear`, where each query has a bias of its own: its largest score is taken off before softmax."""
    return _side_by_side(found, products, 3)


def _side_by_side(found: Tensor, products: Tensor, axis: int) -> float:
    size = found.shape[axis] - 1
    free = (found > _MASKED).narrow(axis, 1, size) & (found > _MASKED).narrow(axis, 0, size)
    return _factor_misfit(*(each.diff(dim=axis)[free] for each in (products, found)))


def _ordered(found: Tensor, products: Tensor) -> float:
    """The largest step back of the scores where the products grow, of the scores' range: a cap keeps the order."""
    free = found > _MASKED
    ordered = found[free][products[free].argsort()]
    return float((ordered.cummax(0).values - ordered).max() / (ordered.max() - ordered.min()).clamp_min(1e-12))


def activations(run: Context) -> Iterator[Check]:
    """mlp_post, before a norm inside the MLP, is f(mlp_pre), times mlp_pre_linear where that is there."""
    for layer in run.layers_with("mlp_pre"):
        linear = run.values.get(("mlp_pre_linear", layer))
        beside = run.map.kind_of(layer).points["mlp_in"].beside if ("mlp_in", layer) in run.values else ()
        if linear is None and (beside or run.map.unavailable("mlp_pre_linear", layer) != NOT_GATED):
            continue  # it is multiplied by something that the map does not name
        pre, post = (run.values[name, layer].float() for name in ("mlp_pre", "mlp_post"))
        wrong = _not_a_function(pre, linear, post)
        if wrong >= _FEW and (normed := _before_a_norm(run, layer)) is not None:
            wrong = _not_a_function(pre, linear, normed.float())
        detail = "mlp_post = f(mlp_pre)" + (" * mlp_pre_linear" if linear is not None else "")
        yield Check("activations", (layer,), wrong < _FEW, detail, wrong)


def _not_a_function(pre: Tensor, linear: Tensor | None, post: Tensor) -> float:
    """The share of numbers where post / linear makes a step that a smooth function of pre would not."""
    pre, post = pre.flatten(), post.flatten()
    if linear is not None:
        other = linear.float().flatten()
        large = other.abs() > 0.1 * other.abs().mean()
        pre, post = pre[large], post[large] / other[large]
    if post.std() <= 1e-3 * post.abs().mean():
        return 1.0
    order = pre.argsort()
    steps, rises = pre[order].diff(), post[order].diff().abs()
    allowed = 4 * steps * (1 + pre.abs().max()) + 1e-3 * post.abs().max()
    return float((rises > allowed).float().mean())


def _before_a_norm(run: Context, layer: int) -> Tensor | None:
    """What a module of the MLP itself turned into mlp_post."""
    return made_into(run, "mlp_post", layer, run.selector["mlp_post", layer].terms[-1].module.rpartition(".")[0] + ".")


def preactivations(run: Context) -> Iterator[Check]:
    """What the activation function reads, and what its result is multiplied by, is W · mlp_in + b: nothing is bent."""
    for kind, layer in first_and_last(run.map):
        for point in kind.points:
            name = PointName.of(point)
            read = name.numbered("mlp_in")
            if name.base in ("mlp_pre", "mlp_pre_linear") and {(read, layer), (point, layer)} <= run.values.keys():
                none, twice = (read_times(run, read, point, layer, factor) for factor in (0.0, 2.0))
                own = run.values[point, layer]
                error = relative_error(twice - own, own - none)
                holds = error <= max(10 * run.tolerance, run.limit((point, layer)))
                yield Check("activations", (layer,), holds, f"{point} = W · {read} + b", error)


def scales(run: Context) -> Iterator[Check]:
    """What a norm gives is the stream, or the stream without its mean, times the scale, times its weights."""
    for role in ("mixer", "mlp"):
        for layer in run.layers_with(f"{role}_norm_scale"):
            states = [tensor for (name, at), tensor in run.values.items() if at == layer and name.startswith("resid_")]
            yield from _scale(run, f"{role}_norm_scale", f"{role}_in", layer, states)
    last = run.visits[-1] if run.visits else None
    states = [tensor for (name, *at), tensor in run.states.items() if (*at,) == last and name.startswith("resid_")]
    yield from _scale(run, "final_norm_scale", "final_norm", None, states)


def _scale(run: Context, name: str, normed: str, layer: int | None, states: list[Tensor]) -> Iterator[Check]:
    scale, given = run.values.get((name, layer)), run.values.get((normed, layer))
    candidates = [each for each in states if given is not None and each.shape == given.shape]
    if scale is None or given is None or not candidates:
        return
    error = min(_norm_misfit(each.double(), scale.double(), given.double()) for each in candidates)
    if error > 10 * run.tolerance and (read := made_into(run, normed, layer)) is not None:  # a mixture of streams
        error = _norm_misfit(read.double(), scale.double(), given.double())
    layers = () if layer is None else (layer,)
    holds = error <= max(10 * run.tolerance, run.limit((name, layer), (normed, layer)))
    yield Check("scales", layers, holds, f"{normed} = the stream * {name} * weights", error)


def _norm_misfit(stream: Tensor, scale: Tensor, given: Tensor) -> float:
    """How far it is from weights and a bias for each feature, with the mean taken off or not."""
    errors = []
    for centred in (stream, stream - stream.mean(-1, keepdim=True)):
        x, y = (each.flatten(0, 1) for each in (centred * scale, given))
        dx, dy = x - x.mean(0), y - y.mean(0)
        weights = (dx * dy).sum(0) / dx.square().sum(0).clamp_min(1e-12)
        errors.append(relative_error((dx * weights).float(), dy.float()))
        plain = (x * y).sum(0) / x.square().sum(0).clamp_min(1e-12)
        errors.append(relative_error((x * plain).float(), y.float()))
    return min(errors)


def raw_logits(run: Context) -> Iterator[Check]:
    """The raw logits are what the unembedding gives, and a bias; the logits are made of them number by number."""
    raw, path = run.values.get(("logits_raw", None)), run.map.lm_head_path
    if raw is None or path is None or module_at(run.model, path) is None:
        return
    found: list[Tensor] = []

    def keep(args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape == raw.shape:
            found.append(output.detach().clone())

    forward(run.model, run.given, [Hook(path, "output", keep)])
    if found:  # several calls, where the head serves later tokens too
        error = min(relative_error(raw - (raw - each)[:1, :1], each) for each in found)
        detail = f"logits_raw = the output of {path}, and a bias"
        yield Check("logits_raw", (), error <= run.tolerance, detail, error)
