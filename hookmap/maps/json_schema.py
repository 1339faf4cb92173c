"""The JSON Schemas of a map's document: the published one, and that of schema 1, whose files are still read.

Both are made from the map's fields: a new field is in them without a line here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from hookmap.maps.contents import SCHEMA_VERSION, MapContents
from hookmap.maps.grammar import CHECKS, HEADS, LAYERS, SELECTOR

SCHEMA_ID = f"urn:hookmap:schema:architecture-map-{SCHEMA_VERSION}"
_TEXT = {"type": "string"}
_NAMES = {"type": "array", "items": _TEXT, "minItems": 1}


@cache
def schema() -> dict[str, Any]:
    """The schema of what is written; `mappings/architecture-map.schema.json` is this, and a test holds it so."""
    made = MapContents.model_json_schema()
    defs: dict[str, Any] = made["$defs"]
    term, point, kind = defs.pop("TermTemplate"), defs.pop("PointTemplate"), defs["BlockKind"]
    of_term = _properties(term, "module", "side", "index", "operation", "occurrence", "visits", "scale")
    place = {"anyOf": [_ref("Selector"), _ref("Term")]}
    places = {"type": "array", "items": place, "minItems": 1}
    text = {"type": "string", "pattern": HEADS, "title": 'heads such as "32 x 128"'}
    of_term["heads"] = {"anyOf": [text, *of_term["heads"]["anyOf"]], **_said(term, "heads")}
    of_point = _properties(point, "terms", "evidence") | {"beside": {**places, **_said(point, "beside")}}
    of_point["write"] = {**place, **_said(point, "write")}
    of_point["order"]["description"] += "; left out where the rows' order says it"
    defs |= {
        "Selector": {
            "type": "string",
            "pattern": SELECTOR,
            "title": 'a selector such as "0.5 * model.layers.{i}.mlp.output[0]"',
            "description": "[FACTOR * ][MODULE][:OPERATOR[#N[/M]]].input|output[INDEX]; what begins with a dot goes on "
            "behind layers_path; OPERATOR is an operation in the module's own forward, the one of its name or the N-th "
            "of M; FACTOR is a number, or {a}, the layer's constant a; {i} is the layer; INDEX is a position or a name "
            "in single quotes, among the arguments or in the output",
        },
        "Term": _object({"at": _ref("Selector"), **of_term}, ["at"]),
        "Row": _object({"at": {"anyOf": [_ref("Selector"), places]}, **of_term, **of_point}, ["at"]),
        "Rows": {
            "type": "object",
            "additionalProperties": {"anyOf": [_ref("Selector"), places, _ref("Row"), {"type": "null"}]},
            "description": "a point is a selector, a list of selectors, its summands, or an object with what else is "
            "to be said; rows are in the order of the forward pass. attn_out is mixer_out, too, and both are "
            "attn_out_raw and mixer_out_raw (so attn_in, mlp_out), unless those have a row or a reason; null: there is "
            "no such point",
        },
        "Names": {
            "type": "object",
            "additionalProperties": _NAMES,
            "description": "a reason, or what shows it -> the points; `at CLASS`: the tensor enters or leaves a CLASS",
        },
    }  # fmt: skip
    kind["properties"] |= {
        "layers": {
            "anyOf": [
                {"type": "string", "pattern": LAYERS, "title": 'layers such as "0-31" or "0-33 except 5-29 by 6"'},
                {"type": "array", "items": {"type": "integer", "minimum": 0}},
            ]
        },
        "constants": {
            "type": "object",
            "additionalProperties": {"type": "array", "items": {"anyOf": [{"type": "number"}, {"type": "object"}]}},
            "description": "factors that differ from layer to layer: one number for each layer, in their order; "
            '{"3 times": [0.5]} is written for three',
        },
        "points": _ref("Rows"),
        "unavailable": _ref("Names"),
    }
    checks = defs["Proof"]["properties"]["checks"]
    text = {"type": "string", "pattern": CHECKS, "title": 'checks such as "shapes, order, sum 2"'}
    checks |= {"anyOf": [text, {key: checks.pop(key) for key in ("type", "additionalProperties")}]}
    del kind["properties"]["name"]
    kind["required"].remove("name")
    made["properties"] |= {
        "schema_version": {"enum": [2, SCHEMA_VERSION], "description": "what is written has the last one"},
        "model_points": _ref("Rows"),
        "model_unavailable": _ref("Names"),
        "kinds": {
            "type": "object",
            "additionalProperties": _ref("BlockKind"),
            "minProperties": 1,
            "description": "by name; kinds of one name are numbered: attention+moe, attention+moe#2",
        },
        "evidence": _ref("Names"),
    }
    made["required"].append("schema_version")
    made |= {"title": "ArchitectureMap", "description": "where each point of one architecture, or of one model, is"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **made}


@cache
def schema_1() -> dict[str, Any]:
    """The schema of files of schema 1: the fields as they are in memory."""
    made = MapContents.model_json_schema()
    del made["properties"]["proofs"]
    texts = {"type": "array", "items": _TEXT}
    made["properties"] |= {"schema_version": {"const": 1}, "verified_by": texts, "proved_on": texts}
    return made


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _properties(of: dict[str, Any], *but: str) -> dict[str, Any]:
    return {name: rule for name, rule in of["properties"].items() if name not in but}


def _said(of: dict[str, Any], name: str) -> dict[str, Any]:
    return {"description": of["properties"][name]["description"]}
