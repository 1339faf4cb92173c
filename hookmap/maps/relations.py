"""The relations that a map states, as expressions. Pure.

    resid_post = norm(0.5 * resid_mid + mlp_out)

A name is a point; `other` is what a block adds of its own, whatever the tokens are. A function says what is done to
the stream: `norm`; `gate`, each feature times a weight; `scale`, all times one; `mix`, several streams together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from hookmap.maps.points import PointName

OWN = "other"
FUNCTIONS = ("norm", "gate", "scale", "mix")


@dataclass(frozen=True)
class Term:
    """factor * name, or factor * name(of)."""

    factor: float
    name: str
    of: tuple[Term, ...] = ()


def parse(relation: str) -> tuple[str, tuple[Term, ...]] | None:
    """Left side, and the terms of the sum on the right; None where the right is another expression (`pattern @ v`)."""
    left, _, right = relation.partition(" = ")
    terms = _sum(right)
    return None if terms is None else (left, terms)


def _sum(text: str) -> tuple[Term, ...] | None:
    terms = [_term(part) for part in _parts(text)]
    return None if None in terms else tuple(term for term in terms if term is not None)


def _parts(text: str) -> Iterator[str]:
    """The summands that stand outside of brackets."""
    start = depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and text.startswith(" + ", place):
            yield text[start:place]
            start = place + 3
    yield text[start:]


def _term(text: str) -> Term | None:
    found = re.fullmatch(r"(?:(\S+) \* )?(\w+(?:\.\d+)?)(?:\((.*)\))?", text)
    if found is None or (found[3] is not None and found[2] not in FUNCTIONS):
        return None
    of = _sum(found[3]) if found[3] is not None else ()
    return None if of is None else Term(float(found[1] or 1), found[2], of)


def points(terms: tuple[Term, ...]) -> Iterator[str]:
    """The points that an expression names."""
    for term in terms:
        if term.of:
            yield from points(term.of)
        elif term.name != OWN:
            yield term.name


def can_be_checked(relation: str, known: Collection[str]) -> bool:
    """Whether what it names is there: each point, or, of what a branch adds, the tensor that it is a multiple of."""
    found = parse(relation)
    if found is None:
        return all(name in known for name in re.findall(r"[a-z_]+", re.sub(r"[\w.{}]+\(", "(", relation)))
    left, terms = found
    inner = [name for term in terms for name in points(term.of)]
    outer = [term.name for term in terms if not term.of and term.name != OWN]
    return left in known and all(n in known for n in inner) and all(n in known or raw(n) in known for n in outer)


def raw(point: str) -> str:
    """The bare output of the branch that adds `point`: mixer_out.1 -> mixer_out_raw.1."""
    return PointName.of(point).end("out_raw")
