"""Verification of the additions of a block: each relation that a map states, as arithmetic on what was captured.

What a relation leaves open (the weights of a norm, of a gate, of a mixture of streams) is fitted, and must fit all
rows: of each feature, over all positions, or of each position, over all features, there are far more numbers than
unknowns. No module of the model is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from hookmap.maps.relations import OWN, Relation, Term, raw
from hookmap.maps.templates import BlockKind
from hookmap.verification.runner import CheckedRun, Result

Forms = list[Tensor]
"""what a tensor may be: a norm is with or without the mean"""


class Relations(CheckedRun):
    """The checks of the relations whose right side is a sum; the others are of the inside of a branch."""

    def checks(self, kind: BlockKind) -> Iterator[Result]:
        for text in kind.relations:
            relation = Relation.parse(text)
            if relation is None or relation.form != "sum":
                continue
            errors = [self._misfit(relation.total, relation.terms, layer) for layer in kind.layers]
            plain = not any(term.of for term in relation.terms)
            yield "sum" if plain else "relation", kind.layers, max(errors) <= self.tolerance, text, max(errors)

    def _misfit(self, left: str, terms: tuple[Term, ...], layer: int) -> float:
        """How far the left side is from the nearest tensor that the right side allows."""
        try:
            rest = self.values[left, layer].double()
            whole = rest
            open_terms: list[Forms] = []
            for term in terms:
                if not term.of and (value := self.values.get((term.name, layer))) is not None:
                    rest = rest - term.factor * value.double()
                elif term.name != OWN:
                    open_terms.append(self._forms(term, layer))
        except KeyError:
            return float("inf")
        if not open_terms:  # what a block adds of its own is the same for every text
            own = rest.mean(0, keepdim=True) if any(term.name == OWN for term in terms) else 0.0
            return self.error(whole - rest + own, whole)
        mixed = any(term.name == "mix" for term in terms) or whole.dim() > 3
        fit = _by_position if mixed else _by_feature
        return min(self.error(whole - rest + fit(rest, list(each)), whole) for each in product(*open_terms))

    def _forms(self, term: Term, layer: int) -> Forms:
        if not term.of:
            return [self.values[raw(term.name), layer].double()]
        inside = self._inside(term.of, layer)
        if term.name == "norm":
            ways = product(inside, (0.0, 1.0), self._epsilons)
            return [_normed(each, centred, epsilon) for each, centred, epsilon in ways]
        return inside

    def _inside(self, terms: tuple[Term, ...], layer: int) -> Forms:
        """All that a sum may be to which something is done; a norm in it has the weights of one of the block's."""
        forms: Forms = [torch.zeros(())]
        for term in terms:
            if term.name == OWN:
                continue
            if term.of:
                found = self._forms(term, layer)
                if term.name == "norm" and len(terms) > 1:
                    found = [weighted for form in found for weighted in self._weighted(form, layer)]
            else:
                found = [self.values[term.name, layer].double()]
            forms = [have + term.factor * new for have in forms for new in found]
        return forms

    @cached_property
    def _epsilons(self) -> tuple[float, ...]:
        """What the model's norms may add to a mean of squares: beside small numbers it shows."""
        named = (item for module in self.model.modules() for item in vars(module).items())
        found = {float(value) for name, value in named if "eps" in name and isinstance(value, int | float)}
        return (0.0, *sorted(found))

    def _weighted(self, form: Tensor, layer: int) -> Iterator[Tensor]:
        """A norm within a norm: its weights are those of one of the block's modules."""
        yield form
        block = self.model.get_submodule(self.map.layers_path.replace("{i}", str(layer)))
        for module in block.modules():
            own = dict(module.named_parameters(recurse=False))
            weight, bias = own.get("weight"), own.get("bias")
            if weight is not None and tuple(weight.shape) == tuple(form.shape[-1:]):
                yield form * weight.detach().double() + (0.0 if bias is None else bias.detach().double())


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
