"""Checks of what no module hands over: attention scores, rotated queries and keys, activations, the scales of norms."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from hookmap.verification.check import Check, relative_error
from hookmap.verification.context import Context

_MASKED = -1e4
"""a score below is a mask's"""


def scores(run: Context) -> Iterator[Check]:
    """softmax(attn_scores) is the pattern; and the scores are those that q_rot and k_rot have by hand."""
    for layer in run.layers_with("attn_scores"):
        found = run.values["attn_scores", layer].movedim(2, 1).float()
        if ("pattern", layer) in run.values:
            weights, by_softmax = run.pattern(layer).float(), found.softmax(-1)
            seen = weights.sum(-1, keepdim=True) > 0  # a query of no key: its row is set to 0 afterwards
            yield run.equal("scores", (layer,), "pattern = softmax(attn_scores)", weights * seen, by_softmax * seen)
        if {("q_rot", layer), ("k_rot", layer)} <= run.values.keys():
            q, k = (run.values[name, layer].movedim(2, 1).float() for name in ("q_rot", "k_rot"))
            products = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
            error = min(_linear(found, products), _ordered(found, products))
            holds = error <= 10 * run.tolerance
            yield Check("scores", (layer,), holds, "attn_scores = f(q_rot · k_rot) + what no token changes", error)


def _linear(found: Tensor, products: Tensor) -> float:
    """How far from factor * products + what is the same for each text: a mask, a bias of distances."""
    free = (found > _MASKED).all(0)  # [heads, query, key]
    a, b = ((each[0] - each[1])[free] for each in (products, found))
    if not len(a):
        return float("inf")
    return relative_error(a * ((a * b).sum() / a.square().sum().clamp_min(1e-12)), b)


def _ordered(found: Tensor, products: Tensor) -> float:
    """The largest step back of the scores where the products grow, of the scores' range: a cap keeps the order."""
    free = found > _MASKED
    ordered = found[free][products[free].argsort()]
    return float((ordered.cummax(0).values - ordered).max() / (ordered.max() - ordered.min()).clamp_min(1e-12))


def activations(run: Context) -> Iterator[Check]:
    """mlp_post is a function of mlp_pre alone, number by number, times mlp_pre_linear where that is there."""
    for layer in run.layers_with("mlp_pre"):
        pre, post = (run.values[name, layer].float().flatten() for name in ("mlp_pre", "mlp_post"))
        linear = run.values.get(("mlp_pre_linear", layer))
        if linear is not None:
            other = linear.float().flatten()
            large = other.abs() > 0.1 * other.abs().mean()
            pre, post = pre[large], post[large] / other[large]
        order = pre.argsort()
        steps, rises = pre[order].diff(), post[order].diff().abs()
        allowed = 4 * steps * (1 + pre.abs().max()) + 1e-3 * post.abs().max()
        wrong = float((rises > allowed).float().mean())
        detail = "mlp_post = f(mlp_pre)" + (" * mlp_pre_linear" if linear is not None else "")
        yield Check("activations", (layer,), wrong < 0.01, detail, wrong)


def scales(run: Context) -> Iterator[Check]:
    """What a norm gives is the stream, or the stream without its mean, times the scale, times its weights."""
    for role in ("mixer", "mlp"):
        for layer in run.layers_with(f"{role}_norm_scale"):
            scale, given = (run.values.get((name, layer)) for name in (f"{role}_norm_scale", f"{role}_in"))
            states = (t for (name, at), t in run.values.items() if at == layer and name.startswith("resid_"))
            candidates = [each for each in states if given is not None and each.shape == given.shape]
            if scale is None or given is None or not candidates:
                continue
            error = min(_norm_misfit(each.double(), scale.double(), given.double()) for each in candidates)
            detail = f"{role}_in = the stream * {role}_norm_scale * weights"
            yield Check("scales", (layer,), error <= 10 * run.tolerance, detail, error)


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
