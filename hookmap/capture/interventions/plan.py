"""Interventions held against a model, its map and the prompts -> edits that an engine applies. All problems at once."""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from hookmap.capture.interventions import operations as changes
from hookmap.capture.interventions.documents import (
    Ablate,
    Clamp,
    Intervention,
    Patch,
    ProjectOut,
    Scale,
    Steer,
    fingerprint,
)
from hookmap.capture.interventions.edits import Changing, Edit
from hookmap.capture.interventions.sources import Editable, Read, Sources
from hookmap.capture.interventions.vectors import read_vector
from hookmap.capture.rows import RowSelection, row_selection
from hookmap.errors import HookmapError, InterventionError, SelectionError
from hookmap.loading.chat_template import Templating
from hookmap.loading.prompts import Prompt
from hookmap.maps.describe import layers_text
from hookmap.maps.points import PointName, parse_point
from hookmap.maps.selectors import Selector, select
from hookmap.wording import counted


@dataclass(frozen=True)
class Plan:
    """What a run writes."""

    edits: tuple[Edit, ...]
    settings: list[dict[str, Any]]
    """the interventions as a manifest records them"""


def plan(
    hm: "Editable",
    interventions: Sequence[Intervention],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    how: Templating,
) -> Plan:
    """Raises SelectionError for points, layers and positions that are not there, InterventionError for the rest."""
    planner = _Planner(hm, prompts, max_new_tokens, Sources(hm, how))
    edits: list[Edit] = []
    for number, intervention in enumerate(interventions):
        planner.name = f"intervention {number} ({intervention.do} {intervention.point})"
        edits += planner.edits(intervention)
    planner.raise_problems()
    return Plan(tuple(edits), fingerprint(interventions))


@dataclass
class _Planner:
    hm: "Editable"
    prompts: Sequence[Prompt]
    max_new_tokens: int
    sources: Sources
    name: str = ""
    problems: list[str] = field(default_factory=list)
    unselected: bool = False

    def edits(self, given: Intervention) -> list[Edit]:
        """Of one intervention, on each of its layers; empty where there is a problem."""
        before = len(self.problems)
        selectors = self._selectors(given)
        positions, steps = self._positions(given.positions), self._steps(given.steps)
        self._check_reach(positions, steps)
        matching = self._matching(positions)
        rows = self._rows(given, selectors)
        if len(self.problems) > before:
            return []
        made = []
        for selector, row in zip(selectors, rows, strict=True):
            with _Problems(self):
                change = self._change(given, selector, row, positions, steps, matching)
                _check_range(change, self.hm.proofs.of(selector).dtype)
                means = isinstance(change, changes.Averaged)
                # A token that is generated may be what `text=` means: a patch writes the tokens that were paired.
                only = change if isinstance(change, changes.Patched) else None
                made.append(Edit(selector, change, positions, steps, matching, given.heads, only, means))
        return made

    def raise_problems(self) -> None:
        """Raises what was found, if anything was."""
        found = list(dict.fromkeys(self.problems))
        if found:
            kind = SelectionError if self.unselected else InterventionError
            count = counted(len(found), "problem")
            raise kind(f"{count} with the interventions:\n" + "\n".join(found))

    def note(self, problem: str, unselected: bool = False) -> None:
        """A problem with the intervention at hand."""
        self.problems.append(f"  - {self.name}: {problem}")
        self.unselected |= unselected

    def _selectors(self, given: Intervention) -> tuple[Selector, ...]:
        try:
            return select(self.hm.map, [given.point], given.layers)
        except SelectionError as error:
            parsed = parse_point(given.point)
            near = []
            if isinstance(parsed, str):
                near = difflib.get_close_matches(given.point, self.hm.map.points, n=2)
            hint = f" (this model has {', '.join(near)})" if near else ""
            self.note(str(error).partition("\nSee what there is")[0] + hint, unselected=True)
            return ()

    def _positions(self, given: Any) -> RowSelection:
        try:
            found = row_selection(positions=given)
        except SelectionError as error:
            self.note(str(error), unselected=True)
            return RowSelection()
        if found.positions == "last":
            self.note(
                'positions "last": which token is the last is not known while it is written. Use last_prompt.',
                unselected=True,
            )
        return found

    def _check_reach(self, positions: RowSelection, steps: RowSelection | None) -> None:
        """Notes single positions and steps that no prompt comes to: nothing would be written there."""
        if not self.prompts:  # they are not known yet
            return
        try:
            positions.refuse_beyond([len(prompt.token_ids) for prompt in self.prompts], self._more)
        except SelectionError as error:
            self.note(str(error), unselected=True)
        if steps is not None and (never := [step for step in steps.singles if step > self._more]):
            self.note(
                f"steps {', '.join(map(str, never))}: the last is {self._more} with max_new_tokens="
                f"{self.max_new_tokens}, as the last new token is not read.",
                unselected=True,
            )

    @property
    def _more(self) -> int:
        """Tokens that are read behind a prompt, at most."""
        return max(0, self.max_new_tokens - 1)

    def _steps(self, given: Any) -> RowSelection | None:
        if given is None:
            return None
        try:
            found = row_selection(positions=given)
            if isinstance(found.positions, tuple) and all(part is None or part >= 0 for part in found.positions):
                return found
        except SelectionError:
            pass
        self.note(f'steps {given!r}: expected steps such as 0 (the prompt) or [1, 2], or a span "1:"', unselected=True)
        return None

    def _matching(self, positions: RowSelection) -> frozenset[int]:
        try:
            return self.hm.matching(positions)
        except SelectionError as error:
            self.note(str(error), unselected=True)
            return frozenset()

    def _rows(self, given: Intervention, selectors: Sequence[Selector]) -> list[tuple[int, ...]]:
        """Shape of one row on each layer, of the chosen heads."""
        refused: dict[str, list[int]] = {}
        rows = []
        for selector in selectors:
            proof = self.hm.proofs.of(selector)
            if proof.reason is not None:
                refused.setdefault(proof.reason, []).append(-1 if selector.layer is None else selector.layer)
            rows.append(proof.row if given.heads is None else (len(given.heads), *proof.row[1:]))
            wrong = None if given.heads is None else why_not_heads(given.heads, selector.point, proof.row)
            if wrong and proof.reason is None:
                self.note(wrong)
        for reason, layers in refused.items():
            where = "" if layers == [-1] else f" of {layers_text(layers)}"
            self.note(f"{selectors[0].point}{where} is not written: {reason}.")
        return rows

    def _change(
        self,
        given: Intervention,
        selector: Selector,
        row: tuple[int, ...],
        positions: RowSelection,
        steps: RowSelection | None,
        matching: frozenset[int],
    ) -> Changing:
        if isinstance(given, Steer):
            return changes.Steered(_fitting(given.vector, row), given.strength, given.keep_norm)
        if isinstance(given, ProjectOut):
            return changes.ProjectedOut(_unit(given.direction, row))
        if isinstance(given, Scale):
            return changes.Scaled(given.factor)
        if isinstance(given, Clamp):
            least, most = (given.min, given.max) if given.value is None else (given.value, given.value)
            if given.feature is not None and given.feature >= row[-1]:
                raise InterventionError(f"feature {given.feature} is not there: a row has 0 to {row[-1] - 1}.")
            direction = None if given.direction is None else _unit(given.direction, row)
            return changes.Clamped(given.feature, direction, least, most)
        if isinstance(given, Patch):
            own = self._positions(given.source.positions) if given.source.positions is not None else positions
            read = self.sources.read(given.source, selector, own, self._matching(own))
            rows = _of_heads(_same_row(read.rows, selector, row, given.heads), given.heads)
            row_of = self._pairs(read, positions, steps, matching)
            return changes.Patched(rows, row_of)
        return self._ablation(given, selector, row)

    def _ablation(self, given: Ablate, selector: Selector, row: tuple[int, ...]) -> Changing:
        if given.vector is not None:
            return changes.Filled(_fitting(given.vector, row))
        if given.source is None:
            return changes.Filled(None) if given.to == "zero" else changes.Averaged()
        own = self._positions("all" if given.source.positions is None else given.source.positions)
        read = self.sources.read(given.source, selector, own, self._matching(own))
        rows = _of_heads(_same_row(read.rows, selector, row, given.heads), given.heads)
        return changes.Resampled(rows, given.seed) if given.to == "resample" else changes.Filled(rows.float().mean(0))

    def _pairs(
        self, read: Read, positions: RowSelection, steps: RowSelection | None, matching: frozenset[int]
    ) -> Callable[[int], Mapping[int, int]]:
        """Position of a sample -> row of the source. Raises InterventionError where a prompt does not pair."""

        @cache
        def row_of(sample: int) -> Mapping[int, int]:
            targets = self._targets(self.prompts[sample], positions, steps, matching)
            count = len(read.rows)
            if count == 1:
                return dict.fromkeys(targets, 0)
            if twice := [position for position, times in Counter(targets).items() if times > 1]:
                raise InterventionError(
                    f"positions {', '.join(map(str, positions.singles))}: two of them are token {twice[0]} of prompt "
                    f"{sample}, whose {len(self.prompts[sample].token_ids)} tokens negative ones count back from. "
                    "Name each token once."
                )
            if len(targets) != count:
                raise InterventionError(
                    f"{len(targets)} tokens of prompt {sample} (and of what it may generate) are to be patched, and "
                    f"the source has {count} rows for them. Give positions and source.positions that pair."
                )
            return dict(zip(targets, range(count), strict=True))

        for sample in range(len(self.prompts)):
            row_of(sample)
        return row_of

    def _targets(
        self, prompt: Prompt, positions: RowSelection, steps: RowSelection | None, matching: frozenset[int]
    ) -> list[int]:
        """Positions of a prompt, and of what may come behind it, in the order that `RowSelection.places` says."""
        length = len(prompt.token_ids)
        places = positions.places([*prompt.token_ids, *[-1] * self._more], length, matching)
        return [p for p in places if steps is None or steps.wanted(0)(max(0, p - length + 1), -1)]


def why_not_heads(heads: tuple[int, ...], point: str, row: tuple[int, ...]) -> str | None:
    """Why these are no heads of a point with such rows; None where they are."""
    if "heads" not in PointName.of(point).definition.axes:
        return f"heads {list(heads)}: {point} has no heads."
    if not heads:
        return "no heads given: name at least one, or leave heads out."
    if len(set(heads)) < len(heads):
        return f"heads {list(heads)}: name each head once."
    if wrong := [head for head in heads if not 0 <= head < row[0]]:
        return f"heads {wrong} are not there: {point} has 0 to {row[0] - 1}."
    return None


class _Problems:
    """Notes what hookmap raises inside as a problem of the intervention at hand."""

    def __init__(self, planner: _Planner) -> None:
        self._planner = planner

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if isinstance(error, HookmapError):
            self._planner.note(str(error))
            return True
        return False


def _fitting(given: Any, row: tuple[int, ...]) -> torch.Tensor:
    """The vector in the shape of a row, or of a row's last axis."""
    vector = read_vector(given)
    if tuple(vector.shape) in (row, row[-1:]):
        return vector
    if vector.ndim == 1 and vector.numel() == math.prod(row):
        return vector.reshape(row)
    raise InterventionError(f"a vector of {list(vector.shape)}: expected {list(row)}, a row there.")


def _unit(given: Any, row: tuple[int, ...]) -> torch.Tensor:
    vector = _fitting(given, row)
    length = vector.norm(dim=-1, keepdim=True)
    if not bool(((length > 0) & length.isfinite()).all()):  # squares of small and of large numbers leave float32
        vector = vector.double()
        length = vector.norm(dim=-1, keepdim=True)
    if not bool((length > 0).all()):
        raise InterventionError("a direction of length 0: expected one that points somewhere.")
    unit: torch.Tensor = vector / length
    return unit.float()


def _check_range(change: Changing, dtype: torch.dtype) -> None:
    """Raises InterventionError where what is written leaves the numbers that the model computes in."""
    numbers = changes.brought(change)
    if not bool(numbers.isfinite().all()):
        raise InterventionError(
            "it would write an infinity or nan: the rows of its source are not finite. See which: hookmap inspect, and "
            "capture or open the model in a dtype of a wider range (--dtype bfloat16)."
        )
    if not bool(numbers.to(dtype).isfinite().all()):
        raise InterventionError(
            f"it writes numbers up to {float(numbers.abs().max()):.3g}, and {dtype} of this point goes up to "
            f"{torch.finfo(dtype).max:.3g}. Give smaller ones, or open the model in a wider dtype."
        )


def _same_row(
    rows: torch.Tensor, selector: Selector, row: tuple[int, ...], heads: tuple[int, ...] | None
) -> torch.Tensor:
    found = tuple(rows.shape[1:])
    if found != row and (heads is None or found[1:] != row[1:] or max(heads) >= found[0]):
        raise InterventionError(f"the source's rows of {selector.point} are {list(found)}: expected {list(row)}.")
    return rows


def _of_heads(rows: torch.Tensor, heads: tuple[int, ...] | None) -> torch.Tensor:
    return rows if heads is None else rows[:, list(heads)]
