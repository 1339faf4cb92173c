"""Checks of points by the model's weights: each head's results, what is compressed, and the experts of a mixture."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor

from hookmap.maps.points import PointName
from hookmap.verification.check import Check, relative_error
from hookmap.verification.context import Context, made_into


def results(run: Context) -> Iterator[Check]:
    """The heads' results, and a bias, sum to what the output projection gives."""
    for point, layer in _all_of(run, "attn_result"):
        term, total = run.selector[point, layer].terms[0], run.values[point, layer].sum(2)
        z = run.values[PointName.of(point).numbered("z"), layer]
        with torch.no_grad():
            bare = run.model.get_submodule(term.module)(z.flatten(2))
        detail = f"the sum of {point} over heads, and a bias, is what the output projection gives"
        error = relative_error(total + (bare - total).mean((0, 1)), bare)
        yield Check("results", (layer,), error <= run.limit((point, layer)), detail, error)


def latents(run: Context) -> Iterator[Check]:
    """What is compressed, through the projection that reads it, is the queries or values."""
    for name, made in (("q_latent", "q"), ("k_latent", "v")):
        for point, layer in _all_of(run, name):
            other = PointName.of(point).numbered(made)
            if (other, layer) not in run.values:
                continue
            term, expected = run.selector[other, layer].terms[0], run.values[other, layer]
            with torch.no_grad():
                given = run.model.get_submodule(term.module)(run.values[point, layer])
            found = term.resolve((), {}, given)
            yield run.equal("latents", (layer,), f"{other} is the projection of {point}", found, expected)


def experts(run: Context) -> Iterator[Check]:
    """What an expert gives is its down projection of expert_post; weighted and summed, they are what the MLP gives."""
    for point, layer in _all_of(run, "expert_out"):
        name = PointName.of(point)
        post, out = (run.values.get((name.numbered(each), layer)) for each in ("expert_post", "expert_out"))
        chosen = run.values.get((name.numbered("router_indices"), layer))
        if post is None or out is None or chosen is None:
            continue
        weights: Tensor = operator.attrgetter(str(run.selector[point, layer].terms[0].experts))(run.model)
        if weights.ndim == 2:  # those of all experts one below the other
            weights = weights.view(-1, post.shape[-1], weights.shape[-1])
        error = min(_misfit(post, out, chosen, turned.detach()) for turned in (weights, weights.mT))
        detail = "expert_out = expert_post @ W_down[expert] + b[expert], or the norm of that"
        yield Check("experts", (layer,), error <= run.tolerance, detail, error)
        yield from _sum(run, name, layer, out)


def _misfit(post: Tensor, out: Tensor, chosen: Tensor, weights: Tensor) -> float:
    """How far it is from the product with each row's own expert, and something that is the same for each expert."""
    if (post.shape[-1], out.shape[-1]) != tuple(weights.shape[1:]):
        return float("inf")
    found, bare = torch.empty_like(out), torch.empty_like(out)
    for expert in sorted({*chosen.flatten().tolist()}):
        own = chosen == expert
        bare[own] = product = post[own] @ weights[expert].to(post.dtype)
        found[own] = product + (out[own] - product).mean(0)
    return min(relative_error(found, out), rms_norm_misfit(bare.flatten(0, -2), out.flatten(0, -2)))


def rms_norm_misfit(rows: Tensor, normed: Tensor) -> float:
    """How far it is from an RMS norm of the rows, whose weights are multiplied before or after."""
    ratios = normed / rows
    weights = (ratios / ratios.median(-1, keepdim=True).values).median(0).values
    scaled = rows * weights
    return min(_multiple(scaled * each.square().mean(-1, keepdim=True).rsqrt(), normed) for each in (rows, scaled))


def _sum(run: Context, name: PointName, layer: int, out: Tensor) -> Iterator[Check]:
    """Some mixtures multiply what the experts read by the weights, not what they give; some, the sum by a number."""
    whole = run.values.get((name.numbered("mlp_out_raw"), layer))
    weights = run.values.get((name.numbered("router_weights"), layer))
    if whole is None:
        return
    shared = run.values.get((name.numbered("shared_expert_out"), layer))
    sums = [out.sum(2)] + ([] if weights is None else [(out * weights.unsqueeze(-1)).sum(2)])

    def misfit(given: Tensor | None) -> float:
        if given is None or given.shape != sums[0].shape:
            return float("inf")
        routed = given - shared if shared is not None and shared.shape == given.shape else given
        error = min(_multiple(each, routed) for each in sums)
        return _some_weights(out, routed) if weights is None and error > run.tolerance else error

    if (error := misfit(whole)) > run.tolerance:  # a norm stands in the MLP behind the sum (A.X K1), or a projection
        raw = name.numbered("mlp_out_raw")
        below = run.selector[raw, layer].terms[-1].module
        error = min(error, misfit(made_into(run, raw, layer, below, out.shape[-1])))
    detail = "expert_out * router_weights, summed over the experts, with shared_expert_out, is mlp_out_raw"
    yield Check("experts", (layer,), error <= run.tolerance, detail, error)


def _some_weights(out: Tensor, routed: Tensor) -> float:
    """How far it is from a sum with some weight for each chosen expert of each token, and a bias: the nearest such."""
    each, rows = out.flatten(0, 1).double(), routed.flatten(0, 1).double()  # [tokens, k, d], [tokens, d]
    tokens, count, width = each.shape
    if 2 * (tokens * count + width) > tokens * width:
        return float("inf")  # they would explain anything
    columns = torch.zeros(tokens, width, tokens * count + width, dtype=each.dtype, device=each.device)
    for token in range(tokens):
        columns[token, :, token * count : (token + 1) * count] = each[token].T
    columns[:, :, tokens * count :] = torch.eye(width, dtype=each.dtype, device=each.device)
    matrix = columns.flatten(0, 1)
    found = matrix @ torch.linalg.lstsq(matrix, rows.flatten()[:, None]).solution
    return relative_error(found.view_as(rows), rows)


def _multiple(summed: Tensor, routed: Tensor) -> float:
    """How far it is from a multiple of the sum; infinite where there is nothing to explain."""
    factor = (summed * routed).sum() / summed.square().sum()
    return relative_error(summed * factor, routed) if float(factor.abs()) > 1e-3 else float("inf")


def _all_of(run: Context, base: str) -> list[tuple[str, int]]:
    """The points with this name, or this name and a branch's number, and their layers."""
    return [(name, layer) for name, layer in run.values if PointName.of(name).base == base and layer is not None]
