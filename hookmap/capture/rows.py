"""Which rows of a tensor a capture stores: of which tokens, which features, in which dtype. Pure.

Positions count within a sample: 0 is the first token of its prompt, whatever the padding of the batch. Negative ones
count from the end of the prompt, because the end of the generated text is not known in advance.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self, Unpack

import torch

from hookmap.capture.options import RowOptions, with_defaults
from hookmap.capture.overflow import OVERFLOWS
from hookmap.errors import SelectionError
from hookmap.loading.prompts import known_ids, text_of
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector
from hookmap.wording import whole_number

Wanted = Callable[[int, int], bool]
"""(position, token id) -> whether its row is stored"""

NAMED = ("all", "prompt", "generated", "last", "last_prompt", "image", "text")
_GRAMMAR = (
    'expected "all", "prompt", "generated", "last" (of the whole sample), "last_prompt", a span such as "4:20" or '
    '"-5:", positions such as "0,3,-1", "image" (tokens that stand for an image), "text" (the others), or "text=…" '
    "(tokens whose text contains it, or of the prompt that it lies in)"
)
_SPAN = re.compile(r"(-?[0-9]{1,18})?:(-?[0-9]{1,18})?(?::([0-9]{1,18}))?")
NUMBERS = ("router_indices",)
"""points whose values are indices: their dtype never changes, and a mean of them has no meaning"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def without_features(points: Iterable[str]) -> tuple[str, ...]:
    """Those of these points whose rows are no vectors of one width: indices, and rows as wide as their text."""
    names = [PointName.of(point) for point in dict.fromkeys(points)]
    return tuple(str(name) for name in names if name.base in NUMBERS or "key" in name.definition.axes)


@dataclass(frozen=True)
class RowSelection:
    """Which rows a capture stores. Made by `row_selection`."""

    positions: str | tuple[int | None, int | None, int | None] | tuple[int, ...] = "all"
    """one of NAMED, "text=…", a span (start, stop, step) if `span`, or single positions"""
    span: bool = False
    every: int = 1
    """only positions that are multiples of it; 1 where `positions` names single ones"""
    mean: bool = False
    """one row for each sample: the mean over its positions, summed in float32"""
    features: int | tuple[int, ...] | None = None
    """indices into the last axis of a row, or how many of them to draw"""
    features_seed: int = 0
    dtype: str | None = None
    """None: the model's own"""
    overflow: str = "warn"
    """what to do where a finite number is infinite in that dtype: one of OVERFLOWS"""

    @property
    def everything(self) -> bool:
        """Whether every token that the model reads has a row."""
        return self.positions == "all" and self.every == 1 and not self.mean

    @property
    def one_row(self) -> bool:
        """Whether each sample has a single row, known only when the sample ends."""
        return self.mean or self.positions == "last"

    @property
    def reads_tokens(self) -> bool:
        """Whether the selection depends on token ids."""
        return isinstance(self.positions, str) and self.positions.startswith("text=")

    @property
    def reads_images(self) -> bool:
        """Whether the selection depends on which tokens stand for an image."""
        return self.positions in ("image", "text")

    def wanted(self, prompt_tokens: int, matching: frozenset[int] = frozenset(), marked: Iterable[int] = ()) -> Wanted:
        """Which tokens of a sample are stored.

        `prompt_tokens`: of its prompt; `matching`: see `matching_tokens`; `marked`: positions that stand for an image,
        or where `matching` is a phrase those of the phrase.
        """
        chosen, every = self._chosen(prompt_tokens, matching, frozenset(marked)), self.every
        if every == 1:
            return chosen
        return lambda position, token: position % every == 0 and chosen(position, token)

    def _chosen(self, prompt: int, matching: frozenset[int], marked: frozenset[int]) -> Wanted:
        where = self.positions
        if where in ("all", "last"):
            return lambda position, token: True
        if where == "prompt":
            return lambda position, token: position < prompt
        if where == "generated":
            return lambda position, token: position >= prompt
        if where == "last_prompt":
            return lambda position, token: position == prompt - 1
        if self.reads_images:
            return lambda position, token: (position in marked) == (where == "image")
        if isinstance(matching, Phrase):
            return lambda position, token: position in marked
        if isinstance(where, str):
            return lambda position, token: token in matching
        if self.span:
            start, stop, step = where
            first = _from_end(start or 0, prompt)
            end = None if stop is None else _from_end(stop, prompt)
            return lambda p, token: p >= first and (end is None or p < end) and (p - first) % (step or 1) == 0
        single = frozenset(_place(p, prompt) for p in self.singles)
        return lambda position, token: position in single

    def places(
        self,
        token_ids: Sequence[int],
        prompt_tokens: int,
        matching: frozenset[int] = frozenset(),
        images: Iterable[int] = (),
    ) -> list[int]:
        """Positions of the tokens that are stored: single ones in the order given, others ascending."""
        marked = matching.places(token_ids[:prompt_tokens]) if isinstance(matching, Phrase) else images
        wanted = self.wanted(prompt_tokens, matching, marked)
        order: Iterable[int] = range(len(token_ids))
        if self.singles:
            order = [p for p in (_place(p, prompt_tokens) for p in self.singles) if 0 <= p < len(token_ids)]
        return [position for position in order if wanted(position, token_ids[position])]

    @property
    def singles(self) -> tuple[int, ...]:
        """Single positions, in the order given; empty where something else was given."""
        if isinstance(self.positions, str) or self.span:
            return ()
        return tuple(position for position in self.positions if position is not None)

    def lacking(self, lengths: Sequence[int], more: int) -> dict[int, int]:
        """Single position -> how many samples lack it. `lengths`: of the prompts; `more`: tokens read after them."""
        found = {p: sum(not 0 <= _place(p, n) < n + more for n in lengths) for p in self.singles}
        return {position: times for position, times in found.items() if times}

    def refuse_beyond(self, lengths: Sequence[int], more: int) -> None:
        """Raises SelectionError for a single position that no sample has; see `lacking`."""
        nowhere = [position for position, times in self.lacking(lengths, more).items() if times == len(lengths)]
        if nowhere:
            there = f"the longest prompt has {max(lengths)} tokens" + (
                f", and up to {more} more are read" if more else ""
            )
            raise SelectionError(
                f"positions {', '.join(map(str, nowhere))}: no prompt has them: {there}. "
                f"Give positions from {-max(lengths)} to {max(lengths) + more - 1}."
            )

    def refuse_no_image(self, images: Iterable[Sequence[int]]) -> None:
        """Raises SelectionError where image tokens are selected and no prompt has any. `images`: of each prompt."""
        if self.positions == "image" and not any(images):
            raise SelectionError(
                'positions "image": no prompt has an image. Give one in a message: {"type": "image", "path": FILE}.'
            )

    def settings(self) -> dict[str, Any]:
        """The selection as JSON for a manifest, without defaults."""
        found: dict[str, Any] = {}
        if self.positions != "all":
            found["positions"] = _written(self.positions, self.span)
        for name in ("every", "mean", "dtype"):
            if (value := getattr(self, name)) not in (1, False, None):
                found[name] = value
        if self.features is not None:
            found["features"] = self.features if isinstance(self.features, int) else list(self.features)
            if isinstance(self.features, int):
                found["features_seed"] = self.features_seed
        return found

    def refuse(self, selectors: Iterable[Selector]) -> None:
        """Raises SelectionError for points that this selection cannot be applied to."""
        for selector in selectors:
            point, name = selector.point, PointName.of(selector.point).base
            if selector.has_keys and (self.one_row or self.features is not None):
                raise SelectionError(f'{point} has a row for each query: no mean, "last" or features of it.')
            if name in NUMBERS and self.mean:
                raise SelectionError(f"{point} are numbers of experts: there is no mean of them.")

    def columns(self, width: int) -> list[int] | None:
        """The features stored of a row of `width`; None for all. Raises SelectionError where the row has fewer."""
        if self.features is None:
            return None
        if isinstance(self.features, int):
            if self.features > width:
                raise SelectionError(f"features={self.features}: a row here has {width}. Give {width} or fewer.")
            draw = torch.Generator().manual_seed(self.features_seed)
            return sorted(torch.randperm(width, generator=draw)[: self.features].tolist())
        if wrong := [f for f in self.features if f >= width]:
            raise SelectionError(f"features {wrong[:5]} are not in a row here: it has 0 to {width - 1}.")
        return list(self.features)


class Phrase(frozenset[int]):
    """A text of several tokens, in place of the ids of tokens that contain it. It is looked for in prompts alone."""

    def __new__(cls, text: str, tokenizer: Any) -> Self:
        made = super().__new__(cls)
        made.text, made._tokenizer, made._found = text, tokenizer, {}
        return made

    text: str
    _tokenizer: Any
    _found: dict[tuple[int, ...], frozenset[int]]

    def places(self, token_ids: Sequence[int]) -> frozenset[int]:
        """The positions of the tokens that the text lies in, wherever it stands."""
        ids = tuple(token_ids)
        if ids not in self._found:
            self._found[ids] = frozenset(self._places(ids))
        return self._found[ids]

    def _places(self, ids: tuple[int, ...]) -> Iterator[int]:
        whole = text_of(self._tokenizer, ids)
        starts = [match.start() for match in re.finditer(f"(?={re.escape(self.text)})", whole)]
        if not starts:
            return
        # Where each token ends: a text that ends within a character is as long as with all of it, or longer.
        ends = [len(text_of(self._tokenizer, ids[: count + 1])) for count in range(len(ids))]
        begin = 0
        for position, end in enumerate(ends):
            if any(begin < start + len(self.text) and start < end for start in starts):
                yield position
            begin = end


def row_selection(**given: Unpack[RowOptions]) -> RowSelection:
    """Read the options that a user gives. Raises SelectionError with every problem at once.

    `every` applies to ranges of tokens, not to tokens named one by one ("last", "last_prompt", positions).
    """
    options = with_defaults(RowOptions, given)
    every, mean, seed, overflow = (options[name] for name in ("every", "mean", "features_seed", "overflow"))
    problems: list[str] = []
    where, span = _positions(options["positions"], problems)
    if not _is_whole(every) or every < 1:
        problems.append(f"every: expected a whole number, at least 1, got {every!r}")
    if mean and where == "last":
        problems.append('mean with positions="last": a mean over one row is that row; leave one of them out')
    chosen = _features(options["features"], problems)
    if not _is_whole(seed) or not -(2**63) <= seed < 2**63:
        problems.append(f"features_seed: expected a whole number of 64 bits, got {seed!r}")
    dtype = options["keep_dtype"]
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name is not None and (not isinstance(name, str) or name not in DTYPES):
        problems.append(f"keep_dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    if overflow not in OVERFLOWS:
        problems.append(f"overflow: expected {' or '.join(OVERFLOWS)}, got {overflow!r}")
    if problems:
        raise SelectionError("\n".join(problems))
    single = where in ("last", "last_prompt") or (isinstance(where, tuple) and not span)
    return RowSelection(where, span, 1 if single else int(every), bool(mean), chosen, int(seed), name, overflow)


def matching_tokens(chosen: RowSelection, tokenizer: Any, vocabulary: int) -> frozenset[int]:
    """The token ids whose text contains that of `positions="text=…"`; a `Phrase` where no single token contains it.

    Raises SelectionError where there is no tokenizer.
    """
    if not chosen.reads_tokens:
        return frozenset()
    text = str(chosen.positions).removeprefix("text=")
    if tokenizer is None:
        raise SelectionError(f'positions="text={text}" needs a tokenizer: hookmap.open(model, tokenizer=...)')
    ids = sorted(token for token in known_ids(tokenizer) if token < vocabulary)
    found = frozenset(token for token in ids if text in text_of(tokenizer, [token]))
    return found or Phrase(text, tokenizer)


def ids_of(matching: frozenset[int]) -> list[int]:
    """The token ids, for another process. Raises SelectionError for a phrase."""
    if isinstance(matching, Phrase):
        raise SelectionError(
            f'positions="text={matching.text}": a text of several tokens is looked for in this process alone: give '
            "positions, or open the model with hookmap.open."
        )
    return sorted(matching)


def refuse_nowhere(matching: frozenset[int], prompts: Iterable[Sequence[int]]) -> None:
    """Raises SelectionError where `positions="text=…"` is a text that neither a token nor a prompt contains."""
    if isinstance(matching, Phrase) and not any(matching.places(ids) for ids in prompts):
        raise SelectionError(
            f'positions="text={matching.text}": no single token of this tokenizer contains that text, and no prompt '
            "does. Give a text that stands there, such as a word without the space before it."
        )


def _positions(given: Any, problems: list[str]) -> tuple[Any, bool]:
    if isinstance(given, str):
        text = given.strip()
        if text in NAMED:
            return text, False
        if given.lstrip().startswith("text=") and given.lstrip() != "text=":
            return given.lstrip(), False
        if match := _SPAN.fullmatch(text):
            start, stop, step = (int(part) if part else None for part in match.groups())
            if step != 0:
                return (start, stop, step), True
        try:
            given = [whole_number(part) for part in text.split(",")]
        except ValueError:
            problems.append(f"positions {text!r}: {_GRAMMAR}")
            return "all", False
    if isinstance(given, slice):
        parts = (given.start, given.stop, given.step)
        if all(p is None or _is_whole(p) for p in parts) and (given.step or 1) > 0:
            return parts, True
    elif hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, Sequence) and given and all(_is_whole(p) for p in given):
        found = tuple(int(p) for p in given)
        if twice := [p for p, times in Counter(found).items() if times > 1]:
            problems.append(f"positions: {', '.join(map(str, twice))} given more than once; name each once")
        return found, False
    problems.append(f"positions {given!r}: {_GRAMMAR}")
    return "all", False


def _features(given: Any, problems: list[str]) -> int | tuple[int, ...] | None:
    if given is None:
        return None
    if _is_whole(given) and given > 0:
        return int(given)
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, Iterable) and not isinstance(given, str):
        found = list(given)
        whole = all(_is_whole(f) and f >= 0 for f in found)
        if found and whole and len(set(found)) == len(found):
            return tuple(int(f) for f in found)
    problems.append(f"features: expected how many to draw, or different indices from 0 on, got {given!r}")
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _place(position: int, prompt: int) -> int:
    """The position counted from 0. A negative one counts from the end of the prompt, and may lie before its start."""
    return prompt + position if position < 0 else position


def _from_end(position: int, prompt: int) -> int:
    return max(0, prompt + position) if position < 0 else position


def _written(positions: Any, span: bool) -> Any:
    if span:
        start, stop, step = ("" if p is None else str(p) for p in positions)
        return f"{start}:{stop}" + (f":{step}" if step else "")
    return positions if isinstance(positions, str) else list(positions)
