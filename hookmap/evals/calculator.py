"""Arithmetic in a text, read as a syntax tree: numbers, + - * / // % ** and brackets. Nothing is ever run as code."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

LONGEST = 200
_MOST_BITS = 4096
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

    `3 * (4 + 1)`, `1,200 / 7`, `50 %` (a hundredth), `2 ^ 3` or `2 ** 3`.
    """
    text = expression.strip().replace(",", "").replace("$", "").replace("×", "*").replace("÷", "/").replace("^", "**")
    if not text or len(text) > LONGEST:
        raise ValueError(f"expected an expression of 1 to {LONGEST} characters, got {len(expression)}")
    if text.endswith("%"):
        text = f"({text[:-1]})/100"
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
    """Whole powers only; how large the result gets is known before it is worked out."""
    if exponent.denominator != 1:
        raise ValueError("only whole powers are understood")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > _MOST_BITS:
        raise ValueError("the result is too large")
    return Fraction(base ** int(exponent))
