"""The number that an answer gives, by the three rules of the literature. Pure: text in, number out.

- `strict`: what follows `####`, GSM8K's own form, as lm-evaluation-harness's strict-match reads it. The last one.
- `flexible`: the last number of the text, as its flexible-extract does.
- `inspect_evals`: what follows `ANSWER:` on the last line that says so, as inspect_evals' GSM8K asks for it.

Numbers compare by value: 1,200 is 1200.00 is $1200. A percent sign or a unit behind a number is no part of it.
"""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction

_NUMBER = re.compile(r"(?<![\w.])[-−]?(?:\$\s*)?[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?![\d])")
_BOX = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_FRACTION = re.compile(r"([-−]?)\s*\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*(-?[\d.,]+)\s*\}")
_DECORATION = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[,!;: ]|\\left|\\right|\*\*|[`~]")
_THIN = str.maketrans({"\u202f": ",", "\u2009": ",", "\u00a0": " ", "−": "-", "–": "-"})


def strict(text: str) -> Fraction | None:
    """The number behind the last `####`; None where there is none, or no number right behind it."""
    *_, found = ["", *re.findall(r"####[ \t]*([^\n]*)", text)]
    return _only(found)


def flexible(text: str) -> Fraction | None:
    """The last number of the text, a LaTeX fraction being one."""
    found = numbers(text)
    return found[-1] if found else None


def inspect_evals(text: str) -> Fraction | None:
    """The number behind the last `ANSWER:`, in capitals or not; None where there is none."""
    *_, found = ["", *re.findall(r"(?i)ANSWER\s*:[ \t]*([^\n]*)", text)]
    return _only(found)


SCORERS: dict[str, Callable[[str], Fraction | None]] = {
    "strict": strict,
    "flexible": flexible,
    "inspect_evals": inspect_evals,
}


def numbers(text: str) -> list[Fraction]:
    """All numbers of a text, in order."""
    plain = _plain(text)
    found = [(m.start(), value) for m in _NUMBER.finditer(plain) if (value := _value(m.group())) is not None]
    return [value for _, value in sorted(found)]


def _only(text: str) -> Fraction | None:
    """The first number of a short text that begins with it, but for brackets, currency and the like."""
    found = numbers(text)
    first = re.search(r"\d", _plain(text))
    if not found or first is None or re.search(r"[A-Za-z]{2,}", _plain(text)[: first.start()]):
        return None
    return found[0]


def _plain(text: str) -> str:
    """Without LaTeX: boxes opened, fractions as decimals that are exact enough to compare, decoration gone."""
    text = text.translate(_THIN).replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = _BOX.sub(r" \1 ", text)
    text = _FRACTION.sub(lambda m: f" {m[1]}{_quotient(m[2], m[3])} ", text)
    return _DECORATION.sub(" ", text)


def _quotient(above: str, below: str) -> str:
    over, under = _value(above), _value(below)
    return f"{float(over / under):.10f}" if over is not None and under else f"{above} / {below}"


def _value(text: str) -> Fraction | None:
    try:
        return Fraction(Decimal(re.sub(r"[,$\s]", "", text)))
    except (InvalidOperation, ValueError):
        return None


def same(one: Fraction | None, other: Fraction | None) -> bool:
    """Whether two numbers are equal, to a millionth. None is equal to nothing."""
    return one is not None and other is not None and abs(one - other) <= Fraction(1, 10**6)
