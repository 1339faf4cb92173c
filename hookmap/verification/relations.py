"""Checks of the additions of a block: each relation that a map states, as arithmetic on what was captured.

What a relation leaves open (the weights of a norm, of a gate, of a mixture of streams) is fitted, and must fit all
rows: of each feature, over all positions, or of each position, over all features, there are far more numbers than
unknowns. No module of the model is run.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import inf

import torch
from torch import Tensor, nn

from hookmap.maps.points import PointName
from hookmap.maps.relations import OWN, Relation, Term, raw
from hookmap.verification.check import Check, relative_error
from hookmap.verification.context import Context

_NOTHING = 1e-6
_SUMMED = ("resid_pre", "resid_mid", "resid_post", "mixer_out", "cross_attn_out", "mlp_out")
Forms = list[Tensor]
"""the tensors that an expression may mean: a norm is with or without the mean, and adds one epsilon or another"""


def sums(run: Context) -> Iterator[Check]:
    """Each relation whose right side is a sum; the others are about the inside of a branch."""
    epsilons = _epsilons(run.model)
    for kind in run.map.kinds:
        blocks = [_Block.of(run, layer, epsilons) for layer in kind.layers]
        for text in kind.relations:
            relation = Relation.parse(text)
            if relation is None or relation.form != "sum" or relation.is_open:
                continue
            error = max(_misfit(block, relation.total, relation.terms) for block in blocks)
            plain = not any(term.of for term in relation.terms)
            yield Check("sum" if plain else "relation", kind.layers, error <= run.tolerance, text, error)


def stated(run: Context) -> Iterator[Check]:
    """Each point of the stream, and what each branch adds, is in a relation: a point in none could be any tensor.

    Or it is a second name of one that is, as `mlp_out.1` of `mlp_out`: no two numbers have one tensor. Without
    `resid_post` (XLM), or without what a branch adds, they can be in none.
    """
    for kind in run.map.kinds:
        branches = [name for name in ("mixer", "cross_attn", "mlp") if getattr(kind, name) is not None]
        summands = {"resid_post", *(f"{name}_out" for name in branches)}
        if kind.branch_order == "other" or not summands <= kind.points.keys():
            continue
        relations = [relation for text in kind.relations if (relation := Relation.parse(text)) is not None]
        held = set().union(*(each.points() for each in relations if each.form == "sum"))
        places = {(_family(name), kind.points[name].terms) for name in held if name in kind.points}
        summed = {name: point.terms for name, point in kind.points.items() if _family(name) in _SUMMED}
        loose = [name for name, terms in summed.items() if name not in held and (_family(name), terms) not in places]
        numbered = Counter((_family(name), terms) for name, terms in summed.items() if PointName.of(name).number)
        loose += [name for name, terms in summed.items() if numbered[_family(name), terms] > 1]
        yield Check("stated", kind.layers, not loose, f"in no relation: {', '.join(loose) or 'none'}")


def _family(point: str) -> str:
    """The name without its number, and without what the norm on the stream makes of it."""
    return PointName.of(point).base.removesuffix("_sum")


def second_stream(run: Context) -> Iterator[Check]:
    """Of blocks with two streams: the mixer of each adds to what the MLP of the one before read."""
    coupled = [layer for kind in run.map.kinds if kind.coupled for layer in kind.layers]
    pairs = [(i - 1, i) for i in sorted(coupled) if i - 1 in coupled and run.map.is_joined(i - 1, i)]
    points = ("resid_mid", "mixer_out")
    errors = {
        layer: relative_error(
            run.values["resid_mid", before] + run.values["mixer_out", layer], run.values["resid_mid", layer]
        )
        for before, layer in pairs
        if all((name, each) in run.values for name in points for each in (before, layer))
    }
    if errors:
        detail = "resid_mid[i + 1] = resid_mid[i] + mixer_out[i + 1]"
        yield Check("sum", tuple(errors), max(errors.values()) <= run.tolerance, detail, max(errors.values()))


@dataclass(frozen=True)
class _Block:
    """The points of one layer, and what the arithmetic needs to know of its norms."""

    points: Mapping[str, Tensor]
    model: nn.Module
    path: str
    epsilons: tuple[float, ...]
    at_layer: Callable[[str, int], str]
    layer: int

    @classmethod
    def of(cls, run: Context, layer: int, epsilons: tuple[float, ...]) -> _Block:
        points = {point: tensor for (point, its_layer), tensor in run.values.items() if its_layer == layer}
        return cls(points, run.model, run.map.at_layer(run.map.layers_path, layer), epsilons, run.map.at_layer, layer)

    def term(self, term: Term) -> Tensor:
        """The named point times the term's constant, and times the parameter of the model."""
        value = term.factor * self.points[term.name].double()
        if not term.weight:
            return value
        weight: Tensor = operator.attrgetter(self.at_layer(term.weight, self.layer))(self.model)
        return value * weight.detach().double()


def _misfit(block: _Block, left: str, terms: tuple[Term, ...]) -> float:
    """How far the left side is from the nearest tensor that the right side allows; infinite where a point is absent."""
    try:
        whole = block.points[left].double()
        known = [term for term in terms if not term.of and term.name in block.points]
        rest = whole
        for term in known:
            rest = rest - block.term(term)
        unknown = [_forms(block, term) for term in terms if term not in known and term.name != OWN]
    except KeyError:
        return inf
    if not unknown:  # what a block adds of its own is the same for every text
        own = rest.mean(0, keepdim=True) if any(term.name == OWN for term in terms) else 0.0
        return relative_error(whole - rest + own, whole)
    if any(term.of for term in terms) and relative_error(whole - rest, whole) <= _NOTHING:
        return inf  # the stream, times what is fitted, is no part of it
    mixed = any(term.name == "mix" for term in terms) or whole.dim() > 3
    fit = _by_position if mixed else _by_feature
    return min(relative_error(whole - rest + fit(rest, list(forms)), whole) for forms in product(*unknown))


def error_of_norm(model: nn.Module, of: Tensor, found: Tensor) -> float:
    """How far a tensor is from a norm of another one, whatever the norm's weights are."""
    of, found = of.double(), found.double()
    forms = [_normed(of, *form) for form in product((0.0, 1.0), _epsilons(model))]
    return min(relative_error(_by_feature(found, [form]), found) for form in forms) if of.shape == found.shape else inf


def _forms(block: _Block, term: Term) -> Forms:
    if not term.of:
        return [block.points[raw(term.name)].double()]
    if term.name != "norm":
        return _sum_forms(block, term.of, [])
    inside = _sum_forms(block, term.of, list(_constants(block)))
    return [_normed(*form) for form in product(inside, (0.0, 1.0), block.epsilons)]


def _sum_forms(block: _Block, terms: tuple[Term, ...], constants: Forms) -> Forms:
    """The forms of a sum inside a function. A norm in it has the weights of one of the block's modules.

    What the block adds of its own is one of `constants`, if there are any: else it is in what is fitted.
    """
    forms: Forms = [torch.zeros(())]
    for term in terms:
        if term.name == OWN:
            continue
        found = _forms(block, term) if term.of else [block.term(replace(term, factor=1.0))]
        if term.name == "norm" and len(terms) > 1:
            found = [weighted for form in found for weighted in _weighted(block, form)]
        forms = [have + term.factor * new for have in forms for new in found]
    own = sum(term.factor for term in terms if term.name == OWN)
    added = [form + own * each for form in forms for each in constants if each.shape == form.shape[-1:]]
    return added if own and added else forms


def _weighted(block: _Block, form: Tensor) -> Iterator[Tensor]:
    """A norm as it is, and with the weights of each module of the block that fit it."""
    yield form
    for module in block.model.get_submodule(block.path).modules():
        own = dict(module.named_parameters(recurse=False))
        weight, bias = own.get("weight"), own.get("bias")
        if weight is not None and tuple(weight.shape) == tuple(form.shape[-1:]):
            yield form * weight.detach().double() + (0.0 if bias is None else bias.detach().double())


def _constants(block: _Block) -> Iterator[Tensor]:
    """The block's parameters with one axis."""
    for parameter in block.model.get_submodule(block.path).parameters():
        if parameter.ndim == 1:
            yield parameter.detach().double()


def _epsilons(model: nn.Module) -> tuple[float, ...]:
    """What the model's norms may add to a mean of squares: with small numbers it shows."""
    named = (item for module in model.modules() for item in vars(module).items())
    found = {float(value) for name, value in named if "eps" in name and isinstance(value, int | float)}
    return (0.0, *sorted(found))


def _normed(value: Tensor, centred: float, epsilon: float) -> Tensor:
    value = value - centred * value.mean(-1, keepdim=True)
    return value / (value.square().mean(-1, keepdim=True) + epsilon).sqrt()


def _by_feature(rest: Tensor, given: list[Tensor]) -> Tensor:
    """The nearest `rest` in which each feature is a sum of multiples of the given ones, and a constant."""
    like = [each.expand_as(rest) for each in given]
    columns = torch.stack([*like, torch.ones_like(rest)], -1).flatten(0, -3).transpose(0, 1)  # [d, rows, unknowns]
    wanted = rest.flatten(0, -2).T.unsqueeze(-1)
    fitted: Tensor = columns @ (torch.linalg.pinv(columns) @ wanted)
    return fitted.squeeze(-1).T.reshape(rest.shape)


def _by_position(rest: Tensor, given: list[Tensor]) -> Tensor:
    """The nearest `rest` in which each stream of a position is a sum of multiples of that position's given ones."""
    axes = [each.reshape(*rest.shape[:2], -1, rest.shape[-1]) for each in given]
    span = torch.cat(axes, 2).transpose(-1, -2)  # [batch, pos, d, unknowns]
    wanted = rest.reshape(*rest.shape[:2], -1, rest.shape[-1]).transpose(-1, -2)
    fitted: Tensor = span @ (torch.linalg.pinv(span) @ wanted)
    return fitted.transpose(-1, -2).reshape(rest.shape)
