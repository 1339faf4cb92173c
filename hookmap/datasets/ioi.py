"""Pairs of the task "indirect object identification" (Wang et al., 2022), made of names that are one token each.

"When Mary and John went to the store, John gave a drink to" goes on with " Mary"; with Mary as the one who gives, with
" John". The corrupted prompt differs in that one token.
"""

import random
from typing import Any

from hookmap.datasets.pairs import Pair
from hookmap.errors import DataError

_NAMES = """Mary John Tom James Dan Sam Anna Mark Paul Lisa Kate Jack Jane Ben Amy Emma Peter David Laura Sarah
Michael Robert Daniel Alice Simon Adam Eric Rachel Kevin Brian Julia Henry George Susan Lucy Oliver Martin Alex
Chris Steve""".split()
_PLACES = "store park school beach office library station garden market house".split()
_THINGS = "drink book ring letter gift key basket bottle ball flower".split()
_TEMPLATES = (
    "When{a} and{b} went to the {place},{giver} gave a {thing} to",
    "Then,{a} and{b} were at the {place}, and{giver} handed a {thing} to",
    "After{a} and{b} came to the {place},{giver} offered a {thing} to",
)


def ioi_pairs(tokenizer: Any, count: int = 50, seed: int = 0) -> list[Pair]:
    """Pairs with different names and places. Raises DataError where the tokenizer has fewer than two such names."""
    names = [f" {name}" for name in _NAMES if _tokens(tokenizer, f" {name}") == 1]
    if len(names) < 2:
        raise DataError(f"this tokenizer makes one token of {len(names)} of {len(_NAMES)} names: two are needed.")
    draw, found = random.Random(seed), dict[tuple[str, ...], Pair]()
    most = len(_TEMPLATES) * len(names) * (len(names) - 1) * len(_PLACES) * len(_THINGS)
    while len(found) < min(count, most):
        a, b = draw.sample(names, 2)
        how = draw.choice(_TEMPLATES), draw.choice(_PLACES), draw.choice(_THINGS)
        if draw.random() < 0.5:
            answer, giver = a, b
        else:
            answer, giver = b, a
        clean, corrupted = (how[0].format(a=a, b=b, place=how[1], thing=how[2], giver=each) for each in (giver, answer))
        found.setdefault((*how, a, b, giver), Pair(clean, corrupted, answer, giver, f"ioi-{len(found)}"))
    return [*found.values()]


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
