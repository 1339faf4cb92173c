"""The number in an answer, by three rules of the literature. Pure functions from text to number.

- `strict`: the number after the last `####`, GSM8K's own form, as in lm-evaluation-harness's strict-match.
- `flexible`: the last number of the text, as in its flexible-extract.
- `inspect_evals`: the number after the last `ANSWER:`, as in inspect_evals' GSM8K.

Numbers compare by value: 1,200 is 1200.00 is $1200, 1.2e3, 1.2 × 10^3. Fractions are numbers: 3/4, 2 1/2, ½. A percent
sign or a unit after a number is not part of it. Where `strict` and `inspect_evals` would have to guess (12,5, 5-6,
5:30, 3+4=7, 5 or 6, 2^{10}, 0x12), there is no answer. `is_form` reads the same numbers.
"""

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from fractions import Fraction

_NUMBER = re.compile(
    r"(?:(?<![\w.])|(?<=\.\.)(?=\d))[-−]?(?:\$\s*)?[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+)?(?:\.\d+|(?<=\d))"
    r"(?:[eE][-+]?\d{1,3}(?!\w))?(?!\d|(?<=(?<!\d)0)[xX][\da-fA-F])"
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
_UNCLEAR = re.compile(
    r"[,.:'_eE-]\d|\s?[-+*/^×÷=±:]\s?[\d(.${\\]|\s+\d|\s?[*^×÷±]\s?[A-Za-z]"
    r"|\s?(?:√|π|\\(?:times|cdot|div|pm|sqrt|pi)(?![A-Za-z]))"
    r"|\s?x\s?\d|(?!(?:[cdkm]?m|ft|in)[23](?!\w))[A-Za-z]{1,3}\d"
    r"|\s+(?i:or|and|to|until|through|plus|minus|times)\s+[-+$]*\.?\d"
)
_ORNAMENT = r"[\s*_`~.$%€£¥(){}\[\]\\+]*"
_MARKS = {"strict": r"####+[ \t]*", "inspect_evals": r"(?i:ANSWER)\s*:[ \t]*"}
_WORDS = re.compile(r"\\(?:text|math|mbox|emph)(?:rm|bf|it|sf|tt)?\s*\{([^{}]*)\}")
_DECORATION = re.compile(r"\\[,!;: ]|\\left|\\right|\*\*|[`~]")
_PLAIN = str.maketrans({"\u2044": "/", "\u202f": ",", "\u2009": ",", "\u00a0": " ", "−": "-", "–": "-"})


def strict(text: str) -> Fraction | None:
    """The number right after the last `####`, or None."""
    return _behind(_MARKS["strict"] + r"([^\n#]*)", text)


def flexible(text: str) -> Fraction | None:
    """The last number of the text, or None. A LaTeX fraction is a number."""
    found = numbers(text)
    return found[-1] if found else None


def inspect_evals(text: str) -> Fraction | None:
    """The number right after the last `ANSWER:`, in any case, or None."""
    return _behind(_MARKS["inspect_evals"] + r"([^\n]*)", text)


SCORERS: dict[str, Callable[[str], Fraction | None]] = {
    "strict": strict,
    "flexible": flexible,
    "inspect_evals": inspect_evals,
}


def is_form(line: str, scorer: str) -> bool:
    """Whether a line has the form that the rule asks for and nothing else: its mark, then a number.

    `flexible` asks for no form: whether the line holds a number.
    """
    if scorer == "flexible":
        return flexible(line) is not None
    found = re.fullmatch(rf"[\s*_`]*{_MARKS[scorer]}(.*)", line)
    read = _read(found[1]) if found else None
    return read is not None and re.fullmatch(_ORNAMENT, read[1]) is not None


def numbers(text: str) -> list[Fraction]:
    """All numbers of a text, in order."""
    return [value for m in _NUMBER.finditer(_plain(text)) if (value := _value(m.group())) is not None]


def _behind(pattern: str, text: str) -> Fraction | None:
    *_, found = ["", *re.findall(pattern, text)]
    read = _read(found)
    return read[0] if read else None


def _read(text: str) -> tuple[Fraction, str] | None:
    """The number at the start of a short text, after brackets, currency and the like, and the text around it.

    None if the number is unclear.
    """
    plain = _SPACED.sub(lambda m: m[1] + m[2].replace(" ", ","), _plain(text).strip())
    plain = re.sub(r"^- (?=[$\d])", "-", plain)
    found = next((m for m in _NUMBER.finditer(plain) if _value(m.group()) is not None), None)
    first = re.search(r"\d", plain)
    if found is None or first is None or first.start() < found.start():
        return None
    before, value = plain[: found.start()], _value(found.group())
    if value is None or re.search(r"[A-Za-z]{2,}", before) or _UNCLEAR.match(plain, found.end()):
        return None
    return value, before + plain[found.end() :]


def _plain(text: str) -> str:
    """The text without LaTeX and decoration: boxes opened, fractions and powers as decimals of 10 places."""
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), _UNIT_POWER.sub("", text))
    text = _GROUPS.sub(",", text)
    text = text.translate(_PLAIN).replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = _BOX.sub(r" \1 ", text)
    text = _LATEX_FRACTION.sub(lambda m: f" {m[1] or ''}{m[2] or ''}{m[3] or m[6]}/{m[4] or m[7]} ", text)
    text = _WORDS.sub(lambda m: f" {m[1]} " if re.search(r"\d", m[1]) else "", text)
    text = _POWER.sub(lambda m: f"{m[1] or 1}e{m[2]}", text)
    return _DECORATION.sub(" ", _FRACTION.sub(_quotient, text))


def _quotient(found: re.Match[str]) -> str:
    """A fraction as a decimal: 3/4, and 2 1/2 if the fraction is less than 1."""
    sign, whole, above, below = found.groups()
    over, under = _value(above), _value(below)
    if over is None or not under:
        return found[0]
    if whole is not None and over >= under:
        return f"{sign}{whole} {float(over / under):.10f}"
    return f"{sign}{float((_value(whole or '0') or 0) + over / under):.10f}"


def _value(text: str) -> Fraction | None:
    if len(text) > _LONGEST:  # a model that repeats digits
        return None
    try:
        return Fraction(Decimal(re.sub(r"[,$\s]", "", text)))
    except (InvalidOperation, ValueError):
        return None


def same(one: Fraction | None, other: Fraction | None) -> bool:
    """Whether two numbers are equal, to a millionth. None is equal to nothing."""
    return one is not None and other is not None and abs(one - other) <= Fraction(1, 10**6)
