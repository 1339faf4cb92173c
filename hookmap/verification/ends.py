"""Checks of where a branch begins and ends: no part of it that the map leaves out stands before or behind.

A norm is told from a branch's own products by its statistic; these are for what has none: `tanh(a * x)` as a norm
before a branch, a short convolution or a scale of each feature behind it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hookmap.maps.points import PointName
from hookmap.maps.relations import Relation
from hookmap.maps.templates import BlockKind
from hookmap.verification.check import Check, relative_error
from hookmap.verification.context import Context, first_and_last
from hookmap.verification.reads import Branch, branches_of, holds, readers_of, tensors_in, with_matrix
from hookmap.verification.relations import error_of_norm
from hookmap.verification.runner import Hook, at, forward, keep, observe


def ends(run: Context) -> Iterator[Check]:
    """What a branch reads enters it, and what it gives is not made of its output feature by feature."""
    # Of a branch with a number, its modules are not told from those of the others of its role.
    branches = [branch for branch in branches_of(run) if not PointName.of(branch.point).number]
    for branch, readers in zip(branches, readers_of(run, branches), strict=True):
        wrong = []
        if not readers and (between := _before(run, branch)) is not None:
            wrong.append(f"{branch.point} is in front of {between}, whose output the branch reads")
        if (behind := _behind(run, branch)) is not None:
            wrong.append(f"{branch.output} is behind {behind}, which changes each feature of what the branch gives")
        right = f"no other module stands between {branch.point} and its branch, or before {branch.output}"
        yield Check("ends", (branch.layer,), not wrong, "; ".join(wrong) or right)
    for kind, layer in first_and_last(run.map):
        for point in kind.points:
            yield from _made_of_raw(run, kind, point, layer)
            yield from _made_of_hidden(run, kind, point, layer)


def _made_of_raw(run: Context, kind: BlockKind, point: str, layer: int) -> Iterator[Check]:
    """What a branch adds is made of its bare output: of those with a number, that read no one tensor, or in no sum.

    In proportion, or as a norm; and where no sum shows what is added, nothing of the tokens is in it without the
    output. (Of a step towards the output, `rate * (branch - h)`, there is.)
    """
    name = PointName.of(point)
    added = name.end("out")
    if name.base not in ("mixer_out_raw", "cross_attn_out_raw", "mlp_out_raw"):
        return
    places = [kind.points[each].terms for each in _in_sums(kind)]
    is_summed = added in kind.points and kind.points[added].terms in places
    if is_summed and name.end("in") in kind.points and not name.number:
        return  # see verification.reads
    if any((each, layer) not in run.values for each in (point, added)):
        return
    if kind.points[point].terms == kind.points[added].terms:
        return
    own, none, twice = (
        run.values[added, layer],
        *(read_times(run, point, added, layer, factor) for factor in (0.0, 2.0)),
    )
    depends = relative_error(none, own) > run.tolerance
    error = relative_error(twice - own, own - none)
    if error > run.tolerance:
        error = error_of_norm(run.model, run.values[point, layer], own)
    if not is_summed:
        error = max(error, relative_error(none, none[:1, :1].expand_as(none)))
    yield Check("ends", (layer,), depends and error <= run.tolerance, f"{added} is made of {point}", error)


def _made_of_hidden(run: Context, kind: BlockKind, point: str, layer: int) -> Iterator[Check]:
    """A branch's bare output is a product of its hidden activations, where no relation says with what."""
    name = PointName.of(point)
    made = name.numbered("mlp_out_raw")
    known = all((each, layer) in run.values for each in (point, made))
    if name.base != "mlp_post" or not known or any(text.endswith(f"({point})") for text in kind.relations):
        return
    own, none, twice = run.values[made, layer], *(read_times(run, point, made, layer, factor) for factor in (0.0, 2.0))
    depends = relative_error(none, own) > run.tolerance and not torch.equal(run.values[point, layer], own)
    error = relative_error(twice - own, own - none)
    yield Check("ends", (layer,), depends and error <= run.tolerance, f"{made} is a product of {point}", error)


def read_times(run: Context, point: str, read: str, layer: int, factor: float) -> Tensor:
    """`read` where all numbers of `point` are multiplied by a factor."""
    hooks = [at(term, lambda tensor: tensor.mul_(factor)) for term in run.selector[point, layer].terms]
    return observe(run.model, run.given, [run.selector[read, layer]], hooks)[0][read, layer]


def _in_sums(kind: BlockKind) -> set[str]:
    """The points that are in a sum which is checked."""
    parsed = [relation for text in kind.relations if (relation := Relation.parse(text)) is not None]
    return {
        point
        for relation in parsed
        if relation.form == "sum" and not relation.is_open
        for point in relation.points() & kind.points.keys()
    }


def _before(run: Context, branch: Branch) -> str | None:
    """The module with weights, none of the branch's, that the point enters and whose output enters the branch.

    None where a product of the branch itself reads the point.
    """
    parts: dict[int, Tensor] = {}
    given: dict[str, Tensor] = {}
    entered: list[str] = []
    crossed: list[str] = []

    def entering(path: str, args: Any, kwargs: Any, _: Any) -> None:
        found = list(tensors_in((args, kwargs)))
        if any(holds(each, part, run.tolerance) for each in found for part in parts.values()):
            entered.append(path)
        crossed.extend(name for name, own in given.items() if any(holds(each, own, run.tolerance) for each in found))

    def leaving(path: str, args: Any, kwargs: Any, output: Any) -> None:
        found = list(tensors_in((args, kwargs)))
        if isinstance(output, Tensor) and any(holds(e, part, run.tolerance) for e in found for part in parts.values()):
            given[path] = output.detach().clone()

    own = {*with_matrix(run, branch), *branch.modules}
    hooks = [at(term, partial(keep, parts, number)) for number, term in enumerate(branch.terms)]
    hooks += [Hook(path, "input", partial(entering, path)) for path in own]
    hooks += [Hook(path, "output", partial(leaving, path)) for path in _beside(run.model, branch)]
    forward(run.model, run.given, hooks)
    return crossed[0] if crossed and not entered else None


def _beside(model: nn.Module, branch: Branch) -> list[str]:
    """The modules with weights of their own that are none of the branch's."""
    return [
        name
        for name, module in model.named_modules()
        if not any(f"{name}.".startswith(f"{path}.") for path in branch.modules)
        and any(True for _ in module.parameters(recurse=False))
    ]


def _behind(run: Context, branch: Branch) -> str | None:
    """The module whose output the branch's bare output is, if it changes each feature of the branch by itself."""
    name, (term, *others) = PointName.of(branch.output), branch.made.terms
    added = run.selector.get((name.end("out"), branch.layer))
    if name.base[-4:] != "_raw" or others or term.side != "output" or added is None or added.terms != (term,):
        return None
    width = run.values[branch.key].shape[-1]
    if any(sum(size >= width for size in p.shape) > 1 for p in run.model.get_submodule(term.module).parameters()):
        return None  # it has a matrix
    found: dict[int, Tensor] = {}
    entered: dict[int, Tensor] = {}

    def kept(tensor: Tensor) -> None:
        entered[0] = tensor.detach().clone()

    def changed(tensor: Tensor) -> None:
        tensor[..., 0] += 1.0

    def entering(use: Any) -> Hook:
        calls = itertools.count()

        def act(args: Any, kwargs: Any, _: Any) -> None:
            first = next((each for each in tensors_in((args, kwargs)) if each.is_floating_point()), None)
            if term.call in (None, next(calls)) and first is not None:
                use(first)

        return Hook(term.module, "input", act)

    forward(run.model, run.given, [entering(kept), at(term, partial(keep, found, 0))])
    read = run.values.get((branch.point, branch.layer))
    whole = found[0].shape
    if entered.get(0) is None or entered[0].shape != whole or relative_error(entered[0], found[0]) <= run.tolerance:
        return None
    if read is not None and holds(entered[0], read, run.tolerance):
        return None  # it is all of the branch
    forward(run.model, run.given, [entering(changed), at(term, partial(keep, found, 1))])
    moved = (found[1] - found[0]).abs().flatten(0, -2).amax(0) > run.tolerance
    return term.module if moved.nonzero().flatten().tolist() == [0] else None
