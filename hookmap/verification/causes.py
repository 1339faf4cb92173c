"""Checks of causes: with other weights in a branch, what comes after the branch moves, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from hookmap.maps.selectors import Selector
from hookmap.maps.templates import BlockKind
from hookmap.verification.check import Check, relative_error
from hookmap.verification.context import Context, branch_modules, first_and_last
from hookmap.verification.runner import Hook, at, forward, keep, observe, other_weights

_ROLES = ("mixer", "cross_attn", "mlp")


def causes(run: Context) -> Iterator[Check]:
    """Change the weights of one branch of one layer, and see which of the layer's points move."""
    for kind, layer in first_and_last(run.map):
        for role in _ROLES:
            expected = _expected(kind, role)
            weights = other_weights(
                run.model, branch_modules(run.map, kind, role, layer), _shared(run, kind, role, layer)
            )
            if expected and weights:
                yield _cause(run, layer, role, expected, weights)


def _cause(run: Context, layer: int, role: str, expected: dict[str, bool], weights: dict[str, Tensor]) -> Check:
    seen = {point: run.selector[point, layer] for point in expected if (point, layer) in run.values}
    after, _ = observe(run.model, run.given, list(seen.values()), weights=weights)
    moved = {
        point: relative_error(after[point, layer], run.values[point, layer]) > run.tolerance
        for point in seen
        if (point, layer) in after
    }
    if moved.get(read := f"{role}_in") and not expected[read]:
        behind = [selector for point, selector in seen.items() if expected[point]]
        modules = branch_modules(run.map, run.map.kind_of(layer), role, layer)
        own = _behind_what_is_read(run, seen[read], behind, weights, modules)
        after, _ = observe(run.model, run.given, [seen[read]], weights=own)
        moved[read] = relative_error(after[read, layer], run.values[read, layer]) > run.tolerance
    wrong = [f"{p} {'moved' if has else 'did not move'}" for p, has in moved.items() if has != expected[p]]
    right = [f"{point} {'moves' if expected[point] else 'stays'}" for point in moved]
    what = {"mlp": "MLP", "cross_attn": "cross-attention"}.get(role, role)
    return Check("cause", (layer,), not wrong, f"other {what} weights in layer {layer}: " + ", ".join(wrong or right))


def _behind_what_is_read(
    run: Context, read: Selector, behind: list[Selector], weights: dict[str, Tensor], modules: list[str]
) -> dict[str, Tensor]:
    """The weights without those that make what the branch reads, by right.

    A norm in the branch's module does, with vectors. So does a module that also decides how the branch joins several
    streams (hyper-connections): its weights move what comes after though the branch reads the same. And so does what
    runs in front of the norm that stands before the branch, such as weights of a sum of earlier streams.
    """
    parts: dict[int, Tensor] = {}
    before: list[str] = []
    front: list[str] = []
    norms = [
        term.module
        for term in read.terms
        if term.side == "output" and not any(f"{term.module}.".startswith(f"{root}.") for root in modules)
    ]

    def enters(owner: str) -> Hook:
        return Hook(owner, "input", lambda *_: None if parts else before.append(owner))

    def begins(norm: str) -> Hook:
        return Hook(norm, "input", lambda *_: None if front else front.extend(before))

    owners: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        owners.setdefault(name.rpartition(".")[0], {})[name] = weight
    hooks = [at(term, partial(keep, parts, number)) for number, term in enumerate(read.terms)]
    forward(run.model, run.given, [*hooks, *map(enters, owners), *map(begins, norms)])
    same = [at(term, partial(_write, parts, number)) for number, term in enumerate(read.terms)]
    own = {name: weight for name, weight in weights.items() if weight.ndim > 1}

    def acts_beside(owner: str) -> bool:
        after, _ = observe(run.model, run.given, behind, same, owners[owner])
        return any(relative_error(tensor, run.values[key]) > run.tolerance for key, tensor in after.items())

    for owner in dict.fromkeys(before):
        if owner in front or acts_beside(owner):
            own = {name: weight for name, weight in own.items() if name not in owners[owner]}
    return own


def _write(parts: dict[int, Tensor], number: int, tensor: Tensor) -> None:
    tensor.copy_(parts[number])


def _shared(run: Context, kind: BlockKind, role: str, layer: int) -> list[str]:
    """Modules inside the branch's modules whose weights are not the branch's alone.

    A pre-norm inside the branch's module (Reformer) makes what the branch reads; a module of both branches tells
    neither from the other.
    """
    read = kind.points.get(f"{role}_in")
    norms = [run.map.at_layer(t.module, layer) for t in (read.terms if read else ()) if t.side == "output"]
    return [
        *norms,
        *(path for other in _ROLES if other != role for path in branch_modules(run.map, kind, other, layer)),
    ]


def _expected(kind: BlockKind, role: str) -> dict[str, bool]:
    """Whether each point must move when the weights of a branch change. What it reads stays."""
    expected = _expected_around(kind, role)
    first = kind.points.get(f"{role}_out.0")  # the role's modules may be those of a branch before, too
    alone = first is None or first.terms == kind.points[f"{role}_out"].terms
    return {**expected, f"{role}_in": False} if expected and alone else expected


def _expected_around(kind: BlockKind, role: str) -> dict[str, bool]:
    other = "mlp" if role == "mixer" else "mixer"
    if role == "cross_attn" and (kind.cross_attn is None or kind.branch_order != "sequential"):
        return {}
    if kind.branch_order == "sequential":
        return _expected_in_turn(kind, role)
    if kind.branch_order == "parallel":
        return {"resid_pre": False, f"{other}_out": False, f"{role}_out": True, "resid_post": True}
    if kind.branch_order in ("mixer_only", "mlp_only"):
        return {"resid_pre": False, f"{role}_out": True, "resid_post": True}
    return {}


def _expected_in_turn(kind: BlockKind, role: str) -> dict[str, bool]:
    places = [kind.points[name].order for name in ("mlp_in", "resid_mid") if name in kind.points]
    if len(places) == 2 and places[0] < places[1]:
        moves = ("mixer_out", "resid_mid") if role == "mixer" else ("mlp_out",)  # an MLP before the mixer too
        return {"resid_pre": False, **dict.fromkeys((*moves, "resid_post"), True)}
    if role == "mixer":
        return {"resid_pre": False, "mixer_out": True, "resid_mid": True, "mlp_in": True, "resid_post": True}
    stay = dict.fromkeys(("resid_pre", "mixer_in", "mixer_out", "resid_mid"), False)
    if role == "cross_attn":
        return {**stay, **dict.fromkeys(("cross_attn_out", "resid_mid.1", "mlp_in", "resid_post"), True)}
    if kind.cross_attn is not None:
        stay |= dict.fromkeys(("cross_attn_in", "cross_attn_out", "resid_mid.1"), False)
    return {**stay, "mlp_out": True, "resid_post": True}
