"""Another program reads a map: what docs/map.md says suffices to find every tensor. It uses nothing of hookmap."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hookmap.maps.parsing import load
from hookmap.maps.shipped import mappings_folder

MAPS = [path for path in sorted(mappings_folder().rglob("*.json")) if ".schema" not in path.name]


def layers_of(pattern: str) -> list[int]:
    def numbers(text: str) -> set[int]:
        found: set[int] = set()
        for part in filter(None, text.split(", ")):
            first, last, step = re.fullmatch(r"(\d+)(?:-(\d+))?(?: by (\d+))?", part).groups()  # type: ignore[union-attr]
            found |= set(range(int(first), int(last or first) + 1, int(step or 1)))
        return found

    chosen, _, without = pattern.partition(" except ")
    return sorted(numbers(chosen) - numbers(without))


def name_of(document: dict[str, Any], layer: int) -> str:
    names: list[str] = []
    for name in document.get("layer_names", ()):
        row = re.fullmatch(r"(.*)\[(\d+)-(\d+)\]", name)
        names += [f"{row[1]}{n}" for n in range(int(row[2]), int(row[3]) + 1)] if row else [name]
    return names[layer] if names else str(layer)


def row_of(kind: dict[str, Any], name: str) -> Any:
    """The point's row, or that of the name whose second name it is."""
    reasons = [each for names in kind.get("unavailable", {}).values() for each in names]
    if name in kind["points"] or name in reasons:
        return kind["points"].get(name)
    base, dot, number = name.partition(".")
    firsts = [base.replace("mixer_", "attn_")] if base.startswith("mixer_") else []
    firsts += [base.removesuffix("_raw")] if base.endswith("_raw") else []
    return next((row for first in firsts if (row := row_of(kind, first + dot + number)) is not None), None)


SELECTOR = re.compile(
    r"(?:(?P<factor>\S+) \* )?(?:(?P<module>[^:]*?)(?::(?P<operator>\w+)(?:#(?P<number>\d+)(?:/\d+)?)?)?(?P<dot>\.))?"
    r"(?P<side>input|output)(?:\[(?:(?P<place>\d+)|'(?P<key>.*)')\])?"
)


def term_of(document: dict[str, Any], kind: dict[str, Any], said: dict[str, Any], layer: int) -> tuple[Any, ...]:
    """What finds one tensor in the model."""

    def path(text: str) -> str:
        whole = document["layers_path"] + text.removesuffix(".") if text.startswith(".") else text
        return whole.replace("{i}", name_of(document, layer)).replace("{i+1}", str(layer + 1))

    found = SELECTOR.fullmatch(said["at"])
    assert found is not None, said
    factor = found["factor"] or "1"
    if factor.startswith("{"):
        factor = kind["constants"][factor.strip("{}")][layers_of(kind["layers"]).index(layer)]
    module = found["module"] or ("." if found["dot"] and not found["operator"] else "")
    index = int(found["place"]) if found["place"] else found["key"]
    number = int(found["number"]) if found["number"] else None
    others = (path(said[key]) if key in said else None for key in ("experts", "through", "weight"))
    return path(module), found["side"], index, float(factor), found["operator"], number, *others


def terms_of(document: dict[str, Any], name: str, layer: int) -> tuple[list[tuple[Any, ...]], tuple[Any, ...] | None]:
    """Each tensor that the point is the sum of; and the one where it is written, if that is another."""
    kind = next(kind for kind in document["kinds"].values() if layer in layers_of(kind["layers"]))
    row = row_of(kind, name)
    row = row if isinstance(row, dict) else {"at": row}
    rows = row["at"] if isinstance(row["at"], list) else [row]
    terms = [term_of(document, kind, term if isinstance(term, dict) else {"at": term}, layer) for term in rows]
    write = row.get("write")
    write = {"at": write} if isinstance(write, str) else write
    return terms, None if write is None else term_of(document, kind, write, layer)


def expected(term: Any) -> tuple[Any, ...]:
    which = term.operation, term.occurrence, term.experts, term.through, term.weight
    return term.module, term.side, term.index, term.scale, *which


@pytest.mark.parametrize("path", MAPS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_a_reader_that_knows_the_page_alone_finds_every_tensor(path: Path) -> None:
    document, found = json.loads(path.read_text(encoding="utf-8")), load(path)
    names = {name for kind in found.kinds for name in kind.points}
    for selector in found.selectors(sorted(names), "all"):
        assert selector.layer is not None
        whole = (
            [expected(term) for term in selector.terms],
            None if selector.write is None else expected(selector.write),
        )
        assert terms_of(document, selector.point, selector.layer) == whole, (selector.point, selector.layer)
