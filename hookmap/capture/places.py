"""Which axes a tensor has that is named by its place in the model: read off a few forward passes of different sizes."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from hookmap.capture.engines.hooks import HooksEngine
from hookmap.capture.run import device_of, running, vocabulary_of
from hookmap.errors import CaptureError, HookmapError, SelectionError
from hookmap.loading.encoder_decoder import with_source
from hookmap.maps.points import is_place
from hookmap.maps.selectors import Selector
from hookmap.maps.terms import PlaceError, Term
from hookmap.wording import did_you_mean, sentence

_SIZES = ((2, 5), (3, 5), (2, 7), (1, 5))
"""rows and tokens of the passes; the last reads the second row of the first alone"""
_CLOSE = 0.05
"""relative distance that a row may have from the same row computed alone: another order of the rows gives about 1"""
_Place = tuple[str, str, int | str | None, int | None]


@dataclass(frozen=True)
class _Axes:
    """How a tensor lies."""

    flat: bool
    axes: tuple[str, ...] | None
    width: int
    """numbers in one row, or for each key of it"""


class _Unclear(Exception):
    """Why a tensor cannot be captured."""


class Places:
    """The axes of tensors of one opened model, each measured when it is first asked for."""

    def __init__(self, engine: HooksEngine) -> None:
        self._engine = engine
        self._found: dict[_Place, _Axes | str] = {}
        self._lock = threading.Lock()

    def measured(self, selectors: Sequence[Selector]) -> tuple[Selector, ...]:
        """The same, where those that are named by their place know their axes.

        Raises SelectionError with each place that is not in the model, or whose tensor is not of tokens.
        """
        asked = {_place(term): term for s in selectors if is_place(s.point) for term in s.terms}
        with self._lock:
            if new := {place: term for place, term in asked.items() if place not in self._found}:
                self._found |= self._measure(new)
        problems = [f"{place[0]}: {said}" for place in asked if isinstance(said := self._found[place], str)]
        if problems:
            raise SelectionError("\n".join(dict.fromkeys(problems)))
        return tuple(self._known(each) if is_place(each.point) else each for each in selectors)

    def _known(self, selector: Selector) -> Selector:
        (term,) = selector.terms
        found = self._found[_place(term)]
        assert isinstance(found, _Axes)
        # While generating, a tensor of all keys so far ends with the tokens that are fed.
        term = replace(term, flat=found.flat, axes=found.axes, rows="last")
        return replace(selector, terms=(term,), width=found.width)

    def _measure(self, asked: Mapping[_Place, Term]) -> Mapping[_Place, _Axes | str]:
        found: dict[_Place, _Axes | str] = {}
        found |= {place: said for place, term in asked.items() if (said := self._missing(term)) is not None}
        there = {place: term for place, term in asked.items() if place not in found}
        try:
            seen = self._seen(there)
        except HookmapError as error:
            if len(there) > 1:  # which of them it is: each alone
                return found | {p: made for p, term in there.items() for made in self._measure({p: term}).values()}
            said = error.seen if isinstance(error, PlaceError) else str(error)  # no map named this place
            return found | dict.fromkeys(there, said)
        for place, term in there.items():
            try:
                found[place] = _axes_of(term, [tensors[place] for tensors in seen])
            except _Unclear as reason:
                found[place] = str(reason)
            except KeyError:
                found[place] = "it was not reached in a forward pass on tokens alone"
        return found

    def _missing(self, term: Term) -> str | None:
        try:
            self._engine.module.get_submodule(term.module)
        except AttributeError:
            paths = [path for path, _ in self._engine.module.named_modules() if path]
            near = did_you_mean(term.module, paths, n=2)
            return f"{type(self._engine.root).__name__} has no module {term.module!r}.{sentence(near)}"
        return None

    def _seen(self, asked: Mapping[_Place, Term]) -> list[dict[_Place, torch.Tensor]]:
        """Of each pass, the tensor at each place."""
        ids = torch.randint(vocabulary_of(self._engine), (3, 7), generator=torch.Generator().manual_seed(0))
        ids = ids.to(device_of(self._engine))
        passes = []
        with running(self._engine, pattern=any(term.operation for term in asked.values())):
            for rows, tokens in _SIZES:
                given = ids[1:2, :tokens] if rows == 1 else ids[:rows, :tokens]
                inputs: dict[str, Any] = {"input_ids": given, "attention_mask": torch.ones_like(given)}
                inputs = with_source(self._engine.root, {**inputs, "use_cache": False})
                found = self._engine.tensors([*asked.values()], inputs)
                passes.append({_place(term): tensor for term, tensor in found.items()})
        return passes


def _place(term: Term) -> _Place:
    return term.at, term.side, term.index, term.call


def _axes_of(term: Term, seen: Sequence[torch.Tensor]) -> _Axes:
    shapes = [tuple(tensor.shape) for tensor in seen[:3]]
    if len({len(shape) for shape in shapes}) > 1:
        raise _Unclear(f"its number of axes depends on the tokens: {shapes}")
    axes, sizes = zip(*map(_axis, *shapes), strict=True) if shapes[0] else ((), ())
    names = list(_named(axes, shapes[0]))
    flat = "batch*pos" in names
    if not flat and not ("batch" in "*".join(names).split("*") and "pos" in names):
        raise _Unclear(
            f"its shape is {list(shapes[0])} for 2 texts of 5 tokens: it has no axis of the texts and one of their "
            "tokens, so it has no row for each token"
        )
    usual = flat or (names[:2] == ["batch", "pos"] and not any("*" in name or name == "key" for name in names))
    found = _Axes(flat, None if usual else tuple(names), prod(sizes))
    arranged = replace(term, flat=flat, axes=found.axes)
    beside, alone = arranged.arrange(seen[0], 2, 5)[1], arranged.arrange(seen[3], 1, 5)[0]
    if beside.shape != alone.shape or not _close(beside, alone):
        raise _Unclear("a text's rows are not those that it has alone: how they lie in the batch cannot be told")
    return found


def _axis(first: int, more_texts: int, longer: int) -> tuple[tuple[int, int], int]:
    """How an axis grows with texts and tokens (0 or 1 each), and its size for one of each."""
    for texts in (0, 1):
        for tokens in (0, 1):
            size, rest = divmod(first, 2**texts * 5**tokens)
            if not rest and (more_texts, longer) == (size * 3**texts * 5**tokens, size * 2**texts * 7**tokens):
                return (texts, tokens), size
    raise _Unclear(f"an axis of it has {first}, {more_texts} and {longer} numbers for 2 x 5, 3 x 5 and 2 x 7 tokens")


def _named(axes: Sequence[tuple[int, int]], shape: Sequence[int]) -> Iterator[str]:
    """Names of the axes. Of two axes of tokens the second is that of the keys."""
    whole = iter(("pos", "key"))
    for number, (kind, size) in enumerate(zip(axes, shape, strict=True)):
        if kind == (0, 0):
            yield f"axis_{number}"
        elif kind == (0, 1) and size == 5:
            name = next(whole, None)
            if name is None:
                raise _Unclear("it has more than two axes of tokens")
            yield name
        elif kind == (1, 0):
            yield "batch" if size == 2 else f"batch*axis_{number}"
        elif kind == (1, 1) and size == 10:
            yield "batch*pos"
        else:
            raise _Unclear(f"an axis of it holds several numbers for each token: {list(shape)} for 2 texts of 5 tokens")


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    a, b = (torch.nan_to_num(each.double(), neginf=0.0, posinf=0.0) for each in (found, expected))
    a, b = (each.where(each.abs() < 1e30, 0.0) for each in (a, b))  # what masks put there
    return float((a - b).norm()) <= _CLOSE * float(b.norm()) + 1e-12


def check_engine(name: str, selectors: Sequence[Selector]) -> None:
    """Raises CaptureError where the engine does not see what these name."""
    if name in ("hooks", "nnsight"):
        return
    if operations := sorted({str(term) for s in selectors for term in s.terms if term.is_inside}):
        raise CaptureError(
            f"the {name} engine sees modules and not the operations in them: {', '.join(operations[:3])}. "
            'Open the model here, with engine="hooks".'
        )
