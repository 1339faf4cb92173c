"""Finite numbers as options. click.FloatRange lets nan through, since every comparison with it is false, and inf."""

import math
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """`click.FloatRange` that refuses nan and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return found
