"""Arithmetic in a text, read as a syntax tree: numbers, + - * / // % ** and brackets. Nothing is ever run as code."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

LONGEST = 200
_MOST_BITS = 4096
_GROUPED = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3})(?![\d,])")
_NUMBER_AT_END = re.compile(r"(?:[\d_]+\.?[\d_]*|\.[\d_]+)(?:[eE][-+]?\d+)?$")
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """The value of an expression: a whole number, or a decimal of up to 10 places. Raises ValueError, with the reason.

    `3 * (4 + 1)`, `1,200 / 7`, `2 ^ 3` or `2 ** 3`. A percent sign belongs to the number before it: `100+5%` is 100.05.
    Between two numbers, as in `7 % 4`, it is a remainder. What may be either, or a comma in no thousands, is refused.
    """
    text = expression.strip().replace("$", "").replace("×", "*").replace("÷", "/").replace("^", "**")
    if not text or len(text) > LONGEST:
        raise ValueError(f"expected an expression of 1 to {LONGEST} characters, got {len(expression)}")
    text = _GROUPED.sub(lambda found: found[0].replace(",", ""), text)
    if "," in text:
        raise ValueError(f"a comma is understood between thousands only, as in 1,200: {expression[:60]!r}")
    text = _without_percents(text)
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not arithmetic: {expression[:60]!r}") from error
    except ZeroDivisionError as error:
        raise ValueError(f"division by zero: {expression[:60]!r}") from error
    if value.denominator == 1:
        return str(value.numerator)
    try:
        return f"{float(value):.10f}".rstrip("0").rstrip(".")
    except OverflowError as error:
        raise ValueError("the result is too large") from error


def _without_percents(text: str) -> str:
    """Replace percentages by divisions by 100. Raises ValueError if a sign may also be a remainder."""
    found, *pieces = text.split("%")
    kinds = set()
    for number, piece in enumerate(pieces):
        percent = _is_percent(found, piece, last=number == len(pieces) - 1)
        kinds.add(percent)
        found = _hundredth(found.rstrip()) + piece if percent else f"{found}%{piece}"
    if None in kinds or len(kinds) > 1:
        raise ValueError(
            f"% may be a percent sign or a remainder here: {text[:60]!r}. Write 5/100 for 5 %, and a % b with a space "
            "on each side for a remainder"
        )
    return found


def _is_percent(before: str, behind: str, last: bool) -> bool | None:
    """Whether the % between two texts is a percent sign; None if it may also be a remainder."""
    attached, behind_it = not before[-1:].isspace(), behind.lstrip()
    if not behind_it:
        return True if last else None
    if behind_it[0] in "*/)":
        return True
    if behind_it[0] in "+-":
        return True if attached or behind_it[1:2].isspace() else None
    return None if attached and (behind_it != behind or behind_it[0] == "(") else False


def _hundredth(text: str) -> str:
    """Divide the number or bracket at the text's end by 100. Raises ValueError if it ends with neither."""
    start = found.start() if (found := _NUMBER_AT_END.search(text)) else _opening(text)
    return f"{text[:start]}({text[start:]}/100)"


def _opening(text: str) -> int:
    """The index where the bracket at the text's end opens."""
    depth = 0
    for place in range(len(text) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(text[place], 0)
        if not depth:
            break
    if depth or not text.endswith(")"):
        raise ValueError(f"a percent sign belongs behind a number or a bracket, not behind {text[-20:]!r}")
    return place


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        found = _power(left, right) if isinstance(node.op, ast.Pow) else _combined(node.op, left, right)
        if found.numerator.bit_length() + found.denominator.bit_length() > _MOST_BITS:
            raise ValueError("the result is too large")
        return found
    raise ValueError(f"only numbers, + - * / // % ** and brackets are understood, not {type(node).__name__}")


def _combined(kind: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    if type(kind) not in _OPERATIONS:
        raise ValueError(f"only + - * / // % ** are understood, not {type(kind).__name__}")
    return _OPERATIONS[type(kind)](left, right)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """A whole power. Its size is checked before it is computed."""
    if exponent.denominator != 1:
        raise ValueError("only whole powers are understood")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > _MOST_BITS:
        raise ValueError("the result is too large")
    return Fraction(base ** int(exponent))
