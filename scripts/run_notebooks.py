"""Runs the notebooks of docs/notebooks and writes what their cells show: `python scripts/run_notebooks.py [FILES]`.

Needs no Jupyter. The notebooks run on the bundled demo model, or on the one that HOOKMAP_REAL_MODEL names. Where
pyproject.toml names a repository on GitHub (`[project.urls]`, Repository), each gets a badge that opens it on Colab.
"""

import ast
import base64
import contextlib
import io
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "notebooks"
COLAB = "https://colab.research.google.com"


def main(names: list[str]) -> None:
    for path in [Path(name) for name in names] or sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        first = [line for line in notebook["cells"][0]["source"] if COLAB not in line]
        notebook["cells"][0]["source"] = [*badge(path.name), *first]
        space: dict[str, Any] = {"__name__": "__main__"}
        cells = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
        for number, cell in enumerate(cells, start=1):
            cell["execution_count"], cell["outputs"] = number, run("".join(cell["source"]), space, number)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path)


def badge(name: str, pyproject: str | None = None) -> list[str]:
    """The line that opens a notebook on Colab; none where the project has no repository on GitHub yet."""
    project = tomllib.loads(pyproject or (ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    owner, github, repository = project.get("urls", {}).get("Repository", "").partition("https://github.com/")
    if owner or not github:
        return []
    where = f"{COLAB}/github/{repository.strip('/')}/blob/main/docs/notebooks/{name}"
    return [f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({where})\n"]


def run(source: str, space: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """What a cell prints, and what its last expression is, as outputs of a notebook."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value: Any = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), space)  # noqa: S102 - the notebook is ours
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), space)  # noqa: S307
    found: list[dict[str, Any]] = []
    if text := printed.getvalue():
        found.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    if value is not None:
        found.append({"data": shown(value), "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return found


def shown(value: Any) -> dict[str, Any]:
    """A value by its kind of media: a picture for Altair's charts, else its text."""
    if hasattr(value, "to_dict") and type(value).__module__.startswith("altair"):
        import vl_convert

        png = vl_convert.vegalite_to_png(value.to_dict(), scale=1.5)
        return {"image/png": base64.b64encode(png).decode(), "text/plain": ["a chart"]}
    return {"text/plain": repr(value).splitlines(keepends=True)}


if __name__ == "__main__":
    main(sys.argv[1:])
