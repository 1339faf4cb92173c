"""The number that an answer gives, by the three rules of the literature. Pure: text in, number out.

- `strict`: what follows `####`, GSM8K's own form, as lm-evaluation-harness's strict-match reads it. The last one.
- `flexible`: the last number of the text, as its flexible-extract does.
- `inspect_evals`: what follows `ANSWER:` on the last line that says so, as inspect_evals' GSM8K asks for it.

Numbers compare by value: 1,200 is 1200.00 is $1200, 1.2e3, 1.2 × 10^3. Fractions are numbers: 3/4, 2 1/2, ½. A percent
sign or a unit behind a number is no part of it. What `strict` and `inspect_evals` could only guess (12,5, 5-6, 5:30,
3+4=7) is no answer.
"""

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction

_NUMBER = re.compile(
    r"(?:(?<![\w.])|(?<=\.\.)(?=\d))[-−]?(?:\$\s*)?[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+)?(?:\.\d+|(?<=\d))"
    r"(?:[eE][-+]?\d{1,3}(?!\w))?(?![\d])"
)
_BOX = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_LATEX_FRACTION = re.compile(
    r"(?:([-−])\s*)?\\[dt]?frac\s*(?:\{\s*(-?)([\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}|()(\d)\s*(\d))"
)
_FRACTION = re.compile(r"(?<![\w./,])(-?)(?:(\d+)[ ]+)?(\d[\d,]*(?:\.\d+)?)/(\d[\d,]*(?:\.\d+)?)(?![\d/]|\.\d)")
_VULGAR = re.compile(r"[¼½¾⅐-⅞]")
_POWER = re.compile(
    r"(?<![\w.])(?:(-?\d+(?:\.\d+)?)\s*(?:[x×*·]|\\times|\\cdot)\s*)?(?<![\w.])10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?"
)
_GROUPS = re.compile(r"(?<=\d)(?:[\u00a0'’~]|,?\\[,!;: ])(?=\d{3}(?!\d))")
_SPACED = re.compile(r"^(\W*\d{1,3})((?: \d{3})+)(?![\d,/])")
_UNIT_POWER = re.compile(r"(?<![\d)\s])\s?\^\s?\{?[-+]?\d+\}?")
_LONGEST = 300
_UNCLEAR = re.compile(r"[,.:'_eE-]\d|\s?[-+*/^×÷=±:]\s?[\d(.$]|\s+\d")
_WORDS = re.compile(r"\\(?:text|math|mbox|emph)(?:rm|bf|it|sf|tt)?\s*\{([^{}]*)\}")
_DECORATION = re.compile(r"\\[,!;: ]|\\left|\\right|\*\*|[`~]")
_PLAIN = str.maketrans({"\u2044": "/", "\u202f": ",", "\u2009": ",", "\u00a0": " ", "−": "-", "–": "-"})


def strict(text: str) -> Fraction | None:
    """The number behind the last `####`; None where there is none, or no number right behind it."""
    *_, found = ["", *re.findall(r"####+[ \t]*([^\n#]*)", text)]
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
    return [value for m in _NUMBER.finditer(_plain(text)) if (value := _value(m.group())) is not None]


def _only(text: str) -> Fraction | None:
    """The number that a short text begins with, but for brackets, currency and the like; None where it is unclear."""
    plain = _SPACED.sub(lambda m: m[1] + m[2].replace(" ", ","), _plain(text).strip())
    plain = re.sub(r"^- (?=[$\d])", "-", plain)
    found = next((m for m in _NUMBER.finditer(plain) if _value(m.group()) is not None), None)
    first = re.search(r"\d", plain)
    if found is None or first is None or first.start() < found.start():
        return None
    if re.search(r"[A-Za-z]{2,}", plain[: found.start()]) or _UNCLEAR.match(plain, found.end()):
        return None
    return _value(found.group())


def _plain(text: str) -> str:
    """Without LaTeX: boxes opened, fractions and powers as decimals exact enough to compare, ornaments gone."""
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), _UNIT_POWER.sub("", text))
    text = _GROUPS.sub(",", text)
    text = text.translate(_PLAIN).replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = _BOX.sub(r" \1 ", text)
    text = _LATEX_FRACTION.sub(lambda m: f" {m[1] or ''}{m[2] or ''}{m[3] or m[6]}/{m[4] or m[7]} ", text)
    text = _WORDS.sub(lambda m: f" {m[1]} " if re.search(r"\d", m[1]) else "", text)
    text = _POWER.sub(lambda m: f"{m[1] or 1}e{m[2]}", text)
    return _DECORATION.sub(" ", _FRACTION.sub(_quotient, text))


def _quotient(found: re.Match[str]) -> str:
    """3/4, and 2 1/2 where what follows is less than 1."""
    sign, whole, above, below = found.groups()
    over, under = _value(above), _value(below)
    if over is None or not under:
        return found[0]
    if whole is not None and over >= under:
        return f"{sign}{whole} {float(over / under):.10f}"
    return f"{sign}{float((_value(whole or '0') or 0) + over / under):.10f}"


def _value(text: str) -> Fraction | None:
    if len(text) > _LONGEST:  # what repeats itself is no answer
        return None
    try:
        return Fraction(Decimal(re.sub(r"[,$\s]", "", text)))
    except (InvalidOperation, ValueError):
        return None


def same(one: Fraction | None, other: Fraction | None) -> bool:
    """Whether two numbers are equal, to a millionth. None is equal to nothing."""
    return one is not None and other is not None and abs(one - other) <= Fraction(1, 10**6)
