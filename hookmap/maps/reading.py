"""A map's document -> the fields of the map, and every problem with its place. Pure: plain JSON data in and out.

The document has the form that the published schema says. What is left out there is put back here: second names of
points, their places in the forward order, and kinds of block that differ in constants alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

from hookmap.maps.grammar import (
    Place,
    read_checks,
    read_heads,
    read_layers,
    read_selector,
    unfolded,
    unfolded_names,
    whole_path,
)
from hookmap.maps.points import HEADS_AXES, POINTS, PointName
from hookmap.maps.templates import TermTemplate

T = TypeVar("T")

BY_DATAFLOW = "an operation of the module's own forward, by dataflow"
"""what shows a point whose last term is such an operation"""
PATHS = {"experts", "through"}
"""the fields of a term that are paths from the block on"""
_CONSTANT = re.compile(r"\{([a-hj-z][0-9]*)\}")
_CLASS = re.compile(r"at (\S+)")
_HEADS_AS_READ = ["batch", "heads", "pos", "d_head"]
"""the axes of queries, keys and values inside an attention"""
_OF_TERM = TermTemplate.model_fields.keys() - {*asdict(Place("", "", None)), "scale"}


def read_map(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of the map, of no use where there are problems; and the problems."""
    problems: list[str] = []
    evidence = _by_name(document.get("evidence", {}), "evidence", problems)
    known = set(document["model_points"])
    for kind, said in document["kinds"].items():
        known |= {f"{of}{name}" for name in said["points"] for of in ("", f"{kind}: ")}
    problems += [f"evidence: {name} has no row in this map" for name in evidence if name not in known]
    fields = {key: value for key, value in document.items() if key not in ("schema_version", "evidence")}
    fields |= _read_points(document, "model_", {}, evidence, {"": document["architecture"]}, None, "", problems)
    fields["proofs"] = [_read_proof(proof) for proof in document.get("proofs", [])]
    with _at("config", problems):
        fields["config"] = unfolded(document.get("config", {}))
    fields["layer_names"] = unfolded_names(document.get("layer_names", ()))
    fields["kinds"] = read_kinds(document, evidence, problems)
    return fields, list(dict.fromkeys(problems))


def read_kinds(whole: Mapping[str, Any], evidence: Mapping[str, str], problems: list[str]) -> list[dict[str, Any]]:
    """The kinds of a whole document; one with constants is a kind for each set of their values.

    `evidence`: of a point, `q`, or of that of one kind, `attention+moe#2: q`.
    """
    found = []
    documents, layers, layers_path = whole["kinds"], whole["num_layers"], whole["layers_path"]
    for name, document in documents.items():
        of_kind = {key.removeprefix(f"{name}: "): text for key, text in evidence.items() if key.startswith(f"{name}: ")}
        for kind in _read_kinds(document, layers, layers_path, {**evidence, **of_kind}, f"kinds.{name}.", problems):
            found.append({"name": name, **kind})
    if any("constants" in each for each in documents.values()):
        found.sort(key=lambda kind: min(kind["layers"]))
        names = [base_name(kind["name"]) for kind in found]
        for n, kind in enumerate(found):
            kind["name"] = numbered(names[n], names[: n + 1].count(names[n]))
    return found


def base_name(kind: str) -> str:
    """`attention+moe` for `attention+moe#2`."""
    return kind.partition("#")[0]


def numbered(name: str, number: int) -> str:
    """The name of the kind that is the `number`-th of its name, from 1 on."""
    return name if number == 1 else f"{name}#{number}"


def _read_kinds(
    document: Mapping[str, Any],
    count: int,
    layers_path: str,
    evidence: Mapping[str, str],
    where: str,
    problems: list[str],
) -> Iterator[dict[str, Any]]:
    layers: list[int] = []
    with _at(f"{where}layers", problems):
        said = document["layers"]
        layers = read_layers(said, count) if isinstance(said, str) else said
    constants: dict[str, list[float]] = {}
    for name, values in document.get("constants", {}).items():
        with _at(f"{where}constants.{name}", problems):
            found = unfolded(values)
            if len(found) != len(layers):
                raise ValueError(f"expected one number for each of {len(layers)} layers, found {len(found)}")
            constants[name] = found
    alike: dict[tuple[float, ...], list[int]] = {}
    for place, layer in enumerate(layers):
        alike.setdefault(tuple(values[place] for values in constants.values()), []).append(layer)
    document = {key: with_paths(field, lambda path: whole_path(path, layers_path)) for key, field in document.items()}
    classes = classes_of_kind(document, layers_path)
    for numbers, own in alike.items():
        factors = dict(zip(constants, numbers, strict=True))
        relations = []
        for number, relation in enumerate(document.get("relations", [])):
            with _at(f"{where}relations[{number}]", problems):
                relations.append(_with_numbers(relation, factors))
        points = _read_points(document, "", factors, evidence, classes, layers_path, where, problems)
        rest = {key: value for key, value in document.items() if key != "constants"}
        yield {**rest, "layers": own, "relations": relations, **points}


def with_paths(field: Any, change: Callable[[str], str]) -> Any:
    """Any field of a kind; if it is a branch, with its modules' paths changed."""
    if not isinstance(field, dict) or "modules" not in field:
        return field
    return field | {"modules": [change(path) for path in field["modules"]]}


def _read_proof(said: Mapping[str, Any]) -> dict[str, Any]:
    checks = said.get("checks", {})
    return {**said, "checks": read_checks(checks) if isinstance(checks, str) else checks}


def _with_numbers(relation: str, constants: Mapping[str, float]) -> str:
    return _CONSTANT.sub(lambda name: f"{_constant(name[0], constants):.9g}", relation)


def _read_points(
    document: Mapping[str, Any],
    prefix: str,
    constants: Mapping[str, float],
    evidence: Mapping[str, str],
    classes: Mapping[str, str],
    block: str | None,
    where: str,
    problems: list[str],
) -> dict[str, Any]:
    """`points` and `unavailable`, each point with its second names, its place in the order and its evidence."""
    rows = document[f"{prefix}points"]
    lost = _by_name(document.get(f"{prefix}unavailable", {}), f"{where}{prefix}unavailable", problems)
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(rows)
    order, before = -1, None
    for name, row in rows.items():
        with _at(f"{where}{prefix}points.{name}", problems):
            if row is not None:
                point = _read_point(name, row, constants, block)
                last = point["terms"][-1]
                order = point.setdefault("order", order + (boundary(last) != before))
                before = boundary(last)
                found[name] = point | {"evidence": evidence_of(evidence.get(name), last, classes)}
    return {f"{prefix}points": with_second_names(found, lost), f"{prefix}unavailable": lost}


def _by_name(texts: Mapping[str, Sequence[str]], where: str, problems: list[str]) -> dict[str, str]:
    """Name -> what is said of it."""
    pairs = [(name, text) for text, names in texts.items() for name in names]
    names = [name for name, _ in pairs]
    problems += [f"{where}: {name} is there twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    return dict(pairs)


def _read_point(name: str, row: Any, constants: Mapping[str, float], block: str | None) -> dict[str, Any]:
    said = dict(row) if isinstance(row, dict) else {"at": row}
    terms = said.pop("at")
    if isinstance(terms, str):
        terms = [{"at": terms, **{key: said.pop(key) for key in _OF_TERM & said.keys()}}]
    elif misplaced := _OF_TERM & said.keys():
        raise ValueError(f"{', '.join(sorted(misplaced))} is said of one selector: write it into an object in the list")
    said["terms"] = [_read_term(term, constants, block, name) for term in terms]
    if "write" in said:
        said["write"] = _read_term(said["write"], constants, block, name)
    if "beside" in said:
        said["beside"] = [_read_term(term, constants, block) for term in said["beside"]]
    return said


def _read_term(row: Any, constants: Mapping[str, float], block: str | None, point: str = "") -> dict[str, Any]:
    said = dict(row) if isinstance(row, dict) else {"at": row}
    text = said.pop("at")
    place, factor = read_selector(text)
    if block is None and place.module.startswith("."):
        raise ValueError(f"{text}: a point of the whole model is in no block, its path begins at the model's root")
    if isinstance(said.get("heads"), str):
        said["heads"] = read_heads(said["heads"])
    found = asdict(place) | {"module": place.module if block is None else whole_path(place.module, block)}
    said |= {key: whole_path(said[key], block) for key in PATHS & said.keys() if block is not None}
    found["scale"] = _constant(factor, constants) if isinstance(factor, str) else factor
    return {"axes": usual_axes(point, place.operation is not None), **found, **said}


def usual_axes(name: str, at_operation: bool) -> list[str] | None:
    """The axes of a point's tensors where they stand: None for batch, pos, ...; the queries are positions."""
    point = POINTS.get(PointName.of(name).base)
    if point is None or (point.axes == HEADS_AXES and not at_operation):
        return None
    if point.axes == HEADS_AXES:
        return _HEADS_AS_READ
    axes = ["pos" if axis == "query" else axis for axis in point.axes]
    return axes if axes[1] != "pos" else None


def _constant(name: str, constants: Mapping[str, float]) -> float:
    if name[1:-1] not in constants:
        raise ValueError(f"{name} is none of the kind's constants")
    return constants[name[1:-1]]


def boundary(term: Mapping[str, Any]) -> tuple[Any, ...]:
    """What is passed in one moment: points at one boundary have one place in the forward order."""
    inside = term.get("operation"), term.get("occurrence"), term.get("experts")
    return term["module"], term["side"], term.get("call"), *inside


def classes_of_kind(kind: Mapping[str, Any], layers_path: str) -> dict[str, str]:
    """Path -> class, of the modules whose class the kind says: its block, and a branch's only module."""
    found = {layers_path: kind["block_class"]}
    for branch in kind.values():
        if isinstance(branch, Mapping) and len(branch.get("modules", ())) == 1:
            found[branch["modules"][0]] = branch.get("module_class")
    return {path: name for path, name in found.items() if name}


def evidence_of(text: str | None, last: Mapping[str, Any], classes: Mapping[str, str]) -> str:
    """The sentence of a point whose last term this is: `at CLASS` in short, or None where the class is known."""
    if last.get("operation") or last.get("experts"):
        return BY_DATAFLOW if text is None else text
    if text is None:
        text = f"at {classes[last['module']]}" if last["module"] in classes else ""
    found = _CLASS.fullmatch(text)
    if found is None:
        return text
    times = "" if last["scale"] == 1.0 else f", times {last['scale']:g}"
    return f"the tensor that {'enters' if last['side'] == 'input' else 'leaves'} {found[1]}{times}"


def with_second_names(rows: Mapping[str, T | None], unavailable: Mapping[str, str]) -> dict[str, T]:
    """Every name of each row: `attn_out` is `mixer_out`, too, and both are `attn_out_raw` and `mixer_out_raw`.

    A second name that has a row of its own, or a reason, or null for a row, is not made.
    """
    found = {name: row for name, row in rows.items() if row is not None}
    for second_name in (PointName.as_mixer, _as_raw):
        for name, row in list(found.items()):
            second = second_name(PointName.of(name))
            if second not in rows and second not in unavailable:
                found.setdefault(second, row)
    return found


def _as_raw(name: PointName) -> str:
    raw = f"{name.base}_raw"
    return name.numbered(raw) if name.base.endswith("_out") and raw in POINTS else str(name)


def without_second_names(points: Mapping[str, T], unavailable: Mapping[str, str]) -> dict[str, T | None]:
    """The fewest rows of which `with_second_names` makes these points."""
    rows: dict[str, T | None] = dict(points)
    for second_name in (_as_raw, PointName.as_mixer):
        for name, row in points.items():
            second = second_name(PointName.of(name))
            if second != name and second in rows and points[second] == row:
                del rows[second]
    made = with_second_names(rows, unavailable)
    rows |= {name: row for name, row in points.items() if made.get(name) != row}
    rows |= dict.fromkeys(with_second_names(rows, unavailable).keys() - points.keys())
    return {name: rows[name] for name in (*points, *(rows.keys() - points.keys())) if name in rows}


@contextmanager
def _at(where: str, problems: list[str]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        problems.append(f"{where}: {error}")
