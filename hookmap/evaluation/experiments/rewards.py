"""The rewards of an answer, as pure functions. Each lies between 0 and 1."""

from collections.abc import Mapping
from typing import Any

from hookmap.evaluation.gsm8k.answers import SCORERS, is_form, numbers, same

NAMES = ("correctness", "format", "efficiency")
TOTAL = "total"


def correctness(text: str, target: str, scorer: str) -> float:
    """1 if the number that the scorer finds in the text equals the target's number, else 0."""
    wanted = numbers(target)
    return float(bool(wanted) and same(SCORERS[scorer](text), wanted[-1]))


def format(text: str, scorer: str) -> float:
    """1 if the last line has the form that the scorer asks for, and no earlier line has it; else 0.

    The number itself may be wrong.
    """
    lines = text.strip().splitlines()
    if not lines or not is_form(lines[-1], scorer):
        return 0.0
    return float(scorer == "flexible" or all(SCORERS[scorer](line) is None for line in lines[:-1]))


def efficiency(tokens: int, most: int) -> float:
    """The share of the `most` allowed tokens that was not used: 1 if none was used, 0 if all were."""
    return 1.0 - min(tokens, most) / most


def rewarded(text: str, target: str, tokens: int, most: int, weights: Mapping[str, Any]) -> dict[str, float]:
    """Name -> reward of one answer, and `total`, their weighted sum. weights: the fields of `Rewards`."""
    found = {
        "correctness": correctness(text, target, weights["scorer"]),
        "format": format(text, weights["scorer"]),
        "efficiency": efficiency(tokens, most),
    }
    return {**found, TOTAL: sum(weights[name] * value for name, value in found.items())}
