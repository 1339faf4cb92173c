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


def terms_of(document: dict[str, Any], name: str, layer: int) -> list[tuple[str, str, int | str | None, float]]:
    """Module, side, index and factor of each tensor that the point is the sum of."""
    kind = next(kind for kind in document["kinds"].values() if layer in layers_of(kind["layers"]))
    row = row_of(kind, name)
    row = row["at"] if isinstance(row, dict) else row
    found = []
    for term in row if isinstance(row, list) else [row]:
        text = term["at"] if isinstance(term, dict) else term
        *factor, place = text.split(" * ")
        module, side, number, key = re.fullmatch(r"(?:(.*)\.)?(input|output)(?:\[(?:(\d+)|'(.*)')\])?", place).groups()
        if factor and factor[0].startswith("{"):
            values = kind["constants"][factor[0].strip("{}")]
            factor = [values[layers_of(kind["layers"]).index(layer)]]
        index = int(number) if number else key
        found.append(
            ((module or "").replace("{i}", name_of(document, layer)), side, index, float(factor[0]) if factor else 1.0)
        )
    return found


@pytest.mark.parametrize("path", MAPS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_a_reader_that_knows_the_page_alone_finds_every_tensor(path: Path) -> None:
    document, found = json.loads(path.read_text(encoding="utf-8")), load(path)
    names = {name for kind in found.kinds for name in kind.points}
    for selector in found.selectors(sorted(names), "all"):
        assert selector.layer is not None
        terms = [(term.module, term.side, term.index, term.scale) for term in selector.terms]
        assert terms_of(document, selector.point, selector.layer) == terms, (selector.point, selector.layer)
