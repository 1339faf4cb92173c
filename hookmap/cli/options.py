"""How options are written that several commands take."""

import math
from collections.abc import Callable
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """`click.FloatRange` that refuses nan, which every comparison lets through, and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return found


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
