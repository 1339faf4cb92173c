"""What a sweep patches: for each row, the heads and positions of each pair. Pure but for tokens' texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hookmap.analysis.metrics import Bound
from hookmap.analysis.tokens import token_texts
from hookmap.capture.interventions.edits import why_not_heads
from hookmap.capture.rows import RowSelection, row_selection
from hookmap.errors import InterventionError, SelectionError
from hookmap.loading.prompts import Prompt
from hookmap.maps.selectors import Selector

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

AXES = ("layers", "heads", "positions")


class Job(NamedTuple):
    """One run of a sweep: one cell of one pair."""

    number: int
    """its place in [rows, heads, positions, pairs]"""
    pair: int
    head: int
    """0 where heads are not swept"""
    places: tuple[int, ...]
    """the positions that are patched"""


@dataclass(frozen=True)
class Cells:
    """The cells of all rows."""

    pairs: int
    heads: tuple[int, ...] | None
    """those that are patched one by one; None where they are not swept"""
    chosen: tuple[int, ...] | None
    """those that are patched together; None for all, or where they are swept"""
    lacking: tuple[frozenset[int], ...]
    """for each row, the heads of `heads` that its layer does not have"""
    positions: tuple[int, ...] | None
    """what each column is called; None where positions are not swept"""
    tokens: tuple[str, ...]
    places: tuple[tuple[tuple[int, ...], ...], ...]
    """pair -> column -> the positions that are patched"""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[rows, heads, positions, pairs]"""
        return len(self.lacking), len(self.heads or (0,)), len(self.places[0]), self.pairs

    @property
    def count(self) -> int:
        """How many runs a row takes."""
        _, heads, columns, pairs = self.shape
        return heads * columns * pairs

    def jobs(self, row: int) -> Iterator[Job]:
        """The runs of one row: those of each pair in turn, since they are equally long."""
        _, heads, columns, pairs = self.shape
        for pair in range(pairs):
            for place, head in enumerate(self.heads or (0,)):
                for column, where in enumerate(self.places[pair]):
                    if head not in self.lacking[row]:
                        yield Job(((row * heads + place) * columns + column) * pairs + pair, pair, head, where)

    @property
    def total(self) -> int:
        """How many runs the sweep takes."""
        return sum(self.count // self.shape[1] * (self.shape[1] - len(gone)) for gone in self.lacking)


def cells_of(
    hm: Hooked,
    start: Bound,
    selectors: Sequence[Selector],
    over: str | Sequence[str],
    positions: Any,
    heads: Sequence[int] | None,
) -> Cells:
    """The cells of a sweep over these selectors. `start`: of the prompts that are patched.

    Raises SelectionError and InterventionError.
    """
    swept = set(over.split(",") if isinstance(over, str) else over)
    if wrong := sorted(swept - {*AXES}):
        raise SelectionError(f"over {', '.join(map(repr, wrong))}: expected some of {', '.join(AXES)}.")
    chosen = None if heads is None else tuple(heads)
    each, lacking = _heads(hm, selectors, chosen) if "heads" in swept else (None, (frozenset[int](),) * len(selectors))
    if each is None and chosen is not None:
        _check_heads(hm, selectors, chosen)
    wanted = row_selection(positions=positions)
    matching = hm.matching(wanted)
    if "positions" not in swept:
        together = tuple(
            (tuple(_places(wanted, matching, prompt, length)),)
            for prompt, length in zip(start.prompts, start.lengths, strict=True)
        )
        _refuse_none(positions, [len(found[0]) for found in together], start.lengths)
        return Cells(len(start.prompts), each, chosen if each is None else None, lacking, None, (), together)
    prompts = [replace(p, token_ids=p.token_ids[:n]) for p, n in zip(start.prompts, start.lengths, strict=True)]
    wanted.refuse_beyond(start.lengths, 0)
    wanted.refuse_no_image([prompt.image_positions for prompt in prompts])
    places = [_places(wanted, matching, prompt, n) for prompt, n in zip(prompts, start.lengths, strict=True)]
    _refuse_none(positions, [len(found) for found in places], start.lengths)
    names = _aligned(positions, places, start.lengths)
    texts = [
        token_texts(hm, prompt.token_ids, found, prompt.image_positions)
        for prompt, found in zip(prompts, places, strict=True)
    ]
    tokens = tuple(column[0] if len(set(column)) == 1 else "*" for column in zip(*texts, strict=True))
    columns = tuple(tuple((place,) for place in found) for found in places)
    return Cells(len(start.prompts), each, chosen if each is None else None, lacking, names, tokens, columns)


def _places(wanted: RowSelection, matching: frozenset[int], prompt: Prompt, length: int) -> list[int]:
    found = wanted.places(prompt.token_ids, length, matching, prompt.image_positions)
    return found[-1:] if wanted.positions == "last" else found


def _refuse_none(positions: Any, counts: Sequence[int], lengths: Sequence[int]) -> None:
    """Raises SelectionError where a prompt has none of the positions."""
    if without := [number for number, count in enumerate(counts) if not count]:
        which = "the prompt" if len(counts) == 1 else f"prompt {without[0]} ({len(without)} of {len(counts)} have none)"
        raise SelectionError(
            f"positions {positions!r}: none of the {lengths[without[0]]} tokens of {which} is one of them."
        )


def _aligned(positions: Any, places: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[int, ...]:
    """What the columns are called: positions, or where pairs differ in length those from the end. Raises
    InterventionError where a column is not the same in each pair.
    """
    if len({tuple(found) for found in places}) == 1:
        return tuple(places[0])
    behind = {tuple(place - length for place in found) for found, length in zip(places, lengths, strict=True)}
    if len(behind) == 1:
        return behind.pop()
    if len({len(found) for found in places}) == 1 and not _by_length(positions):
        return tuple(range(len(places[0])))
    sizes = f"{min(lengths)} to {max(lengths)}"
    raise InterventionError(
        f"positions {positions!r} of pairs of {sizes} tokens: a column must mean the same in each pair. Give positions "
        "that count from the end (-1,-2 or -5:), pairs of one length, or over='heads' or over='layers', which patch "
        "all positions of a pair together."
    )


def _by_length(positions: Any) -> bool:
    """Whether the positions say what they mean by numbers alone, and not by the tokens' texts."""
    return not (isinstance(positions, str) and positions.startswith("text="))


def _heads(
    hm: Hooked, selectors: Sequence[Selector], chosen: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[frozenset[int], ...]]:
    """The heads that are swept, and which of them each row lacks. Raises InterventionError."""
    counts = []
    for selector in selectors:
        row = hm.proofs.of(selector).row
        if wrong := why_not_heads((0,) if chosen is None else chosen, selector.point, row):
            raise InterventionError(wrong)
        counts.append(row[0])
    swept = tuple(range(max(counts))) if chosen is None else chosen
    return swept, tuple(frozenset(head for head in swept if head >= count) for count in counts)


def _check_heads(hm: Hooked, selectors: Sequence[Selector], heads: tuple[int, ...]) -> None:
    """Raises InterventionError where a layer does not have these heads."""
    for selector in selectors:
        if wrong := why_not_heads(heads, selector.point, hm.proofs.of(selector).row):
            raise InterventionError(wrong)
