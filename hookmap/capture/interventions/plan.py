"""Checks interventions against a model, its map and the prompts, and makes the edits that an engine applies."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hookmap.capture.interventions import operations
from hookmap.capture.interventions.documents import (
    Ablate,
    Clamp,
    Function,
    Intervention,
    LowRank,
    Noise,
    Patch,
    ProjectOut,
    Replace,
    Scale,
    Skip,
    Source,
    Steer,
    Swap,
    fingerprint,
)
from hookmap.capture.interventions.edits import Edit, EditedTokens, RowOperation, why_not_heads
from hookmap.capture.interventions.functions import Called
from hookmap.capture.interventions.keys import why_not_on_keys
from hookmap.capture.interventions.pairs import pairs, swapped
from hookmap.capture.interventions.sources import Editable, Sources, key_in_source, rows_of_heads
from hookmap.capture.interventions.vectors import low_rank, read_rows, row_vector, unit_vector
from hookmap.capture.interventions.watching import Watch
from hookmap.capture.options import EngineName
from hookmap.capture.rows import RowSelection, refuse_nowhere, row_selection
from hookmap.errors import HookmapError, InterventionError, SelectionError
from hookmap.loading.chat_template import Templating
from hookmap.loading.prompts import Prompt
from hookmap.maps.describe import layers_text
from hookmap.maps.points import parse_point
from hookmap.maps.selectors import Selector
from hookmap.wording import counted


@dataclass(frozen=True)
class EditPlan:
    """What a run writes, and shows to functions."""

    edits: tuple[Edit, ...]
    settings: list[dict[str, Any]]
    """the interventions, as the manifest records them"""
    watches: tuple[Watch, ...] = ()

    def then(self, other: "EditPlan") -> "EditPlan":
        """This one and then the other."""
        return EditPlan((*self.edits, *other.edits), [*self.settings, *other.settings], (*self.watches, *other.watches))


def plan_edits(
    hm: "Editable",
    interventions: Sequence[Intervention],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    how: Templating,
    engine: EngineName = "hooks",
) -> EditPlan:
    """The edits of these interventions on these prompts. `how`: whether prompts go through the chat template.

    `engine`: of the run, and of those that its sources are read in.

    Raises one error with all problems: SelectionError where points, layers or positions are among them, else
    InterventionError.
    """
    planner = _Planner(hm, prompts, max_new_tokens, Sources(hm, how, engine))
    edits: list[Edit] = []
    watches: list[Watch] = []
    for number, intervention in enumerate(interventions):
        planner.name = f"intervention {number} ({intervention.do} {intervention.point})"
        if isinstance(intervention, Function) and intervention.do == "watch":
            watches += planner.watches(intervention)
        else:
            edits += planner.edits(intervention)
    planner.raise_problems()
    return EditPlan(tuple(edits), fingerprint(interventions), tuple(watches))


@dataclass
class _Planner:
    hm: "Editable"
    prompts: Sequence[Prompt]
    """empty where they are not known yet"""
    max_new_tokens: int
    sources: Sources
    name: str = ""
    """of the intervention at hand"""
    problems: list[str] = field(default_factory=list)
    unselected: bool = False
    """whether a problem is that something is not there to be selected"""

    def edits(self, given: Intervention) -> list[Edit]:
        """The edits of one intervention, one for each of its layers; none where there is a problem."""
        before = len(self.problems)
        selectors = self._selectors(given)
        tokens = self._tokens(given)
        rows = self._rows(given, selectors)
        if len(self.problems) > before:
            return []
        made: list[Edit] = []
        skips_block = isinstance(given, Skip) and given.what == "block"
        for selector, row in zip(selectors, rows, strict=True):
            with _Problems(self):
                made += self._skips(selector, tokens) if skips_block else [self._edit(given, selector, row, tokens)]
        return made

    def watches(self, given: Function) -> list[Watch]:
        """The watches of one intervention, one for each of its layers; none where there is a problem."""
        selectors, tokens = self._selectors(given), self._tokens(given)
        if given.heads is not None and selectors and (wrong := why_not_heads(given.heads, selectors[0].point)):
            self.note(wrong)
        return [Watch(Called(given, selector), tokens, given.heads) for selector in selectors]

    def _skips(self, selector: Selector, tokens: EditedTokens) -> list[Edit]:
        """The edits that leave a block out: its end gets the rows that entered it."""
        assert selector.layer is not None  # resid_post is a point of a layer
        [start] = self.hm.selectors(["resid_pre"], [selector.layer], [selector.call or 0])
        if (reason := self.hm.proofs.of(start).reason) is not None:
            raise InterventionError(f"resid_pre, which it is to end with, is not kept: {reason}.")
        entering = operations.Entering()
        return [Edit(start, entering, tokens, last=True), Edit(selector, operations.AsEntered(entering), tokens)]

    def _edit(self, given: Intervention, selector: Selector, row: tuple[int, ...], tokens: EditedTokens) -> Edit:
        operation = self._operation(given, selector, row, tokens)
        operations.check_range(operation, self.hm.proofs.of(selector).dtype)
        # A patch writes the tokens that were paired: a generated token may match `text=` too.
        only = operation if isinstance(operation, operations.Patched | operations.Swapped) else None
        means, told = isinstance(operation, operations.Averaged), isinstance(operation, Called)
        return Edit(selector, operation, tokens, given.heads, only, means, told)

    def raise_problems(self) -> None:
        """Raises one error with all problems, if there are any."""
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
            return self.hm.selectors([given.point], given.layers, given.calls)
        except SelectionError as error:
            parsed = parse_point(given.point)
            near = []
            if isinstance(parsed, str):
                near = difflib.get_close_matches(given.point, self.hm.map.points, n=2)
            hint = f" (this model has {', '.join(near)})" if near else ""
            self.note(str(error).partition("\nSee what there is")[0] + hint, unselected=True)
            return ()

    def _tokens(self, given: Intervention) -> EditedTokens:
        positions, steps = self._positions(given.positions), self._steps(given.steps)
        found = EditedTokens(positions, steps, self._matching(positions))
        self._check_reach(found)
        return found

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

    def _check_reach(self, tokens: EditedTokens) -> None:
        """Notes single positions and steps that no prompt reaches: nothing would be written there."""
        if not self.prompts:  # they are not known yet
            return
        try:
            tokens.positions.refuse_beyond([len(prompt.token_ids) for prompt in self.prompts], self._more)
            tokens.positions.refuse_no_image(prompt.image_positions for prompt in self.prompts)
            refuse_nowhere(tokens.matching, (prompt.token_ids for prompt in self.prompts))
        except SelectionError as error:
            self.note(str(error), unselected=True)
        if tokens.steps is not None and (never := [step for step in tokens.steps.singles if step > self._more]):
            self.note(
                f"steps {', '.join(map(str, never))}: the last is {self._more} with max_new_tokens="
                f"{self.max_new_tokens}, as the last new token is not read.",
                unselected=True,
            )

    @property
    def _more(self) -> int:
        """How many generated tokens the model reads, at most."""
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
        """The shape of a row of the chosen heads in each layer. Notes layers in which the point must not be written."""
        refused: dict[str, list[int]] = {}
        rows = []
        for selector in selectors:
            proof = self.hm.proofs.of(selector)
            if proof.reason is not None:
                refused.setdefault(proof.reason, []).append(-1 if selector.layer is None else selector.layer)
            rows.append(proof.row if given.heads is None else (len(given.heads), *proof.row[1:]))
            wrong = None if given.heads is None else why_not_heads(given.heads, selector.point, proof.row)
            wrong = (selector.has_keys and why_not_on_keys(given)) or wrong
            if wrong and proof.reason is None:
                self.note(wrong)
        for reason, layers in refused.items():
            where = "" if layers == [-1] else f" of {layers_text(layers)}"
            self.note(f"{selectors[0].point}{where} is not written: {reason}.")
        return rows

    def _operation(
        self, given: Intervention, selector: Selector, row: tuple[int, ...], tokens: EditedTokens
    ) -> RowOperation:
        """`row`: the shape of a row of the chosen heads."""
        if isinstance(given, Steer):
            return operations.Steered(row_vector(given.vector, row), given.strength, given.keep_norm)
        if isinstance(given, ProjectOut):
            return operations.ProjectedOut(unit_vector(given.direction, row))
        if isinstance(given, Scale):
            return operations.Scaled(given.factor)
        if isinstance(given, Clamp):
            return _clamped(given, row)
        if isinstance(given, Function):
            return Called(given, selector)
        if isinstance(given, Noise):
            return operations.Noised(given.std, f"{given.seed}:{selector.key}")
        if isinstance(given, Skip):
            return operations.Filled(None)
        if isinstance(given, LowRank):
            return operations.Mapped(*low_rank(given.down, given.up, row), given.strength)
        if isinstance(given, Swap):
            return operations.Swapped(swapped(self.prompts, tokens))
        if isinstance(given, Patch | Replace):
            if isinstance(given, Replace):
                rows = read_rows(given.tensor, row)
            else:
                rows = self._source_rows(given, given.source, tokens.positions, selector, row)
            return operations.Patched(rows, pairs(self.prompts, tokens, len(rows), self._more))
        return self._ablation(given, selector, row)

    def _ablation(self, given: Ablate, selector: Selector, row: tuple[int, ...]) -> RowOperation:
        if given.vector is not None:
            return operations.Filled(row_vector(given.vector, row))
        if given.source is None:
            return operations.Filled(None) if given.to == "zero" else operations.Averaged()
        rows = self._source_rows(given, given.source, row_selection(), selector, row)
        if given.to == "resample":
            return operations.Resampled(rows, given.seed)
        return operations.Filled(rows.float().mean(0))

    def _source_rows(
        self, given: Intervention, source: Source, default: RowSelection, selector: Selector, row: tuple[int, ...]
    ) -> torch.Tensor:
        """Rows of the source at its own positions, or at the `default` ones."""
        positions = default if source.positions is None else self._positions(source.positions)
        key = key_in_source(self.hm.map, selector, given.calls, source.calls)
        rows = self.sources.read(source, key, positions, self._matching(positions))
        return rows_of_heads(rows, selector, row, given.heads)


def _clamped(given: Clamp, row: tuple[int, ...]) -> operations.Clamped:
    least, most = (given.min, given.max) if given.value is None else (given.value, given.value)
    if given.feature is not None and given.feature >= row[-1]:
        raise InterventionError(f"feature {given.feature} is not there: a row has 0 to {row[-1] - 1}.")
    direction = None if given.direction is None else unit_vector(given.direction, row)
    return operations.Clamped(given.feature, direction, least, most)


class _Problems:
    """Notes an error of hookmap's, raised inside, as a problem of the intervention at hand."""

    def __init__(self, planner: _Planner) -> None:
        self._planner = planner

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if isinstance(error, HookmapError):
            self._planner.note(str(error))
            return True
        return False
