"""The few turns of phrase that many messages share."""

import difflib
import re
from collections.abc import Iterable


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 sample`, `2 samples`."""
    return f"1 {noun}" if count == 1 else f"{count} {plural or f'{noun}s'}"


def did_you_mean(name: str, known: Iterable[str], n: int = 3, cutoff: float = 0.6) -> str | None:
    """`did you mean resid_mid or resid_pre?`, of the `n` known names nearest to `name`; None where none is near."""
    near = difflib.get_close_matches(name, list(known), n=n, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else None


def sentence(text: str | None) -> str:
    """The text with a capital letter, after a space; nothing where there is no text."""
    return f" {text[0].upper()}{text[1:]}" if text else ""


def in_call(call: int | None) -> str:
    """`, call 2`: behind a name of what a layer that runs several times has in each of its runs."""
    return "" if call is None else f", call {call}"


def is_number(text: str) -> bool:
    """Whether it is a number of up to nine ASCII digits, and nothing else."""
    return re.fullmatch("[0-9]{1,9}", text) is not None


def is_ascii_numeral(text: str) -> bool:
    """Whether `int` and `float` read nothing in it that they take beside ASCII numerals: full-width digits, `1_0`."""
    return text.isascii() and "_" not in text


def whole_number(text: str) -> int:
    """A number of up to 18 ASCII digits. Raises ValueError for what `int` reads beside: full-width digits, `1_0`."""
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()):
        raise ValueError(f"{text!r} is no whole number")
    return int(text)
