"""A map -> its document, which `reading` reads: selectors as people write them, without defaults and second names.

A field that this module does not know is written as it is, where it differs from its default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel

from hookmap.maps import reading
from hookmap.maps.contents import SCHEMA_VERSION, MapContents, Proof
from hookmap.maps.grammar import (
    CONSTANTS,
    Place,
    checks_text,
    folded,
    folded_names,
    from_block,
    heads_text,
    layers_pattern,
    selector_text,
)
from hookmap.maps.templates import BlockKind, PointTemplate, TermTemplate

_FACTOR = re.compile(r'(?<=["( ])(-?[0-9][0-9.e+-]*)(?= \* )')


def written(m: MapContents) -> dict[str, Any]:
    """The document as plain JSON data, in the order in which people read it."""
    kinds = _kinds(m)
    document: dict[str, Any] = {}
    for name, value in _said(m).items():
        match name:
            case "model_points":
                said = _points(m.model_points, m.model_unavailable, None)
                document |= {f"model_{key}": rows for key, rows in said.items()}
            case "kinds":
                document["kinds"] = {name: _but(kind, "evidence") for name, kind in kinds.items()}
                document["evidence"] = _by_text(_evidence(m, kinds))
            case "config":
                document["config"] = folded(value)
            case "layer_names":
                document["layer_names"] = folded_names(value)
            case "proofs":
                document["proofs"] = [_proof(proof) for proof in m.proofs]
            case "model_unavailable":
                pass  # beside model_points
            case _:
                document[name] = value
    return document | {"schema_version": SCHEMA_VERSION}


def _said(part: BaseModel) -> dict[str, Any]:
    """Its fields that differ from their defaults."""
    return part.model_dump(mode="json", exclude_defaults=True)


def _proof(proof: Proof) -> dict[str, Any]:
    return _said(proof) | ({"checks": checks_text(proof.checks)} if proof.checks else {})


def _but(document: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in keys}


def _kinds(m: MapContents) -> dict[str, dict[str, Any]]:
    """By name, with `evidence`: point -> what shows it. Kinds that differ in constants are one, if that reads back."""
    single = {kind.name: _kind(kind, m.layers_path) for kind in m.kinds}
    shorter = dict(_together(m, single))
    if len(shorter) == len(single):
        return single
    told = {name: _but(kind, "evidence") for name, kind in shorter.items()}
    whole = {"kinds": told, "num_layers": m.num_layers, "layers_path": m.layers_path}
    read = reading.read_kinds(whole, dict(_evidence(m, shorter)), [])
    return shorter if tuple(map(BlockKind.model_validate, read)) == m.kinds else single


def _kind(kind: BlockKind, layers_path: str) -> dict[str, Any]:
    ascending = kind.layers and sorted(set(kind.layers)) == list(kind.layers)
    said = _said(kind) | {"layers": layers_pattern(kind.layers) if ascending else list(kind.layers)}
    said = {key: reading.with_paths(field, lambda path: from_block(path, layers_path)) for key, field in said.items()}
    told = _points(kind.points, kind.unavailable, layers_path)
    classes = reading.classes_of_kind(kind.model_dump(), layers_path)
    evidence = {name: _shown(point, classes) for name, point in kind.points.items()}
    return {**_but(said, "name", "unavailable"), **told, "evidence": evidence}


def _together(m: MapContents, kinds: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kinds that are the same but for their layers and factors: one, with a list for each factor that differs."""
    alike: dict[tuple[str, str], list[tuple[tuple[int, ...], str]]] = {}
    for kind in m.kinds:
        text = json.dumps(_but(kinds[kind.name], "layers"))
        key = reading.base_name(kind.name), _FACTOR.sub("", text)
        alike.setdefault(key, []).append((kind.layers, text))
    names: list[str] = []
    for (name, _), members in alike.items():
        names.append(name)
        factors = sorted((layer, _FACTOR.findall(text)) for layers, text in members for layer in layers)
        columns = list(zip(*(found for _, found in factors), strict=True))
        differing = [column for column in dict.fromkeys(columns) if len(set(column)) > 1]
        constants = dict(zip(differing, CONSTANTS, strict=False))
        text = _with_names(members[0][1], columns, constants)
        lists = {constants[each]: folded([json.loads(number) for number in each]) for each in constants}
        layers = {"layers": layers_pattern([layer for layer, _ in factors])}
        last = {"constants": lists} if lists else {}
        yield reading.numbered(name, names.count(name)), layers | json.loads(text) | last


def _with_names(text: str, columns: Iterable[tuple[str, ...]], constants: Mapping[tuple[str, ...], str]) -> str:
    """`{a}` for each factor whose column of numbers has that name."""
    names = (f"{{{constants[each]}}}" if each in constants else each[0] for each in columns)
    return _FACTOR.sub(lambda _: next(names), text)


def _evidence(m: MapContents, kinds: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Point -> what shows it, where that is to be said; `KIND: point` where it is not so of another kind's."""
    said = {name: _shown(point, {"": m.architecture}) for name, point in m.model_points.items()}
    yield from ((name, text) for name, text in said.items() if text is not None)
    shown = {kind: {n: document["evidence"].get(n) for n in document["points"]} for kind, document in kinds.items()}
    for name in dict.fromkeys(name for points in shown.values() for name in points):
        texts = {kind: points[name] for kind, points in shown.items() if points.get(name) is not None}
        if len({*texts.values()}) == 1 and all(name not in points or kind in texts for kind, points in shown.items()):
            yield name, next(iter(texts.values()))
        else:
            yield from ((f"{kind}: {name}", text) for kind, text in texts.items())


def _shown(point: PointTemplate, classes: Mapping[str, str]) -> str | None:
    """`at CLASS`, where that stands for the sentence; None where the class is known."""
    last = point.terms[-1].model_dump()
    found = re.match(r"the tensor that (?:enters|leaves) ([^\s,]+)", point.evidence)
    shorter = (None, f"at {found[1]}" if found else "", point.evidence)
    return next(text for text in shorter if reading.evidence_of(text, last, classes) == point.evidence)


def _by_text(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Text -> the names that it is said of."""
    found: dict[str, list[str]] = {}
    for name, text in pairs:
        found.setdefault(text, []).append(name)
    return found


def _points(points: Mapping[str, PointTemplate], lost: Mapping[str, str], block: str | None) -> dict[str, Any]:
    """The rows, and why other points are not there. `block`: the path of the block; None for those of the model."""
    rows: dict[str, Any] = {}
    order, before = -1, None
    in_order = dict(sorted(points.items(), key=lambda item: item[1].order))
    for name, point in reading.without_second_names(in_order, lost).items():
        rows[name] = None
        if point is not None:
            here = reading.boundary(point.terms[-1].model_dump())
            order += here != before
            rows[name] = _row(name, point, {} if point.order == order else {"order": point.order}, block)
            order, before = point.order, here
    return {"points": rows} | ({"unavailable": _by_text(lost.items())} if lost else {})


def _row(name: str, point: PointTemplate, order: dict[str, int], block: str | None) -> Any:
    """A selector, a list of them, or an object with what else there is to say."""
    terms = [_term(term, block, name) for term in point.terms]
    rest = _but(_said(point), "terms", "order", "evidence") | order
    if point.write:
        rest["write"] = _term(point.write, block, name)
    if point.beside:
        rest["beside"] = [_term(term, block) for term in point.beside]
    at = terms[0] if len(terms) == 1 else terms
    if not rest:
        return at
    return {**(at if isinstance(at, dict) else {"at": at}), **rest}


def _term(term: TermTemplate, block: str | None, point: str = "") -> Any:
    module = term.module if block is None else from_block(term.module, block)
    place = Place(module, term.side, term.index, term.operation, term.occurrence, term.visits)
    at = selector_text(place, term.scale)
    rest = _but(_said(term), *asdict(place), "scale", "axes")
    axes = term.axes and list(term.axes)
    rest |= {key: from_block(rest[key], block) for key in reading.PATHS & rest.keys() if block is not None}
    if axes != reading.usual_axes(point, term.operation is not None):
        rest["axes"] = axes
    if term.heads:
        rest["heads"] = heads_text(term.heads.model_dump()) or rest["heads"]
    return {"at": at, **rest} if rest else at
