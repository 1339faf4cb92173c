"""From the map of a pass with one stream to the places in the pass as it is: the same expression at the same boundary.

Where a boundary holds one half of the stream, its two tensors are the terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from hookmap.activations import Key
from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.values import Values
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.selectors import Selector
from hookmap.maps.templates import BlockKind, Heads, PointTemplate, TermTemplate
from hookmap.maps.terms import Term
from hookmap.stores.ledger import tensor_name
from hookmap.vllm.boundaries import Boundaries, Boundary
from hookmap.vllm.expressions import Book, Expressions
from hookmap.vllm.places import ModelPlaces, Place
from hookmap.vllm.writable import how_written

_NOWHERE = "no module boundary of vLLM's model holds it"
_IN_A_KERNEL = "vLLM's kernels compute it, or hold it in one tensor with another: no module shows it by itself"
_NO_LOGITS = "vLLM computes logits only for the positions that it samples from: unembed final_norm"
_READ_BEFORE = "something reads it before any module shows it"


def translated(seen: ArchitectureMap, joined: Values, values: Values, batch: bool) -> ModelPlaces:
    """The map of the model as it runs, with the places of its points.

    `seen`: the map of the pass `joined`, in which blocks hand on one stream. `values`: the pass as it is. `batch`:
    whether modules see [1, tokens, d] when vLLM runs the model, as in these passes; else they see [tokens, d].
    """
    translation = _Translation.of(seen, joined, values, batch)
    found = translation.map()
    return ModelPlaces(
        found, _apart({selector.key: translation.place(found, selector) for selector in found.selectors(found.points)})
    )


def _apart(places: dict[Key, Place]) -> dict[Key, Place]:
    """Refuses to write what one module reads where the same tensor is written as the stream itself."""
    stream = {_where(term): key for key, place in places.items() if place.in_place for term in place.terms}
    found = {}
    for key, place in places.items():
        other = next((stream[_where(term)] for term in place.terms if _where(term) in stream), None)
        if other is not None and not place.in_place and place.why_not_written is None:
            why = f"it is the same tensor as {tensor_name(other)}, which is written there: write that one"
            place = replace(place, why_not_written=why)
        found[key] = place
    return found


def _where(term: Term) -> tuple[Any, ...]:
    return term.module, term.side, term.index


def _why_lost(point: PointTemplate) -> str:
    return _IN_A_KERNEL if any(term.operation is not None for term in point.terms) else _NOWHERE


@dataclass(frozen=True)
class _Translation:
    seen: ArchitectureMap
    joined: Expressions
    there: Boundaries
    """of the pass with one stream"""
    own: Expressions
    here: Boundaries
    """of the pass as it is"""
    batch: bool

    @classmethod
    def of(cls, seen: ArchitectureMap, joined: Values, values: Values, batch: bool) -> _Translation:
        book = Book()
        one, own = Expressions(joined, book), Expressions(values, book)
        return cls(seen, one, Boundaries(one), own, Boundaries(own), batch)

    # Reading --------------------------------------------------------------------------------------------------------

    def map(self) -> ArchitectureMap:
        """The map, where layers whose points are at the same places are one kind."""
        groups: dict[str, tuple[list[int], BlockKind]] = {}
        for layer in range(self.seen.num_layers):
            kind = self._kind(layer)
            groups.setdefault(kind.model_dump_json(), ([], kind))[0].append(layer)
        kinds: list[BlockKind] = []
        for layers, kind in groups.values():
            twins = sum(other.name.split("#")[0] == kind.name for other in kinds)
            name = f"{kind.name}#{twins + 1}" if twins else kind.name
            kinds.append(kind.model_copy(update={"layers": tuple(layers), "name": name}))
        points = {name: self._template(point, None) for name, point in self.seen.model_points.items()}
        lost = {name: _why_lost(self.seen.model_points[name]) for name, point in points.items() if point is None}
        lost |= dict.fromkeys(("logits", "logits_raw"), _NO_LOGITS)
        update = {
            "kinds": tuple(kinds),
            "model_points": {n: point for n, point in points.items() if point is not None and n not in lost},
            "model_unavailable": {**self.seen.model_unavailable, **lost},
        }
        return self.seen.model_copy(update=update)

    def _kind(self, layer: int) -> BlockKind:
        kind = self.seen.kind_of(layer)
        points = {name: self._template(point, layer) for name, point in kind.points.items()}
        lost = {name: _why_lost(kind.points[name]) for name, point in points.items() if point is None}
        rest = kind.without(lost)
        kept = {name: point for name, point in points.items() if point is not None}
        name = kind.name.split("#")[0]
        return rest.model_copy(update={"layers": (), "points": kept, "name": name})

    def _template(self, point: PointTemplate, layer: int | None) -> PointTemplate | None:
        found = [self._terms(term, layer) for term in point.terms]
        if not all(found):
            return None
        terms = tuple(term for terms in found for term in terms)
        return point.model_copy(update={"terms": terms, "beside": (), "write": None})

    def _terms(self, term: TermTemplate, layer: int | None) -> tuple[TermTemplate, ...]:
        """The tensors in the pass as it is whose sum the term is; none where it stands nowhere."""
        path = self._path(term.module, layer)
        number = term.call or 0
        if term.experts is not None or term.through is not None:
            return ()
        if term.operation is not None:
            return tuple(self._of_heads(term, path, number, layer))
        expression = self.there.expression_at(path, number, term.side, term.index)
        within = self._within(layer)
        if expression is None or within is None or term.rows != "all":
            return ()
        boundaries = self.here.holding(expression, within)
        calls = self.here.calls(path)[number : number + 1]
        same = [each for each in boundaries if each.call in calls and each.side == term.side]
        own = [each for each in same if each.indices == (term.index,)]
        others = [each for each in boundaries if self._is_one_layers(each.call.path, layer)]
        for boundary in (*own, *same, *others):
            if len(boundary.tensors) == 1 or term.heads is None:
                return tuple(self._at(term, boundary, layer))
        return ()

    def _of_heads(self, term: TermTemplate, path: str, number: int, layer: int | None) -> Iterator[TermTemplate]:
        """What an operation of the twin's own shows head by head, where a module of vLLM's reads the same in a row."""
        found, within = self.there.expression_of_operation(path, number, term), self._within(layer)
        if found is None or within is None or term.axes is None or "d_head" not in term.axes or term.rows != "all":
            return
        expression, shape = found
        tokens, size = (shape[term.axes.index(axis)] for axis in ("pos", "d_head"))
        width = prod(shape) // tokens
        for boundary in self.here.holding(expression, within):
            wide = self.here.shape_at(boundary.call.path, 0, boundary.side, boundary.indices[0])
            in_a_row = wide is not None and wide[-2:] == (tokens, width) and len(boundary.tensors) == 1
            if in_a_row and self._is_one_layers(boundary.call.path, layer):
                heads = Heads(stop=width, d_head=size)
                bare = {"operation": None, "occurrence": None, "visits": None, "call": None, "heads": heads}
                yield from self._at(term.model_copy(update=bare), boundary, layer)
                return

    def _at(self, term: TermTemplate, boundary: Boundary, layer: int | None) -> Iterable[TermTemplate]:
        module = self._templated(boundary.call.path, layer)
        for index in boundary.indices:
            flat = term.flat or not self.batch
            update = {"module": module, "side": boundary.side, "index": index, "flat": flat, "axes": None}
            yield term.model_copy(update=update)

    def _within(self, layer: int | None) -> ModuleCall | None:
        calls = self.here.calls("" if layer is None else self.seen.at_layer(self.seen.layers_path, layer))
        return calls[0] if len(calls) == 1 else None

    def _path(self, template: str, layer: int | None) -> str:
        return template if layer is None else self.seen.at_layer(template, layer)

    def _templated(self, path: str, layer: int | None) -> str:
        if layer is None:
            return path
        own = self.seen.at_layer(self.seen.layers_path, layer)
        return self.seen.layers_path + path.removeprefix(own)

    def _is_one_layers(self, path: str, layer: int | None) -> bool:
        own = None if layer is None else self.seen.at_layer(self.seen.layers_path, layer)
        return own is not None and (path == own or path.startswith(own + "."))

    # Writing --------------------------------------------------------------------------------------------------------

    def place(self, found: ArchitectureMap, selector: Selector) -> Place:
        """Where a point of the translated map is read and written."""
        where, width = self._written(selector), self._width(selector.terms[0])
        if where is None:
            why = _READ_BEFORE if len(selector.terms) == 1 else f"no one module holds it: {selector}"
            return Place(selector.terms, width=width, why_not_written=why)
        terms, how = where
        return Place(terms, in_place=how == "in place", width=width)

    def _width(self, term: Term) -> int:
        if term.heads is not None:
            return term.heads.groups * (term.heads.stop - term.heads.start)
        shape = self.here.shape_at(term.module, term.call or 0, term.side, term.index)
        return 0 if shape is None else shape[-1]

    def _written(self, selector: Selector) -> tuple[tuple[Term, ...], str] | None:
        first, within = selector.terms[0], self._within(selector.layer)
        parts = [self.here.expression_at(t.module, t.call or 0, t.side, t.index) for t in selector.terms]
        known = [part for part in parts if part is not None]
        if within is None or len(known) < len(parts) or any(t.weight or t.scale != first.scale for t in selector.terms):
            return None
        expression = self.own.book.sum_of(known)
        indices = tuple(term.index for term in selector.terms)

        def is_where_it_is_read(each: Boundary) -> bool:
            return (each.call.path, each.side, each.indices) == (first.module, first.side, indices)

        for boundary in sorted(self.here.holding(expression, within), key=is_where_it_is_read, reverse=True):
            how = how_written(self.own, boundary, expression, selector.point.startswith("resid_"))
            if how is not None and (self._is_one_layers(boundary.call.path, selector.layer) or selector.layer is None):
                own = (replace(first, module=boundary.call.path, side=boundary.side, index=i) for i in boundary.indices)
                return tuple(own), how
        return None
