"""The tables of docs/comparison.md, from a ledger of few lines."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "benchmarks" / "asked"))

from askers import POINTS
from judge import ERROR, SUPPORTED, UNAVAILABLE, WRONG
from tables import tables, write, wrong_of


def line(name: str, **said: Any) -> dict[str, Any]:
    """A class, and of each program the verdict on all points, or a dict of those that differ from right."""
    verdicts = {
        program: {p: [SUPPORTED, ""] for p in POINTS} | told if isinstance(told, dict) else dict.fromkeys(POINTS, told)
        for program, told in said.items()
    }
    versions = dict.fromkeys(said, "1.0")
    return {"type": name.lower(), "class": name, "recorded": True, "versions": versions, "said": verdicts}


LINES = {
    "a": line("A", hookmap={}, nnterp=[ERROR, "ValueError: no 'x' in AForCausalLM"]),
    "b": line("B", hookmap={"z": [UNAVAILABLE, "no attention"]}, nnterp={"z": [WRONG, "0.71 from the truth"]}),
    "c": line("C", hookmap={}, nnterp={"z": [WRONG, "1.3 from the truth"]}),
    "d": {"type": "d", "said": {}, "error": "it does not build"},
}


def row(table: str, head: str) -> str:
    return next(each for each in table.splitlines() if each.startswith(f"| {head}"))


def test_each_state_is_counted_and_what_was_not_asked_is_said() -> None:
    found = tables(LINES, 5)
    assert row(found["points"], "`z`").startswith(
        "| `z` | 2 right, 1 unavailable | not asked | 0 right, 1 error, **2 wrong** | not asked |"
    )
    assert "| nnterp | `z` | far from the truth | 2: B, C |" in found["wrong"]
    assert "| nnterp | ERROR | ValueError: no … in … | 1: A |" in found["refused"]
    assert "there are 5 classes" in found["asked"] and "there are" not in tables(LINES, 4)["asked"]
    assert "3 classes" in found["asked"] and "(1): `d`" in found["asked"]
    assert wrong_of("nnterp", LINES) == ["B z", "C z"] and not wrong_of("hookmap", LINES)


def test_a_page_keeps_what_is_written_by_hand(tmp_path: Path) -> None:
    for name, own in (("comparison.md", tables(LINES, 5)), ("comparison-classes.md", ["classes"])):
        marks = "".join(f"by hand\n<!-- table: {each} -->\nold\n<!-- end -->\n" for each in own)
        (tmp_path / name).write_text(marks, encoding="utf-8")
    write(LINES, 5, tmp_path)
    write(LINES, 5, tmp_path)
    page = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert page.count("by hand") == page.count("do not edit") == 4 and "old" not in page
    (tmp_path / "comparison-classes.md").write_text("no place", encoding="utf-8")
    with pytest.raises(SystemExit, match="expected one table classes, found 0"):
        write(LINES, 5, tmp_path)
