"""Which cells of a forward pass an edit changes, and what an engine calls to change them.

A token is edited whenever the model is fed it. (Without a cache, every pass is fed everything again.) Padding, and
tokens that are fed after a sample has ended, are not edited.
"""

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch

from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import token_ids
from hookmap.capture.interventions.keys import fitted, on_keys
from hookmap.capture.interventions.writable import BoundaryTensor, Cells, ModuleIO, mode_of
from hookmap.capture.rows import RowSelection
from hookmap.errors import InterventionError
from hookmap.maps.points import PointName, is_place
from hookmap.maps.selectors import Selector
from hookmap.maps.terms import Term


class TokenAt(NamedTuple):
    """The token that a row is of."""

    sample: int
    """its number in the run"""
    position: int
    token: int
    """its id; -1 where no edit asks for ids"""
    step: int
    """0 for tokens of the prompt, n for the n-th new token"""


TokensAt = Sequence[TokenAt]
"""for each row, its token; those of one sample follow each other"""


class RowOperation(Protocol):
    """Computes new rows of a point."""

    def __call__(self, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
        """`rows`: [n, ...] in the model's dtype. `means`: [n, ...], of each row's prompt, if the edit asks for them."""


@runtime_checkable
class OfBatch(Protocol):
    """An operation that calls the user's own code, which may end samples and run the model itself."""

    def in_batch(self, batch: "Editor") -> RowOperation:
        """The same operation in this batch."""


@dataclass(frozen=True)
class EditedTokens:
    """The tokens that an edit writes: those that both the positions and the generation steps select."""

    positions: RowSelection = field(default_factory=RowSelection)
    steps: RowSelection | None = None
    """generation steps, 0 for the prompt and n for the n-th new token, written as positions; None for all"""
    matching: frozenset[int] = frozenset()
    """the token ids that `positions="text=…"` selects"""

    def in_steps(self, position: int, prompt_tokens: int) -> bool:
        """Whether the steps select the token at this position."""
        return self.steps is None or self.steps.wanted(0)(step_of(position, prompt_tokens), -1)

    def select(self, position: int, token: int, prompt_tokens: int, marked: frozenset[int] = frozenset()) -> bool:
        """Whether this token is written. `marked`: see `RowSelection.wanted`."""
        chosen = self.positions.wanted(prompt_tokens, self.matching, marked)(position, token)
        return chosen and self.in_steps(position, prompt_tokens)


def step_of(position: int, prompt_tokens: int) -> int:
    """The generation step of a token: 0 for those of the prompt, n for the n-th new one."""
    return max(0, position - prompt_tokens + 1)


@dataclass(frozen=True)
class Edit:
    """One operation on one point of one layer."""

    selector: Selector
    operation: RowOperation
    tokens: EditedTokens = field(default_factory=EditedTokens)
    heads: tuple[int, ...] | None = None
    """None for all"""
    only: Container[tuple[int, int]] | None = None
    """(sample, position) pairs that are written, in place of `tokens.positions`"""
    means: bool = False
    """whether the operation reads the mean over each prompt"""
    tokens_told: bool = False
    """whether the operation reads token ids"""
    last: bool = False
    """whether it comes after the other edits of its place: it keeps what they wrote"""

    @property
    def target(self) -> BoundaryTensor:
        return BoundaryTensor(self.selector.write or self.selector.terms[0], mode_of(self.selector))


class Editor:
    """Applies edits during one batch. An engine calls `begin_pass`, and `write` at each of the `boundaries`."""

    def __init__(
        self,
        edits: Sequence[Edit],
        observer: Observer,
        before: Observer | None = None,
        watching: Callable[["Editor"], Observer] | None = None,
    ) -> None:
        """`observer`: of the same batch; it knows which tokens are in which columns. `before`: sees the old values.

        `watching`: makes the observer that shows rows to functions, after all that is written there.
        """
        self.before = before
        self._observer = observer
        self._stopped: set[int] = set()
        self.watching = None if watching is None else watching(self)
        edits = [
            replace(edit, operation=edit.operation.in_batch(self)) if isinstance(edit.operation, OfBatch) else edit
            for edit in edits
        ]
        # At one boundary the stream is written first, because a branch reads it.
        self._edits = sorted(enumerate(edits), key=lambda e: (e[1].selector.forward_index, e[1].last))
        self._targets: dict[tuple[str, str, str], list[tuple[int, Edit]]] = {}
        for number, edit in self._edits:
            target = edit.target
            self._targets.setdefault((target.term.at, target.term.side, target.mode), []).append((number, edit))
        readers = [each for each in (observer, self.watching) if each is not None and each.reads_logits]
        for each in (observer, *self.observers):
            each.every_logit |= len(readers) > 1 or any(
                edit.selector.is_logits or is_place(edit.selector.point) for edit in edits
            )
        self._means: dict[tuple[int, int], torch.Tensor] = {}
        self._tokens: list[list[int]] | None = None
        """ids of the tokens that the running pass is fed, if an edit selects by them"""
        self._cells: dict[Any, tuple[Cells, list[TokenAt]]] = {}
        self._calls: dict[tuple[str, str, str], int] = {}
        self._written: set[int] = set()
        """edits that wrote in an earlier pass"""
        self._begun = False
        self.counts = any(edit.selector.call is not None for edit in edits)
        """whether a layer that is written runs several times: a pass is watched to its end then"""

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Those besides the run's own."""
        return tuple(each for each in (self.before, self.watching) if each is not None)

    def stop(self, sample: int) -> None:
        """The sample ends with the token that the running pass makes. Raises InterventionError in a harvest."""
        if self._observer.layout.right:
            raise InterventionError("at.stop() ends a sample that generates, and max_new_tokens=0 generates nothing.")
        self._stopped.add(sample)

    def stopped(self, row: int) -> bool:
        """Whether a function has ended the sample in this row of the batch."""
        return self._observer.layout.samples[row] in self._stopped

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the model may run for the user's own code on this thread."""
        with contextlib.ExitStack() as stack:
            for each in (self._observer, *self.observers):
                stack.enter_context(each.aside())
            yield

    @property
    def boundaries(self) -> tuple[tuple[str, Literal["input", "output"]], ...]:
        """The (path, side) pairs that are written: of modules, and of the `operations` in them."""
        terms = (edit.target.term for _, edit in self._edits)
        return tuple(dict.fromkeys((term.at, term.side) for term in terms))

    @property
    def operations(self) -> dict[str, Term]:
        """As an observer's."""
        terms = (edit.target.term for _, edit in self._edits)
        return {term.at: term for term in terms if term.operation is not None}

    def writes(self, module: str, side: str, mode: str) -> bool:
        """Whether an edit writes at this boundary in this mode."""
        return (module, side, mode) in self._targets

    def begin_pass(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The model is called with these arguments; the observer knows it already."""
        self.finish()
        self._cells.clear()
        self._calls.clear()
        self._begun = True
        reads = any(edit.tokens_told or edit.tokens.positions.reads_tokens for _, edit in self._edits)
        self._tokens = token_ids(args, kwargs, len(self._observer.columns)) if reads else None

    def finish(self) -> None:
        """The forward pass is over. Raises InterventionError where it did not reach a boundary that is written."""
        if self._begun and (missed := [target for target in self._targets if target not in self._calls]):
            names = ", ".join(f"{module or 'model'}.{side}" for module, side, _ in missed)
            raise InterventionError(
                f"a forward pass did not reach {names}, which was to be written: the model skipped these modules."
            )
        for target, edits in self._targets.items() if self._begun else ():
            for term in (edit.target.term for _, edit in edits):
                seen = self._calls[target] + 1
                if seen <= (term.call or 0) or term.calls not in (None, seen):
                    raise InterventionError(
                        f"{term} was called {seen} times in a forward pass, and "
                        f"{'more' if term.calls is None else term.calls} were expected: this layer does not run as "
                        "often for every text. Write to layers that do."
                    )

    def write(self, module: str, side: str, mode: str, given: ModuleIO) -> ModuleIO:
        """What the module passes on at this boundary. Raises InterventionError."""
        target = (module, side, mode)
        call = self._calls[target] = self._calls.get(target, -1) + 1
        for number, edit in self._targets[target]:
            if call and edit.target.term.call is None:
                raise InterventionError(f"{edit.selector}: {module} was called more than once in one forward pass.")
            if edit.target.term.call in (None, call):
                given = self._write(number, edit, given)
        return given

    def _write(self, number: int, edit: Edit, given: ModuleIO) -> ModuleIO:
        own, where = self._chosen(edit)
        cells, shape = self._placed(own), self._shape()
        means = self._means_of(number, edit.target, given, own[0]) if edit.means else None
        if number in self._written:
            self._refuse_old_tokens(edit, given, shape)
        if not where:
            return given

        def change(rows: torch.Tensor) -> torch.Tensor:
            if edit.selector.has_keys:
                pads = [self._observer.layout.pads(row) for row in own[0]]
                end = self._observer.columns.stop
                changed = on_keys(rows, pads, end, lambda aligned: _on_heads(edit, aligned, where, means))
            else:
                changed = _on_heads(edit, rows, where, means)
            if rows.dtype == torch.float16 and bool(rows.isfinite().all() & ~changed.isfinite().all()):
                raise InterventionError(
                    f"{edit.selector}: what is written is too large for torch.float16, which goes up to 65504. "
                    "Give smaller numbers, or open the model in bfloat16 or float32."
                )
            return changed

        self._written.add(number)
        return edit.target.write(given, shape, cells, change, str(edit.selector))

    def _shape(self) -> tuple[int, int]:
        """Rows and columns of the tensors of the running pass."""
        return len(self._observer.layout.samples), len(self._observer.columns)

    def _placed(self, cells: Cells) -> Cells:
        """Cells of this layout, as those tensors have them."""
        return cells

    def _refuse_old_tokens(self, edit: Edit, given: ModuleIO, shape: tuple[int, int]) -> None:
        """Raises InterventionError where the tensor also holds tokens of earlier passes, out of a cache."""
        term, fed = edit.target.term, self._observer.columns.stop
        if term.rows != "last" or term.flat or fed == shape[1]:
            return
        if replace(term, rows="all").arrange(term.resolve(*given), *shape).shape[1] == fed:
            raise InterventionError(
                f"{edit.selector}: it holds the tokens of earlier passes too, out of the cache, and what was written "
                "to those is not in it. Write what comes before the cache, or generate with use_cache=False."
            )

    def _chosen(self, edit: Edit) -> tuple[Cells, list[TokenAt]]:
        """The cells of this pass that the edit writes, and the token of each."""
        key = (edit.tokens, None if edit.only is None else id(edit.only))
        if key not in self._cells:
            rows, columns, where = [], [], []
            for row, sample in enumerate(self._observer.layout.samples):
                length = self._observer.layout.lengths[row]
                for column, position in self._positions_of(row):
                    token = -1 if self._tokens is None else self._tokens[row][column]
                    if self._selects(edit, row, position, token):
                        rows.append(row)
                        columns.append(column)
                        where.append(TokenAt(sample, position, token, step_of(position, length)))
            self._cells[key] = (rows, columns), where
        return self._cells[key]

    def _selects(self, edit: Edit, row: int, position: int, token: int) -> bool:
        sample, length = self._observer.layout.samples[row], self._observer.layout.lengths[row]
        if edit.only is not None:
            return edit.tokens.in_steps(position, length) and (sample, position) in edit.only
        marked = self._observer.layout.marked(row, edit.tokens.matching)
        return edit.tokens.select(position, token, length, marked)

    def _positions_of(self, row: int) -> list[tuple[int, int]]:
        """The (column of the pass, position) of each token of a row; padding has none."""
        layout, count = self._observer.layout, self._observer.generated[row]
        length, pads = layout.lengths[row], layout.pads(row)
        # The last generated token is fed only where the others of the batch go on.
        end = length if layout.right else float("inf") if count is None else length + max(0, count - 1)
        found = ((column, absolute - pads) for column, absolute in enumerate(self._observer.columns))
        return [(column, position) for column, position in found if 0 <= position < end]

    def _means_of(self, number: int, target: BoundaryTensor, given: ModuleIO, rows: list[int]) -> torch.Tensor | None:
        """The mean over the prompt of each of these rows, computed in the pass that is fed the prompt."""
        begins = self._observer.columns.start == 0
        for row in range(len(self._observer.layout.samples)) if begins else sorted(set(rows)):
            if not begins and (number, row) in self._means:
                continue
            length = self._observer.layout.lengths[row]
            prompt = [column for column, position in self._positions_of(row) if position < length]
            if len(prompt) != length:
                raise InterventionError(
                    "the mean over a prompt is asked for, and the model is fed the prompt in pieces: "
                    "generate without prefill_chunk_size, or give the mean as a vector."
                )
            cells = self._placed(([row] * len(prompt), prompt))
            self._means[number, row] = target.read(given, self._shape(), cells).float().mean(0)
        return torch.stack([self._means[number, row] for row in rows]) if rows else None


def _on_heads(edit: Edit, rows: torch.Tensor, where: TokensAt, means: torch.Tensor | None) -> torch.Tensor:
    chosen = slice(None) if edit.heads is None else list(edit.heads)
    new = edit.operation(rows[:, chosen], where, None if means is None else means[:, chosen])
    if edit.selector.has_keys:
        new = fitted(new, rows.shape[-1], str(edit.selector))
    if edit.heads is None:
        return new
    changed = rows.clone()
    changed[:, chosen] = new.to(rows.dtype)
    return changed


def why_not_heads(heads: tuple[int, ...], point: str, row: tuple[int, ...] = ()) -> str | None:
    """Why these heads cannot be chosen of a point with such rows, where they are known; None where they can."""
    if "heads" not in PointName.of(point).definition.axes and not (is_place(point) and len(row) > 1):
        return f"heads {list(heads)}: {point} has no heads."
    if not heads:
        return "no heads given: name at least one, or leave heads out."
    if len(set(heads)) < len(heads):
        return f"heads {list(heads)}: name each head once."
    if row and (wrong := [head for head in heads if not 0 <= head < row[0]]):
        return f"heads {wrong} are not there: {point} has 0 to {row[0] - 1}."
    return None
