"""Hooks on vLLM's modules that also work in compiled code: each calls a custom operator, which calls back into Python.

vLLM compiles a model after it has loaded it, and hooks that are added later never run. So the hooks of a compiled model
are there before. Each boundary, one side of one module, is a single operator: it writes what requests edit there, and
then reads what they capture. Two requests never share a row, so that one pass serves all of them.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, Protocol

import torch
from torch import nn

from hookmap.activations import Key
from hookmap.capture.interventions.writable import ModuleIO, passed_on
from hookmap.errors import CaptureError
from hookmap.maps.terms import Term
from hookmap.vllm.places import ModelPlaces

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One term of a point, and which of its boundary's tensors holds it."""

    term: Term
    """as if the tensor were a module's output"""
    tensor: int

    def rows(self, tensors: Tensors, rows: torch.Tensor | slice) -> torch.Tensor:
        """These rows, [n, ...], split into heads where the term is; unscaled. Raises CaptureError.

        A copy, but for a slice, of which it is a view: what the model does next may write there.
        """
        whole = self._of(tensors)
        found: torch.Tensor = self.term.view(whole[rows] if isinstance(rows, slice) else whole.index_select(0, rows))
        return found

    def put(self, tensors: Tensors, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Write these rows in place; `values`: as `rows` gives them."""
        tensor, heads = self._of(tensors), self.term.heads
        if heads is None:
            tensor[rows] = values.reshape(len(rows), *tensor.shape[1:])
            return
        pitch = tensor.shape[-1] // heads.groups
        grouped = tensor.view(*tensor.shape[:-1], heads.groups, pitch)[..., heads.start : heads.stop]
        grouped[rows] = values.reshape(len(rows), *grouped.shape[1:])

    def _of(self, tensors: Tensors) -> torch.Tensor:
        """[tokens, ...]; transformers' modules inside vLLM have an axis of one before it."""
        tensor = tensors[self.tensor]
        return tensor if self.term.flat else tensor[0]


@dataclass(frozen=True, eq=False)  # it is a key in each step
class Read:
    """A point that is read here, or some of its terms."""

    key: Key
    parts: tuple[Part, ...]
    numbers: tuple[int, ...] | None = None
    """which of the point's terms they are; None: all"""


@dataclass(frozen=True)
class Write:
    """A point that is written here."""

    key: Key
    parts: tuple[Part, ...]
    """the first is given the value, the others zeros"""


@dataclass
class Boundary:
    """One side of one module, and all that may be read and written there."""

    module: str
    side: str
    terms: list[Term] = field(default_factory=list)
    """one for each tensor, which is where its `index` says"""
    reads: list[Read] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    """in the order in which the model computes them"""
    replaced: set[int] = field(default_factory=set)
    """tensors in whose place others are passed on, where something is written; others are written where they are"""

    def count(self, tensors: Tensors) -> int:
        """Rows of the first tensor."""
        return tensors[0].shape[0 if self.terms[0].flat else 1]

    def part(self, term: Term) -> Part:
        """The term with the number of its tensor, which is added where it is new."""
        bare = next((n for n, known in enumerate(self.terms) if known.index == term.index), len(self.terms))
        if bare == len(self.terms):
            self.terms.append(term)
        return Part(replace(term, side="output", index=None), bare)


class Handler(Protocol):
    """What the model's boundaries are shown to."""

    def writes(self, boundary: Boundary) -> bool:
        """Whether `at` may write there in the running step."""

    def at(self, boundary: Boundary, tensors: Tensors) -> None:
        """The model passes a boundary: write into the tensors, then read them."""


_AWAKE: dict[int, Callable[[Tensors], None]] = {}
"""number of a boundary where the running step reads or writes -> what runs when the model passes it"""
_NUMBERS = count()


def _handle(tensors: Tensors, sink: torch.Tensor) -> None:
    """The model passes the boundary whose number the sink holds. Where no request asks for anything, that is all."""
    if _AWAKE and (handler := _AWAKE.get(int(sink))) is not None:
        handler(tensors)


# Defined by hand, since torch.library.custom_op wraps each call in some ten microseconds of Python.
_OPERATORS: Any = torch.library.Library("hookmap", "DEF")  # type: ignore[no-untyped-call]
_OPERATORS.define("write_and_read(Tensor(a!)[] tensors, Tensor(b!) sink) -> ()")
_OPERATORS.define("read(Tensor[] tensors, Tensor(a!) sink) -> ()")  # the sink keeps the compiler from dropping it
for _name in ("write_and_read", "read"):
    _OPERATORS.impl(_name, _handle, "CompositeExplicitAutograd")
    _OPERATORS._register_fake(_name, lambda tensors, sink: None)
write_and_read, read = torch.ops.hookmap.write_and_read.default, torch.ops.hookmap.read.default


class Taps:
    """The boundaries of one model, and the hooks on those that are asked for."""

    handler: Handler
    """is set before the model runs"""

    def __init__(self, model: nn.Module, found: ModelPlaces, compiled: bool) -> None:
        """`compiled`: whether vLLM will compile the model."""
        self._model, self.compiled = model, compiled
        self.boundaries: dict[tuple[str, str], Boundary] = {}
        self.terms = {key: len(place.terms) for key, place in found.places.items()}
        """how many terms each point is the sum of"""
        self.written = {key for key, place in found.places.items() if place.why_not_written is None}
        self.tapped: set[Key] = set()
        """points that can be captured and written now"""
        self._of: dict[Key, set[tuple[str, str]]] = {}
        self._hooked: dict[tuple[str, str], int] = {}
        """boundaries with hooks, and their numbers"""
        self._handlers: dict[Hashable, dict[int, Callable[[Tensors], None]]] = {}
        self._awake: Iterable[int] = ()
        order = {s.key: s.forward_index for s in found.map.selectors(found.map.points)}
        for key, place in sorted(found.places.items(), key=lambda item: order.get(item[0], 0)):
            there: dict[tuple[str, str], list[int]] = {}
            for number, term in enumerate(place.terms):
                there.setdefault((term.module, term.side), []).append(number)
            for numbers in there.values():
                at = self._at(key, place.terms[numbers[0]])
                parts = tuple(at.part(place.terms[number]) for number in numbers)
                at.reads.append(Read(key, parts, None if len(there) == 1 else tuple(numbers)))
            if place.why_not_written is None:
                at.writes.append(Write(key, parts))
                if not place.in_place:
                    at.replaced |= {part.tensor for part in parts}

    def tap(self, keys: Iterable[Key]) -> None:
        """Put hooks where these points are read and written. Raises CaptureError for points that cannot be reached."""
        keys = set(keys) - self.tapped
        if unknown := sorted(str(key) for key in keys if key not in self._of):
            raise CaptureError(f"{', '.join(unknown)}: no place in vLLM's modules is known for it.")
        for place in {place for key in keys for place in self._of[key]} - self._hooked.keys():
            self._handlers.clear()
            self._hooked[place] = self._hook(self.boundaries[place])
        self.tapped |= {key for key, places in self._of.items() if places <= self._hooked.keys()}

    def wake(self, groups: tuple[Iterable[Key], ...]) -> None:
        """Show the handler the boundaries of these points, and no others, until the next call."""
        for number in self._awake:
            _AWAKE.pop(number, None)
        if groups not in self._handlers:
            if len(self._handlers) >= 256:
                self._handlers.clear()
            places = {place for keys in groups for key in keys for place in self._of[key]} & self._hooked.keys()
            self._handlers[groups] = {
                self._hooked[place]: partial(self.handler.at, self.boundaries[place]) for place in places
            }
        self._awake = self._handlers[groups]
        _AWAKE.update(self._handlers[groups])

    def _at(self, key: Key, term: Term) -> Boundary:
        place = (term.module, term.side)
        self._of.setdefault(key, set()).add(place)
        return self.boundaries.setdefault(place, Boundary(*place))

    def _hook(self, boundary: Boundary) -> int:
        """Returns the boundary's number."""
        try:
            module = self._model.get_submodule(boundary.module)
        except AttributeError as error:
            raise CaptureError(f"{type(self._model).__name__} has no module {boundary.module!r}.") from error
        number, name = next(_NUMBERS), f"_hookmap_{boundary.side}"
        pass_by = self._compiled(boundary, name) if self.compiled else self._eager(boundary, number)
        if self.compiled:
            # A buffer is an input of the compiled graph, so that the graphs of all layers are the same.
            module.register_buffer(name, torch.tensor(number), persistent=False)
        if boundary.side == "input":
            module.register_forward_pre_hook(
                lambda module, args, kwargs: pass_by(module, (args, kwargs, None)), with_kwargs=True
            )
        else:
            module.register_forward_hook(
                lambda module, args, kwargs, output: pass_by(module, (args, kwargs, output)), with_kwargs=True
            )
        return number

    def _compiled(self, boundary: Boundary, name: str) -> Callable[[nn.Module, ModuleIO], Any]:
        """A hook that the compiler traces: it always copies what may be replaced."""
        terms, replaced, writes = tuple(boundary.terms), sorted(boundary.replaced), bool(boundary.writes)

        def pass_by(module: nn.Module, given: ModuleIO) -> Any:
            tensors = [_tensor(term, given) for term in terms]
            for number in replaced:
                tensors[number] = tensors[number].clone()
            (write_and_read if writes else read)(tensors, getattr(module, name))
            return _passed(given, [(terms[number], tensors[number]) for number in replaced])

        return pass_by

    def _eager(self, boundary: Boundary, own: int) -> Callable[[nn.Module, ModuleIO], Any]:
        """A hook that copies only where something is written."""

        def pass_by(module: nn.Module, given: ModuleIO) -> Any:
            if own not in _AWAKE:
                return None
            tensors = [_tensor(term, given) for term in boundary.terms]
            replaced = boundary.replaced if self.handler.writes(boundary) else ()
            for number in replaced:
                tensors[number] = tensors[number].clone()
            self.handler.at(boundary, tensors)
            return _passed(given, [(boundary.terms[number], tensors[number]) for number in replaced])

        return pass_by


def _tensor(term: Term, given: ModuleIO) -> torch.Tensor:
    args, kwargs, output = given
    found: torch.Tensor
    if term.side == "input":
        found = kwargs[term.index] if isinstance(term.index, str) else args[term.index or 0]
    else:
        found = output if term.index is None else output[term.index]
    return found


def _passed(given: ModuleIO, replaced: Sequence[tuple[Term, torch.Tensor]]) -> Any:
    """What a hook returns: None where nothing is replaced."""
    if not replaced:
        return None
    for term, tensor in replaced:
        given = passed_on(term, given, tensor)
    args, kwargs, output = given
    return (args, kwargs) if replaced[0][0].side == "input" else output
