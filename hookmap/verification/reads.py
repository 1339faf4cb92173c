"""Checks of what a branch reads: `mixer_in` and `mlp_in` are changed while the model runs.

Three questions, of the first and the last layer of each kind: does the tensor determine the branch (another run's
tensor there gives that run's output, whatever else the branch could reach stays), is it behind the norms (the branch's
own weights read it as it is), and does a change at one position move what it should (an MLP's own position, a mixer's
others).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from hookmap.maps.describe import layer_ranges
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector, of_template
from hookmap.maps.templates import BlockKind
from hookmap.maps.terms import Term
from hookmap.verification.check import Check, Key, relative_error
from hookmap.verification.context import Context, modules_of
from hookmap.verification.runner import BATCH, Hook, at, forward, keep, observe, other_weights

_SHORT = 4
"""positions that a short convolution of an MLP sees"""
Write = Callable[[int, Tensor], object]
"""changes the tensor of one term in place, given the term's number"""


@dataclass(frozen=True)
class Branch:
    """One branch of one layer: the point that it reads, and the point that shows what it made of it."""

    point: str
    output: str
    layer: int
    terms: tuple[Term, ...]
    """the terms of the point that it reads"""
    beside: tuple[Term, ...]
    """what else it reads"""
    made: Selector
    modules: tuple[str, ...]
    around: str | None = None
    """the block, where keys and values enter it that no term can name: in a tuple among its arguments"""

    @property
    def key(self) -> Key:
        return self.output, self.layer


@dataclass(frozen=True)
class _Elsewhere:
    """A branch in a run on other tokens: the tensors that it read there, and its output."""

    read: Mapping[int, Tensor]
    made: Tensor
    handed: Mapping[int, Tensor]
    """the tensors in tuples among the arguments of the block"""


def reads(run: Context) -> Iterator[Check]:
    """All checks of the points that branches read."""
    branches = list(branches_of(run))
    readers = readers_of(run, branches)
    elsewhere = _on_other_tokens(run, branches)
    for branch, names, other in zip(branches, readers, elsewhere, strict=True):
        yield _behind_norms(run, branch, names)
        yield _determines(run, branch, other)
        yield from _before_weights(run, branch, other)
        yield _positions(run, branch, bool(other.handed))


def branches_of(run: Context) -> Iterator[Branch]:
    """The branches of the first and the last layer of each kind whose points were seen."""
    for kind in run.map.kinds:
        for point, output in _pairs(kind):
            for layer in dict.fromkeys((kind.layers[0], kind.layers[-1])):
                if (point, layer) in run.values and (output, layer) in run.values:
                    yield _branch(run, kind, point, output, layer)


def _pairs(kind: BlockKind) -> Iterator[tuple[str, str]]:
    """What each branch reads -> its bare output, or what it adds where no boundary exposes that."""
    for point in kind.points:
        name = PointName.of(point)
        if name.base not in ("mixer_in", "cross_attn_in", "mlp_in"):
            continue
        output = next((each for end in ("out_raw", "out") if (each := name.end(end)) in kind.points), None)
        if output is not None and not (name.number and all(_is_second_name(kind, each) for each in (point, output))):
            yield point, output


def _is_second_name(kind: BlockKind, point: str) -> bool:
    """Whether it is the number of a branch whose points have names without a number, too."""
    usual = kind.points.get(PointName.of(point).base)
    return usual is not None and kind.points[point].terms == usual.terms


def _branch(run: Context, kind: BlockKind, point: str, output: str, layer: int) -> Branch:
    template = kind.points[point]
    read = template.model_copy(update={"terms": template.beside})
    beside = of_template(run.map, point, layer, read, run.number).terms
    terms, made = run.selector[point, layer].terms, run.selector[output, layer]
    modules = tuple(modules_of(run, kind, output, layer))
    around = run.map.at_layer(run.map.layers_path, layer) if _lacks_keys(kind, point) else None
    return Branch(point, output, layer, terms, beside, made, modules, around)


def _lacks_keys(kind: BlockKind, point: str) -> bool:
    """Whether a branch is an attention that makes no keys and no values."""
    alone = point == "mixer_in" and "q" in kind.points and kind.calls == 1
    return alone and not kind.points.keys() & {"k", "v"} and not kind.points[point].beside


# Is it behind the norms? ----------------------------------------------------------------------------------------


def _behind_norms(run: Context, branch: Branch, readers: list[str]) -> Check:
    """Weights of the branch read the tensor as it is; or else, twice as large, it gives another output.

    In front of a norm it would not; and some branches cut or mix the tensor before any weights.
    """
    point, output = branch.point, branch.output
    if readers:
        return Check("reads", (branch.layer,), True, f"{point} enters {readers[0]}")
    made = _output_under(run, branch, lambda _, tensor: tensor.mul_(2))
    depends = relative_error(made, run.values[branch.key]) > 0.01
    detail = (
        f"{output} depends on the size of {point}"
        if depends
        else f"{point} is in front of a norm: twice it is no other"
    )
    return Check("reads", (branch.layer,), depends, detail)


def readers_of(run: Context, branches: list[Branch]) -> list[list[str]]:
    """For each branch, its modules with a matrix of their own that read the tensor as it is."""
    readers: list[list[str]] = [[] for _ in branches]
    hooks: list[Hook] = []
    for branch, found in zip(branches, readers, strict=True):
        parts: dict[int, Tensor] = {}
        hooks += [at(term, partial(keep, parts, number)) for number, term in enumerate(branch.terms)]
        hooks += [_matching(path, parts, found, run.tolerance) for path in with_matrix(run, branch)]
    forward(run.model, run.given, hooks)
    return readers


def with_matrix(run: Context, branch: Branch) -> list[str]:
    return [
        name
        for name, module in run.model.named_modules()
        if any(f"{name}.".startswith(f"{path}.") for path in branch.modules)
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    ]


def _matching(path: str, parts: dict[int, Tensor], found: list[str], tolerance: float) -> Hook:
    """A hook that notes the module if one of its inputs holds the numbers of one of these tensors."""

    def act(args: Any, kwargs: Any, output: Any) -> None:
        given = list(tensors_in((args, kwargs)))
        if any(holds(tensor, value, tolerance) for value in parts.values() for tensor in given):
            found.append(path)

    return Hook(path, "input", act)


def holds(tensor: Tensor, value: Tensor, tolerance: float) -> bool:
    """Whether a module's input holds these numbers: also as one axis of batch and positions, or those turned."""
    if tensor.numel() != value.numel() or not tensor.is_floating_point():
        return False
    turned = value.transpose(0, 1)
    return any(relative_error(each.reshape(tensor.shape), tensor) <= tolerance for each in (value, turned))


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


# Does it determine the branch? ----------------------------------------------------------------------------------


def _on_other_tokens(run: Context, branches: list[Branch]) -> list[_Elsewhere]:
    parts: list[dict[int, Tensor]] = [{} for _ in branches]
    hooks = [
        at(term, partial(keep, own, number))
        for branch, own in zip(branches, parts, strict=True)
        for number, term in enumerate((*branch.terms, *branch.beside))
    ]
    handed: list[dict[int, Tensor]] = [{} for _ in branches]
    for branch, own in zip(branches, handed, strict=True):
        hooks += _at_handed(branch, partial(keep, own))
    made, _ = observe(run.model, run.given.other(), [branch.made for branch in branches], hooks)
    return [
        _Elsewhere(own, made[branch.key], beside) for branch, own, beside in zip(branches, parts, handed, strict=True)
    ]


def _at_handed(branch: Branch, use: Write) -> list[Hook]:
    """A hook that hands `use` the keys and values in tuples among the block's arguments, [batch, heads, pos, d]."""

    def act(args: Any, kwargs: Any, output: Any) -> None:
        inner = [each for each in (*args, *kwargs.values()) if isinstance(each, (tuple, list))]
        for number, tensor in enumerate(tensors_in(inner)):
            if _is_of_tokens(tensor):
                use(number, tensor)

    return [] if branch.around is None else [Hook(branch.around, "input", act)]


def _is_of_tokens(tensor: Tensor) -> bool:
    """Whether it has heads, can be written to, and is another for each row: no mask and no positions."""
    heads = tensor.is_floating_point() and tensor.ndim == 4 and len(tensor) == BATCH
    return heads and 0 not in tensor.stride() and not tensor[0].equal(tensor[1])


def _determines(run: Context, branch: Branch, other: _Elsewhere) -> Check:
    """The tensors at the point in a run on other tokens, written into a run on these, give the other run's output."""
    error = relative_error(_output_under(run, branch, _writing(other.read), handed=other.handed), other.made)
    beside = run.map.kind_of(branch.layer).points[branch.point].beside
    others = "".join(f" and {term.module or 'model'}.{term.side}[{term.index!r}]" for term in beside)
    others += f" and the tuples that enter {branch.around}" if other.handed else ""
    verb = "determine" if others else "determines"
    detail = f"{branch.point}{others} {verb} {branch.output}: of other tokens it gives theirs"
    return Check("reads", (branch.layer,), error <= run.tolerance, detail, error)


def _before_weights(run: Context, branch: Branch, other: _Elsewhere) -> Iterator[Check]:
    """Of the same tensors, other weights of the branch make another output: the output is not made before the point."""
    weights = other_weights(run.model, branch.modules)
    if not weights:
        return
    made = _output_under(run, branch, _writing(other.read), weights, other.handed)
    moved = relative_error(made, other.made) > run.tolerance
    point, output = branch.point, branch.output
    detail = f"other weights make another {output} of {point}" if moved else f"no weights stand behind {point}"
    yield Check("reads", (branch.layer,), moved, detail)


def _writing(tensors: Mapping[int, Tensor]) -> Write:
    return lambda number, tensor: tensor.copy_(tensors[number])


# Does a change at one position move what it should? -------------------------------------------------------------


def _positions(run: Context, branch: Branch, has_handed_keys: bool) -> Check:
    """Other numbers at one position: an MLP moves there, or shortly behind it too (a token shift); a mixer elsewhere.

    Of a mixer that reads little but the first position, that one is changed. Cross-attention moves there alone: its
    keys are another's positions. So may attention to keys that are handed to it.
    """
    place = run.given.positions // 3
    moved = _moved_by(run, branch, place)
    if branch.point.startswith("mlp"):
        right = moved in [list(range(place, place + count)) for count in range(1, _SHORT + 1)]
    elif branch.point.startswith("cross_attn") or (has_handed_keys and moved == [place]):
        right = moved == [place]
    else:
        if set(moved) <= {place}:
            place, moved = 0, _moved_by(run, branch, 0)
        right = any(each != place for each in moved)
    detail = f"{branch.point} changed at position {place} moves {branch.output} at {layer_ranges(moved)}"
    return Check("positions", (branch.layer,), right, detail)


def _moved_by(run: Context, branch: Branch, place: int) -> list[int]:
    """The positions at which the branch's output moves where what it reads is other at one."""

    def write(number: int, tensor: Tensor) -> None:
        if number < len(branch.terms):
            rows = branch.terms[number].arrange(tensor, run.given.batch, run.given.positions)
            rows[:, place] = rows[:, place].flip(-1) * 1.5

    before = run.values[branch.key].float()
    change = (_output_under(run, branch, write).float() - before).abs().flatten(2).amax((0, 2))
    moved: list[int] = (change > run.tolerance * before.square().mean().sqrt()).nonzero().flatten().tolist()
    return moved


def _output_under(
    run: Context,
    branch: Branch,
    write: Write,
    weights: dict[str, Tensor] | None = None,
    handed: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """The branch's output where `write` changes what it reads, under other `weights` if there are.

    `handed`: tensors in place of those in tuples among the block's arguments.
    """
    hooks = [at(term, partial(write, number)) for number, term in enumerate((*branch.terms, *branch.beside))]
    hooks += _at_handed(branch, _writing(handed)) if handed else []
    values, _ = observe(run.model, run.given, [branch.made], hooks, weights)
    return values[branch.key]
