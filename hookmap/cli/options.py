"""How options are written that several commands take."""

import math
import os
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import click

from hookmap.wording import is_ascii_numeral


class FiniteRange(click.FloatRange):
    """`click.FloatRange` that refuses nan, which every comparison lets through, and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return found


class Folder(click.Path):
    """A path that is a folder or is not there yet: a file in its place is refused before anything is loaded."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        check_folder(value, param.get_error_hint(ctx) if param and ctx else "")
        return super().convert(value, param, ctx)


def check_folder(path: str | None, option: str) -> None:
    """Raises click.BadParameter where the path, or what it lies in, is a file."""
    places = (Path(path), *Path(path).parents) if path else ()
    if file := next((place for place in places if os.path.isfile(place)), None):  # no error of a name that none has
        raise click.BadParameter(f"{file} is a file: expected a folder. Name another one.", param_hint=option)


def in_ascii(number: "click.ParamType[Any]") -> "click.ParamType[Any]":
    """The same type of number, which refuses what `int` and `float` read beside ASCII numerals: `１２`, `1_000`."""
    own = copy(number)
    own.convert = partial(_converted, number)  # type: ignore[method-assign]
    return own


def _converted(
    number: "click.ParamType[Any]", value: Any, param: click.Parameter | None, ctx: click.Context | None
) -> Any:
    if isinstance(value, str) and not is_ascii_numeral(value):
        number.fail(f"{value!r} is no number: write it in the digits 0 to 9.", param, ctx)
    return number.convert(value, param, ctx)


def count(name: str, help: str | None = None, *, least: int = 1, unit: str = "N", **how: Any) -> Callable[..., Any]:
    """An option that takes a whole number from `least` on. Its help shows the default, where it has one."""
    shown = {"show_default": "default" in how, **how}
    return click.option(name, type=click.IntRange(min=least), metavar=unit, help=help, **shown)


def amount(name: str, unit: str, help: str, least: float = 0.001, **how: Any) -> Callable[..., Any]:
    """The same of a finite number."""
    shown = {"show_default": "default" in how, **how}
    return click.option(name, type=FiniteRange(min=least), metavar=unit, help=help, **shown)


calls_option = click.option(
    "--calls", metavar="CALLS", help="Which runs of layers that run several times: 0,2 or last or all.  [default: all]"
)


def option_group(*options: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that gives a command all of these options, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
