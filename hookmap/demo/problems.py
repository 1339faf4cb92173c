"""Seeded generator of small word problems in GSM8K's answer form. Pure Python, no dependencies.

A problem is a question such as ``Tom has 3 apples. He buys 4 more. How many apples does Tom have?`` with the
worked answer ``Tom has 3+4=<<3+4=7>>7 apples.`` followed by the line ``#### 7``.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

Split = Literal["train", "heldout"]

NAMES: tuple[tuple[str, str], ...] = (
    ("Tom", "He"),
    ("Sam", "He"),
    ("Ben", "He"),
    ("Max", "He"),
    ("Leo", "He"),
    ("Dan", "He"),
    ("Ann", "She"),
    ("Mia", "She"),
    ("Eve", "She"),
    ("Amy", "She"),
    ("Zoe", "She"),
    ("Liv", "She"),
)
OBJECTS: tuple[str, ...] = ("apples", "pens", "books", "coins", "cards", "eggs", "balls", "cups")
CONTAINERS: tuple[str, ...] = ("bags", "boxes")
GAINS: tuple[str, ...] = ("buys {} more", "finds {} more", "gets {} more")
LOSSES: tuple[str, ...] = ("loses {}", "sells {}", "gives away {}")

#: What someone has lies in 1..LARGEST, what is gained or lost in 1..LARGEST_CHANGE, factors in 2..LARGEST_FACTOR.
LARGEST = 20
LARGEST_CHANGE = 12
LARGEST_FACTOR = 6

_FINAL = re.compile(r"####\s*(-?\d+)")


@dataclass(frozen=True)
class Problem:
    """One word problem: its question, its worked answer, the number asked for and the steps it takes."""

    question: str
    answer_text: str
    answer: int
    steps: int


def final_answer(text: str) -> int | None:
    """The number after the first ``####`` of an answer, or None where there is none."""
    found = _FINAL.search(text)
    return int(found.group(1)) if found else None


def split_of(question: str) -> Split:
    """The split a question belongs to: about one in ten is held out.

    It depends on nothing but the question's own text, so that no question can ever be in both splits.
    """
    digest = hashlib.sha256(question.encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % 10 == 0 else "train"


def _work(who: str, left: int, operator: str, right: int, what: str) -> tuple[str, int]:
    """One line of a worked answer, with GSM8K's calculator annotation, and its result."""
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return f"{who} {left}{operator}{right}=<<{left}{operator}{right}={result}>>{result} {what}.", result


def _change(rng: random.Random, total: int) -> tuple[str, str, int]:
    """A sentence part that changes ``total``, with its operator and its number; a total never falls below 0."""
    if total == 0 or rng.random() < 0.5:
        amount = rng.randint(1, LARGEST_CHANGE)
        return rng.choice(GAINS).format(amount), "+", amount
    amount = rng.randint(1, min(total, LARGEST_CHANGE))
    return rng.choice(LOSSES).format(amount), "-", amount


def _draw(rng: random.Random, steps: int) -> Problem:
    """Draw one problem of one or two steps."""
    name, pronoun = rng.choice(NAMES)
    thing = rng.choice(OBJECTS)
    ask = rng.choice(
        (
            f"How many {thing} does {name} have?",
            f"How many {thing} does {name} have now?",
            f"How many {thing} are there now?",
        )
    )
    lines: list[str] = []
    has = f"{name} has"
    kind = rng.random()
    if kind < 0.2:
        # a multiplication opens the problem
        left, right = rng.randint(2, LARGEST_FACTOR), rng.randint(2, LARGEST_FACTOR)
        opening = f"{name} has {left} {rng.choice(CONTAINERS)} with {right} {thing} each."
        line, total = _work(has, left, "*", right, thing)
        lines.append(line)
    elif kind < 0.4:
        # two owners: what they have together, or how many more the first has
        other = rng.choice([one for one, _ in NAMES if one != name])
        left, right = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
        if steps == 2 or rng.random() < 0.5:
            opening = f"{name} has {left} {thing} and {other} has {right}."
            ask = f"How many {thing} do they have?"
            has = "They have"
            line, total = _work(has, left, "+", right, thing)
        else:
            left, right = max(left, right), min(left, right)
            opening = f"{name} has {left} {thing} and {other} has {right}."
            ask = f"How many more {thing} does {name} have?"
            line, total = _work(has, left, "-", right, f"more {thing}")
        lines.append(line)
        pronoun = name
    else:
        total = rng.randint(1, LARGEST)
        opening = f"{name} has {total} {thing}."
    sentences = [opening]
    while len(lines) < steps:
        part, operator, amount = _change(rng, total)
        # "and" joins a second change of the same person, as people would write it
        if len(sentences) == 2:
            sentences[1] = sentences[1].removesuffix(".") + f" and {part}."
        else:
            sentences.append(f"{pronoun} {part}.")
        line, total = _work(has, total, operator, amount, thing)
        lines.append(line)
    return Problem(" ".join([*sentences, ask]), "\n".join([*lines, f"#### {total}"]), total, steps)


def stream(seed: int, split: Split, two_step_share: float = 0.5) -> Iterator[Problem]:
    """Yield problems of one split without end, in an order fixed by ``seed``; questions may repeat."""
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, not {split!r}")
    rng = random.Random(seed)
    while True:
        problem = _draw(rng, 2 if rng.random() < two_step_share else 1)
        if split_of(problem.question) == split:
            yield problem


def sample_problems(n: int, seed: int = 0, split: Split = "heldout", two_step_share: float = 0.5) -> list[Problem]:
    """The first ``n`` different problems of a seeded stream."""

    def unique() -> Iterator[Problem]:
        seen: set[str] = set()
        for problem in stream(seed, split, two_step_share):
            if problem.question not in seen:
                seen.add(problem.question)
                yield problem

    return list(islice(unique(), n))
