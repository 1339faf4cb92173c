"""Numbers of the command line, of which nan and inf are none: no comparison refuses nan, and inf is no size."""

import math
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """`click.FloatRange` of finite numbers."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return found
