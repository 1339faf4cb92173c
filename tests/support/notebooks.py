"""Notebooks of docs/notebooks as sessions of pages: each code cell is a block, and what it printed stands behind it."""

import ast
import json
from typing import Any

from support.pages import CHECKOUT, Session

FOLDER = CHECKOUT / "docs" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
ANY_MODEL = [name for name in NOTEBOOKS if "HOOKMAP_REAL_MODEL" in (FOLDER / name).read_text(encoding="utf-8")]
"""those that run on the model of that variable, too"""


def first_of(name: str) -> str:
    """The text that it begins with."""
    return "".join(json.loads((FOLDER / name).read_text(encoding="utf-8"))["cells"][0]["source"])


def code_of(name: str) -> list[dict[str, Any]]:
    notebook = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shows(cell: dict[str, Any]) -> bool:
    """Whether a cell has something to show: it ends with a value."""
    return isinstance(ast.parse("".join(cell["source"])).body[-1], ast.Expr)


def session(name: str, checked: bool = True) -> Session:
    """The notebook as a page. `checked`: whether its cells must print what they show."""
    return Session(name, "\n".join(_as_page(cell, checked) for cell in code_of(name)))


def _as_page(cell: dict[str, Any], checked: bool) -> str:
    printed = "".join(line for output in cell["outputs"] if output.get("name") == "stdout" for line in output["text"])
    return f"```python\n{''.join(cell['source'])}\n```\n" + (f"\n```text\n{printed}\n```\n" if checked else "")
