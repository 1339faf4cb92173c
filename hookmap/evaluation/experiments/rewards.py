"""What an answer is worth. Pure; each reward is given what it needs to see, and nothing else. All lie in 0 to 1."""

from collections.abc import Mapping
from typing import Any

from hookmap.evaluation.gsm8k.answers import SCORERS, is_form, numbers, same

NAMES = ("correctness", "format", "efficiency")
TOTAL = "total"


def correctness(text: str, target: str, scorer: str) -> float:
    """1 where the number that the scorer reads in the text is that of the target, else 0."""
    wanted = numbers(target)
    return float(bool(wanted) and same(SCORERS[scorer](text), wanted[-1]))


def format(text: str, scorer: str) -> float:
    """1 where the last line is what the scorer's rule asks for, right or wrong, and stands there once; else 0."""
    lines = text.strip().splitlines()
    if not lines or not is_form(lines[-1], scorer):
        return 0.0
    return float(scorer == "flexible" or all(SCORERS[scorer](line) is None for line in lines[:-1]))


def efficiency(tokens: int, most: int) -> float:
    """The share of `most` tokens that was not needed: 1 for none, 0 for all of them."""
    return 1.0 - min(tokens, most) / most


def rewarded(text: str, target: str, tokens: int, most: int, weights: Mapping[str, Any]) -> dict[str, float]:
    """All rewards of one answer by their names, and `total`, their weighted sum. weights: with `scorer`."""
    found = {
        "correctness": correctness(text, target, weights["scorer"]),
        "format": format(text, weights["scorer"]),
        "efficiency": efficiency(tokens, most),
    }
    return {**found, TOTAL: sum(weights[name] * value for name, value in found.items())}
