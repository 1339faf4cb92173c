"""Functions of a user's own in a run: `apply` writes the rows that they give, `watch` shows them rows.

A function is called once for each sample, layer and forward pass, with rows of real tokens only. So what it gives does
not depend on which prompts share a batch. These interventions are Python objects: no document can hold a function.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from pydantic import ValidationError

from hookmap.capture.interventions.documents import Function
from hookmap.capture.interventions.edits import Editor, TokensAt
from hookmap.errors import InterventionError
from hookmap.maps.selectors import Selector

Rows = torch.Tensor
"""[n, d], [n, heads, d_head] of points with heads, [n, heads, keys] of attention weights"""


@dataclass(frozen=True)
class At:
    """Where the rows are that a function gets: of one sample, at one point of one layer, in one forward pass."""

    point: str
    layer: int | None
    """None for points of the whole model"""
    call: int | None
    """which run of the layer in this forward pass; None where it runs once"""
    heads: tuple[int, ...] | None
    """the heads chosen; None for all, or where the point has none"""
    sample: int
    """its number in the run"""
    positions: tuple[int, ...]
    """of each row, 0 the sample's first token"""
    tokens: tuple[int, ...]
    """the token id of each row"""
    steps: tuple[int, ...]
    """of each row, 0 for tokens of the prompt and n for the n-th new token"""
    stop: Callable[[], None] = field(repr=False)
    """ends the sample with the token that this pass makes; the other samples go on"""

    @property
    def step(self) -> int:
        """The step of the last row: that of the pass, with a cache."""
        return self.steps[-1]

    def __str__(self) -> str:
        where = self.point if self.layer is None else f"{self.point}, layer {self.layer}"
        call = "" if self.call is None else f", call {self.call}"
        return f"{where}{call}, sample {self.sample}, step {self.step}"


def apply(
    fn: Callable[[Rows, At], Rows] | str,
    point: str,
    layers: Any = "all",
    positions: Any = "all",
    steps: Any = "all",
    heads: Any = None,
    calls: Any = "all",
) -> Function:
    """An intervention that writes what `fn(rows, at)` gives in place of `rows`.

    rows: [n, d] in the model's dtype, a copy, of the chosen tokens of one sample: never of pads. Points with heads have
    [n, heads, d_head]. at: an `At`, where they are. The function gives rows of the same shape, dtype and device, and
    finite ones where it got such; else, or where it raises, the run ends with InterventionError.
    A name "package.module:function" is imported.
    point, layers, positions, steps, heads, calls: as of every intervention. Raises InterventionError.
    """
    return _made("apply", fn, point, layers, positions, steps, heads, calls)


def watch(
    fn: Callable[[Rows, At], Any] | str,
    point: str,
    layers: Any = "all",
    positions: Any = "all",
    steps: Any = "all",
    heads: Any = None,
    calls: Any = "all",
) -> Function:
    """An intervention that shows `fn(rows, at)` the rows, after all that is written there, and writes nothing.

    Any point can be watched, sums and attention weights ([n, heads, keys], without those of pads) too. Each token is
    shown once. `at.stop()` ends the sample. The other arguments are those of `apply`. Raises InterventionError.
    """
    return _made("watch", fn, point, layers, positions, steps, heads, calls)


def _made(do: str, fn: Any, point: Any, layers: Any, positions: Any, steps: Any, heads: Any, calls: Any) -> Function:
    steps = None if isinstance(steps, str) and steps == "all" else steps
    given = {"point": point, "layers": layers, "positions": positions, "steps": steps, "heads": heads, "calls": calls}
    try:
        return Function.model_validate({"do": do, "fn": fn, **given})
    except ValidationError as error:
        problems = (f"{each['loc'][0]}: {each['msg'].removeprefix('Value error, ')}" for each in error.errors())
        raise InterventionError("\n".join(f"hookmap.{do}: {each}" for each in dict.fromkeys(problems))) from error


@dataclass(frozen=True)
class Called:
    """Calls a function with rows of one point, sample by sample."""

    given: Function
    selector: Selector
    batch: Editor | None = None
    """that of the batch that runs; None on vLLM, which makes the batches itself"""

    def in_batch(self, batch: Editor) -> "Called":
        return replace(self, batch=batch)

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None = None) -> torch.Tensor:
        """For `apply`: the new rows. Raises InterventionError, which names the sample, the layer and the step."""
        return torch.cat([self._checked(own, self._call(own, at), at) for own, at in self._samples(rows, where)])

    def show(self, rows: torch.Tensor, where: TokensAt) -> None:
        """For `watch`. Raises InterventionError, which names the sample, the layer and the step."""
        for own, at in self._samples(rows, where):
            self._call(own, at)

    def _samples(self, rows: torch.Tensor, where: TokensAt) -> Iterator[tuple[torch.Tensor, At]]:
        start = 0
        for sample, group in groupby(where, key=lambda token: token.sample):
            tokens = list(group)
            at = At(
                self.selector.point,
                self.selector.layer,
                self.selector.call,
                self.given.heads,
                sample,
                tuple(token.position for token in tokens),
                tuple(token.token for token in tokens),
                tuple(token.step for token in tokens),
                partial(self._stop, sample),
            )
            yield rows[start : start + len(tokens)].clone(), at
            start += len(tokens)

    def _stop(self, sample: int) -> None:
        if self.batch is None:
            raise InterventionError("at.stop() ends no request of vLLM's: give stop strings, or max_new_tokens.")
        self.batch.stop(sample)

    def _call(self, rows: torch.Tensor, at: At) -> Any:
        try:
            with contextlib.nullcontext() if self.batch is None else self.batch.aside():
                return self.given.fn(rows, at)
        except Exception as error:  # the user's own code may raise anything
            raise InterventionError(f"{self._name} for {at}: it raised {type(error).__name__}: {error}") from error

    def _checked(self, rows: torch.Tensor, found: Any, at: At) -> torch.Tensor:
        if not isinstance(found, torch.Tensor):
            hint = " To see rows and write none, give hookmap.watch." if found is None else ""
            raise self._wrong(at, "a tensor", type(found).__name__, hint)
        for what in ("shape", "dtype", "device"):
            expected, got = getattr(rows, what), getattr(found, what)
            if expected != got:
                told = (list(expected), list(got)) if what == "shape" else (expected, got)
                raise self._wrong(at, f"rows of {what} {told[0]}, as it got", f"{told[1]}")
        if found.is_floating_point() and bool((rows.isfinite().all() & ~found.isfinite().all()).item()):
            number = int((~found.flatten(1).isfinite().all(1)).nonzero()[0])
            raise self._wrong(at, "finite rows", f"an infinity or nan at position {at.positions[number]}")
        return found

    def _wrong(self, at: At, expected: str, got: str, hint: str = "") -> InterventionError:
        return InterventionError(f"{self._name} for {at}: expected {expected}, got {got}.{hint}")

    @property
    def _name(self) -> str:
        return f"hookmap.{self.given.do}({self.given.name}, …)"
