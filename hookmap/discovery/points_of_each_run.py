"""The points of a block that runs several times: the places that are right in each of its runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hookmap.discovery.block_points import BlockPoints
from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.layer_list import LayerList
from hookmap.discovery.locate import Location, minus
from hookmap.discovery.values import Values
from hookmap.maps.points import PointName
from hookmap.maps.relations import Relation, Term
from hookmap.maps.templates import TermTemplate

_Contents = list[tuple[int | None, float, str | None]]
"""what each term of a location holds: a value (None where nothing is there), and its factors"""


def points_of_runs(values: Values, layers: LayerList, number: int, readings: list[BlockPoints]) -> BlockPoints:
    """What the map says of one block, from what each of its runs shows, in their order."""
    first = readings[0]
    if len(readings) == 1:
        return first
    runs = [_Run(values, layers, number, run) for run in range(len(readings))]
    locations: dict[str, Location] = {}
    unavailable = dict(first.unavailable)
    for name in dict.fromkeys(name for reading in readings for name in reading.locations):
        found = _place(runs, [reading.locations.get(name) for reading in readings])
        if isinstance(found, Location):
            locations[name] = found
            unavailable.pop(name, None)
        else:
            unavailable[name] = found or next(_reasons(name, readings))
    kept = [each for each in first.relations if all(each in reading.relations for reading in readings)]
    differences = {name: place for name in unavailable if (place := _difference(name, kept, locations)) is not None}
    locations |= differences
    unavailable = {name: reason for name, reason in unavailable.items() if name not in differences}
    relations = [each for each in kept if each.can_be_checked(locations)]
    return replace(first, locations=locations, unavailable=unavailable, relations=relations)


def _difference(name: str, relations: list[Relation], locations: dict[str, Location]) -> Location | None:
    """What a branch adds, as the stream after it minus the stream before it, where the two are all that is beside it.

    `attn_out` is `mixer_out` by another name.
    """
    added = PointName.of(name).as_mixer()
    for each in relations:
        before = next((term for term in each.terms if term.name != added), None)
        if each.form != "sum" or {*each.terms} != {before, Term(1.0, added)} or before != Term(1.0, each.terms[0].name):
            continue
        if {each.total, before.name} <= locations.keys():
            return minus(locations[each.total], locations[before.name])
    return None


def _reasons(name: str, readings: list[BlockPoints]) -> Iterator[str]:
    for run, reading in enumerate(readings):
        if name not in reading.locations:
            yield f"not in each run of this layer: in run {run}, {reading.unavailable.get(name, 'it is not there')}"


def _place(runs: list[_Run], found: list[Location | None]) -> Location | str | None:
    """A location that is right in every run; a reason why none is; None where some run lacks the point."""
    places = [each for each in found if each is not None]
    if len(places) < len(runs):
        return None
    wanted = [run.contents(place, run) for run, place in zip(runs, places, strict=True)]
    reason: str | None = None
    for own, place in zip(runs, places, strict=True):
        if [run.contents(place, own) for run in runs] == wanted:
            terms = [_over_runs(term, own, runs) for term in place.terms]
            others = [_over_runs(term, own, runs) for term in place.beside]
            write = None if place.write is None else _over_runs(place.write, own, runs)
            if None not in (*terms, *others) and (place.write is None) == (write is None):
                found_terms, found_others = tuple(filter(None, terms)), tuple(filter(None, others))
                return replace(place, terms=found_terms, beside=found_others, write=write)
            reason = "the calls of its module are not at equal distances from one run of this layer to the next"
    if reason is None:
        said = [run.words(place) for run, place in zip(runs, places, strict=True)]
        other = next((run for run, text in enumerate(said) if text != said[0]), 0)
        reason = f"it is not at one place in each run of this layer: in run 0 {said[0]}, in run {other} {said[other]}"
    return reason


def _over_runs(term: TermTemplate, own: _Run, runs: list[_Run]) -> TermTemplate | None:
    """The term with the calls of its module in each run; None where they are not evenly spaced."""
    numbers = [call for run in runs if (call := run.call(term, own)) is not None]
    if len(numbers) < len(runs):
        return None
    start, step = numbers[0], numbers[1] - numbers[0]
    if step < 1 or numbers != list(range(start, start + step * len(numbers), step)):
        return None
    alone = (start, step) == (0, 1) and own.total(term) == len(runs)
    return term.model_copy(update={"call": None if alone else start, "calls_per_run": step})


class _Run:
    """One run of a block: the calls of modules in it, and what stands at their boundaries."""

    def __init__(self, values: Values, layers: LayerList, number: int, run: int) -> None:
        self.values = values
        span = layers.calls[number, run]
        self.name = layers.name(number)
        self.calls: dict[str, list[tuple[int, ModuleCall]]] = {}
        """path -> the calls in this run, each with its number among all calls of the module"""
        self.counts: dict[int, int] = {}
        """id of each module -> how often it is called in one forward pass"""
        for call in values.flow.calls:
            place = self.counts.get(id(call.module), 0)
            self.counts[id(call.module)] = place + 1
            if span.enter <= call.enter and call.exit <= span.exit:
                self.calls.setdefault(call.path, []).append((place, call))

    def contents(self, location: Location, own: _Run) -> _Contents:
        """What the terms of a location, which was found in the run `own`, hold in this one; the order is kept."""
        return [(self._value(term, own), term.scale, term.weight) for term in location.terms]

    def call(self, term: TermTemplate, own: _Run) -> int | None:
        """The number of the call that a term of the run `own` names, in this run."""
        found = self._call(term, own)
        return None if found is None else found[0]

    def words(self, location: Location) -> str:
        """A location that was found in this run: its terms, each with the call of a module that the run calls again."""
        return " + ".join(map(self._words, location.terms))

    def _words(self, term: TermTemplate) -> str:
        numbers = [number for number, _ in self.calls.get(term.module.replace("{i}", self.name), [])]
        if len(numbers) < 2 or term.call is None:
            return term.text()
        return f"{term.text()} (call {numbers.index(term.call)} of {len(numbers)})"

    def total(self, term: TermTemplate) -> int:
        """How often the module of a term, which was found in this run, is called in one forward pass."""
        found = self._call(term, self)
        return 0 if found is None else self.counts[id(found[1].module)]

    def _value(self, term: TermTemplate, own: _Run) -> int | None:
        if (found := self._call(term, own)) is None:
            return None
        if term.experts is not None:  # in each run they are the same weights
            return -1
        if term.operation is not None:
            alike = [o for o in self.values.flow.operations if (o.call, o.name) == (found[1].index, term.operation)]
            if len(alike) <= (term.occurrence or 0) or term.visits not in (None, len(alike)):
                return None
            op, index = alike[term.occurrence or 0], term.index if isinstance(term.index, int) else 0
            return self.values.value((op.inputs if term.side == "input" else op.outputs)[index])
        places = found[1].inputs if term.side == "input" else found[1].outputs
        tensor = places.get(term.index)
        return None if tensor is None else self.values.value(tensor)

    def _call(self, term: TermTemplate, own: _Run) -> tuple[int, ModuleCall] | None:
        path = term.module.replace("{i}", self.name)
        numbers = [number for number, _ in own.calls.get(path, [])]
        if term.call is not None and term.call not in numbers:
            return None
        place = 0 if term.call is None else numbers.index(term.call)
        mine = self.calls.get(path, [])
        return mine[place] if place < len(mine) else None
