"""A map file -> the document, or every problem with it at once: the field, what was expected, what was found."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hookmap.errors import MapError, MapNotFoundError
from hookmap.maps.contents import SCHEMA_VERSION
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.grammar import SELECTOR, why_no_selector
from hookmap.maps.json_schema import schema, schema_1
from hookmap.maps.reading import read_map
from hookmap.placeholders import is_gguf, is_pointer, pointers_told
from hookmap.wording import counted, did_you_mean


def load(path: str | Path) -> ArchitectureMap:
    """The map in the file `path`. Raises MapNotFoundError or MapError, see `parse`."""
    file = Path(path)
    if is_gguf(file) and file.is_file():
        raise MapError(f"{file} is a GGUF file, a model. Its map: hookmap discover {file}")
    if is_pointer(file):
        raise MapError(pointers_told(file.parent, [file.name]))
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MapNotFoundError(f"there is no map file {path}. Make one: hookmap discover MODEL -o {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MapError(f"the map file {path} cannot be read: {error}") from error
    return parse(text, source=str(path))


def parse(document: str | Mapping[str, Any], source: str = "the document") -> ArchitectureMap:
    """A map from JSON text or from its parsed form; `source` names it in errors.

    Raises MapError with every problem at once: the field, what was expected, and what was found.
    """
    found = _parse_json(document if isinstance(document, str) else json.dumps(dict(document)), source)
    schema_version = found.get("schema_version") if isinstance(found, dict) else None
    if isinstance(schema_version, int) and schema_version > SCHEMA_VERSION:
        raise MapError(
            f"{source} is a map of schema {schema_version}, and this hookmap reads schemas 1 to {SCHEMA_VERSION}. "
            "Update it: pip install -U hookmap"
        )
    old = schema_version == 1
    problems = _schema_problems(found, old)
    if not problems and not old and list(found) in (sorted(found), sorted(found, key=lambda key: (len(key), key))):
        problems = ["its keys have been sorted, and the rows of points stand in the order of the forward pass"]
    if not problems:
        fields, problems = (_of_schema_1(found), []) if old else read_map(found)
    if not problems:
        try:
            return ArchitectureMap.model_validate(fields)
        except ValidationError as error:  # what a schema cannot say: every layer has one kind, point names
            problems = [f"{_path(e['loc'])}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
    count = counted(len(problems), "problem")
    lines = "\n".join(f"  - {problem}" for problem in problems)
    raise MapError(
        f"{source} is not a hookmap map, {count}:\n{lines}\n"
        f"Mend the file, or make it anew: hookmap discover MODEL -o {source if source.endswith('.json') else 'FILE'}"
    )


def _parse_json(text: str, source: str) -> Any:
    def refuse(constant: str) -> None:
        raise MapError(f"{source} is not JSON: {constant} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        line = error.doc[error.doc.rfind("\n", 0, error.pos) + 1 :].partition("\n")[0].strip()
        raise MapError(
            f"{source} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
            f"{f', at: {line[:80]}' if line else ''}\n"
            "Mend the file there, or make it anew: hookmap discover MODEL -o FILE"
        ) from error


def _of_schema_1(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of a file of schema 1, whose proofs were sentences: `shapes: 579 tensors are [batch, pos, d]`."""
    fields = {key: value for key, value in document.items() if key != "schema_version"}
    sentences, versions = fields.pop("verified_by", []), fields.pop("proved_on", [])
    on = next((text.removeprefix("on ") for text in sentences if text.startswith("on ")), "")
    checks = Counter(text.partition(":")[0] for text in sentences if not text.startswith("on "))
    proof = {"transformers": versions, "on": on, "checks": dict(checks)}
    return {**fields, "proofs": [proof] if sentences or versions else []}


@cache
def _validator(old: bool) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema_1() if old else schema())


def _schema_problems(document: Any, old: bool) -> list[str]:
    """Every violation of the document's schema, as `field: expected ..., found ...`."""
    errors = _validator(old).iter_errors(document)
    return [line for error in sorted(errors, key=lambda e: list(map(str, e.absolute_path))) for line in _explain(error)]


def _explain(error: Any) -> Iterable[str]:
    where = _path(error.absolute_path)
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for key in error.instance.keys() - known.keys():
            hint = did_you_mean(key, known, n=2) or f"the fields are {', '.join(known)}"
            yield f"{_path([*error.absolute_path, key])}: unknown field; {hint}"
    elif error.validator == "required":
        missing = next(key for key in error.validator_value if f"'{key}' is a required" in error.message)
        expected = error.schema["properties"][missing]
        yield f"{_path([*error.absolute_path, missing])}: expected {_expected(expected)}, found nothing: it is missing"
    elif error.validator == "anyOf" and (meant := _meant(error)):
        for each in meant:
            yield from _explain(each)
    else:
        why = f": {why_no_selector(error.instance)}" if error.schema.get("pattern") == SELECTOR else ""
        yield f"{where}: expected {_expected(error.schema)}, found {_shorten(error.instance)}{why}"


def _meant(error: Any) -> list[Any]:
    """The violations of the first alternative that is of the value's type."""
    by_rule: dict[int, list[Any]] = {}
    for each in error.context:
        by_rule.setdefault(each.relative_schema_path[0], []).append(each)
    return next((found for found in by_rule.values() if not any(_of_another_type(each) for each in found)), [])


def _of_another_type(error: Any) -> bool:
    if error.validator == "anyOf":
        return not _meant(error) and not error.relative_path
    return error.validator == "type" and not error.relative_path


def _expected(rule: Mapping[str, Any]) -> str:
    """A schema in a few words: what a person would have to write there."""
    if "const" in rule:
        return json.dumps(rule["const"])
    if "enum" in rule:
        return "one of " + ", ".join(map(json.dumps, rule["enum"]))
    if "anyOf" in rule:
        return " or ".join(map(_expected, rule["anyOf"]))
    if "$ref" in rule:
        name = rule["$ref"].rpartition("/")[2]
        rule = schema()["$defs"].get(name, {})
        return _expected(rule) if "pattern" in rule else f"an object ({name})"
    if "pattern" in rule:
        return str(rule["title"])
    names = {"string": "a string", "integer": "a whole number", "number": "a number", "array": "a list"}
    names |= {"object": "an object", "boolean": "true or false", "null": "null"}
    text = names.get(rule.get("type", ""), "another value")
    if rule.get("minItems"):
        text += f" of at least {rule['minItems']}"
    return f"{text}, at least {rule['minimum']}" if "minimum" in rule else text


def _path(parts: Iterable[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".") or "the whole document"


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
