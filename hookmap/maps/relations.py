"""The relations among the points of a block that a map states, and their text.

    resid_post = norm(0.5 * resid_mid + mlp_out)      form "sum"
    z = pattern @ v                                   form "product"
    mlp_out_raw = mlp.down_proj(mlp_post)             form "applied"
    resid_mid = 0.5 * layers.{i}.rate * resid_pre + mixer_out          form "sum", with a parameter of the model

In a sum a name is a point; `other` is what a block adds by itself, whatever the tokens are. A function says what is
done to the stream: `norm`; `gate`, each feature times a weight; `scale`, all features times one number; `mix`, several
streams mixed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from hookmap.maps.points import PointName

OWN = "other"
FURTHER = "other_of_tokens"
"""what a block adds that depends on the tokens and is no point: no relation with it is checked"""
FUNCTIONS = ("norm", "gate", "scale", "mix")


@dataclass(frozen=True)
class Term:
    """factor * weight * name, or factor * name(of)."""

    factor: float
    name: str
    of: tuple[Term, ...] = ()
    weight: str = ""
    """path of a parameter of the model: a number, or one for each feature"""

    def __str__(self) -> str:
        factor = ("" if self.factor == 1.0 else f"{self.factor:.9g} * ") + (f"{self.weight} * " if self.weight else "")
        return f"{factor}{self.name}{f'({_text(self.of)})' if self.of else ''}"

    def points(self) -> Iterator[str]:
        """The points that this term names; inside a function, if it is one."""
        for term in self.of:
            yield from term.points()
        if not self.of and self.name not in (OWN, FURTHER):
            yield self.name


@dataclass(frozen=True)
class Relation:
    """An equation that holds exactly: `total` is the sum or the product of the terms, or a function of the only one."""

    total: str
    terms: tuple[Term, ...]
    form: Literal["sum", "product", "applied"] = "sum"
    function: str = ""
    """of the form "applied": `topk`, or the path of a module inside the block (from the root, if `{i}` is in it)"""

    @classmethod
    def parse(cls, text: str) -> Relation | None:
        """None where the right side has none of the three forms."""
        total, _, right = text.partition(" = ")
        if (terms := _sum(right)) is not None:
            return cls(total, terms)
        if product := re.fullmatch(r"(\w+) @ (\w+)", right):
            return cls(total, tuple(Term(1.0, name) for name in product.groups()), "product")
        if applied := re.fullmatch(r"([\w.{}+]+)\((\w+)\)", right):
            return cls(total, (Term(1.0, applied[2]),), "applied", applied[1])
        return None

    def __str__(self) -> str:
        if self.form == "product":
            return f"{self.total} = {' @ '.join(map(str, self.terms))}"
        right = _text(self.terms)
        return f"{self.total} = {f'{self.function}({right})' if self.form == 'applied' else right}"

    def points(self) -> set[str]:
        """Every point that is named, on both sides."""
        return {self.total, *(name for term in self.terms for name in term.points())}

    def can_be_checked(self, known: Collection[str]) -> bool:
        """Whether each name is a known point. For what a branch adds, the branch's bare output suffices in a sum."""
        added = {term.name for term in self.terms if self.form == "sum" and not term.of} - {self.total}
        return all(name in known or (name in added and raw(name) in known) for name in self.points())

    @property
    def is_open(self) -> bool:
        """Whether something in it is no point."""
        return any(FURTHER in (term.name, *(each.name for each in term.of)) for term in self.terms)


def raw(point: str) -> str:
    """The bare output of the branch that adds `point`: mixer_out.1 -> mixer_out_raw.1."""
    return PointName.of(point).end("out_raw")


def _text(terms: tuple[Term, ...]) -> str:
    return " + ".join(map(str, terms))


def _sum(text: str) -> tuple[Term, ...] | None:
    terms = [_term(part) for part in _parts(text)]
    return None if None in terms else tuple(term for term in terms if term is not None)


def _parts(text: str) -> Iterator[str]:
    """The summands outside of brackets."""
    start = depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and text.startswith(" + ", place):
            yield text[start:place]
            start = place + 3
    yield text[start:]


def _term(text: str) -> Term | None:
    found = re.fullmatch(r"(?:(-?[\d.]\S*) \* )?(?:([^\W\d]\S*) \* )?(\w+(?:\.\d+)?)(?:\((.*)\))?", text, re.ASCII)
    if found is None or (found[4] is not None and found[3] not in FUNCTIONS):
        return None
    of = _sum(found[4]) if found[4] is not None else ()
    return None if of is None else Term(float(found[1] or 1), found[3], of, found[2] or "")
