"""The two prompts of each pair as a run reads them: one that runs, and one whose values are put into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from hookmap.activations import Key, call_of
from hookmap.analysis.metrics import Bound, measure_and_capture
from hookmap.analysis.pairs import EncodedPairs
from hookmap.capture.batches import harvest_batches
from hookmap.capture.interventions.edits import Edit
from hookmap.capture.interventions.operations import Patched
from hookmap.capture.interventions.plan import EditPlan
from hookmap.capture.result import Capture
from hookmap.errors import CaptureError, InterventionError, SelectionError
from hookmap.maps.selectors import Selector

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

Side = Literal["base", "source"]
_CLOSE = 1e-3
"""of the difference between both prompts: how much the run on the source's embedding may differ from the source's"""


@dataclass(frozen=True)
class Sides:
    """`base` runs, and values of `source` are put into it; both with their metric, pair by pair."""

    hm: Hooked
    base: Bound
    source: Bound

    def __len__(self) -> int:
        return len(self.base.prompts)

    def of(self, numbers: Sequence[int]) -> Sides:
        """These pairs alone, in this order."""
        return Sides(self.hm, self.base.of(numbers), self.source.of(numbers))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pair, those of an answer that the metric reads included."""
        return [len(prompt.token_ids) for prompt in self.base.prompts]

    def batches(self, size: int | None, tokens: int) -> Iterator[tuple[int, ...]]:
        """Which pairs run together."""
        return harvest_batches(self.lengths, tokens, size)

    def run(
        self, side: Side, points: Any = (), layers: Any = "all", calls: Any = "all", plan: EditPlan | None = None
    ) -> tuple[torch.Tensor, Capture]:
        """The metric of each pair, float32 [pairs], and values of the same pass, in one batch."""
        batch = {"batch_size": len(self), "batch_tokens": len(self) * max(self.lengths)}
        return measure_and_capture(self.hm, getattr(self, side), points, layers, calls, plan or (), **batch)


def sides_of(pairs: EncodedPairs, metric: Any, noising: bool) -> Sides:
    """noising: corrupted values go into the clean run, and not the other way. Raises SelectionError."""
    clean, corrupted = pairs.bound(metric)
    if [len(prompt.token_ids) for prompt in clean.prompts] != [len(prompt.token_ids) for prompt in corrupted.prompts]:
        raise SelectionError("the metric reads answers of different lengths behind the two prompts of a pair.")
    base, source = (clean, corrupted) if noising else (corrupted, clean)
    return Sides(pairs.hm, base, source)


def written(selector: Selector, rows: Sequence[torch.Tensor]) -> EditPlan:
    """Sample n gets rows[n], [pos, ...], at this point."""
    starts = [0]
    for each in rows:
        starts.append(starts[-1] + len(each))

    @cache
    def row_of(sample: int) -> dict[int, int]:
        return {position: starts[sample] + position for position in range(len(rows[sample]))}

    patched = Patched(torch.cat([*rows]), row_of)
    return EditPlan((Edit(selector, patched, only=patched),), [])


def of_sample(selector: Selector, sample: int, rows: torch.Tensor, at: Sequence[int], heads: Any = None) -> Edit:
    """One sample gets these rows at these positions, [positions, ...]; of these heads, where there are such."""
    places = {position: row for row, position in enumerate(at)}
    chosen = None if heads is None else tuple(heads)

    def row_of(number: int) -> dict[int, int]:
        return places if number == sample else {}

    patched = Patched(rows if chosen is None else rows[:, [*chosen]], row_of)
    return Edit(selector, patched, heads=chosen, only=patched)


@dataclass(frozen=True)
class Path:
    """From the base's token embeddings (0) to the source's (1), in a straight line."""

    sides: Sides
    selector: Selector
    starts: tuple[torch.Tensor, ...]
    """of each pair, the embeddings of the base, [pos, d]"""
    ends: tuple[torch.Tensor, ...]

    def at(self, share: float) -> EditPlan:
        """Runs of the base get this place of the path for their embeddings."""
        rows = [start + share * (end - start) for start, end in zip(self.starts, self.ends, strict=True)]
        return written(self.selector, rows)


def path_of(sides: Sides) -> Path:
    """Raises SelectionError where the model reads tokens elsewhere too: the path does not lead to the source then."""
    selector = embedding_of(sides.hm)
    (base, start), (wanted, end) = (sides.run(side, ["embed"]) for side in ("base", "source"))
    starts, ends = (tuple(run.read(number, "embed") for number in range(len(sides))) for run in (start, end))
    path = Path(sides, selector, starts, ends)
    reached, _ = sides.run("base", plan=path.at(1.0))
    apart = (reached - wanted).abs()
    if not bool((apart <= _CLOSE * (1 + (wanted - base).abs())).all()):
        raise SelectionError(
            f"with the other prompt's embeddings {sides.hm.map.architecture} does not give its metric "
            f"({float(reached[apart.argmax()]):.4g}, expected {float(wanted[apart.argmax()]):.4g}): it reads tokens "
            "elsewhere than at `embed` too, so that no straight path leads from one prompt to the other. Take steps=1."
        )
    return path


def embedding_of(hm: Hooked) -> Selector:
    """Where token embeddings are written. Raises InterventionError where they must not be."""
    [selector] = hm.selectors(["embed"])
    if (reason := hm.proofs.of(selector).reason) is not None:
        raise InterventionError(f"embed is not written: {reason}.")
    return selector


def check_steps(steps: Any, least: int = 1) -> int:
    """Raises SelectionError."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise SelectionError(f"steps: expected a whole number from {least} on, got {steps!r}.")
    return steps


def middles(steps: int) -> list[float]:
    """The middles of `steps` equal parts of 0 to 1: the mean of an integrand there is its integral to second order."""
    return [(step + 0.5) / steps for step in range(steps)]


def read(run: Any, sample: int, key: Key) -> torch.Tensor:
    """Rows of one tensor, float32 unless float64."""
    rows: torch.Tensor = run.read(sample, key[0], key[1], call_of(key))
    return rows if rows.dtype == torch.float64 else rows.float()


def refuse_infinite(scores: Sequence[torch.Tensor], what: str) -> None:
    """Raises CaptureError where a score is no finite number."""
    if not all(bool(each.isfinite().all()) for each in scores):
        raise CaptureError(f'{what} is not finite: open the model in a dtype of a wider range, dtype="float32".')
