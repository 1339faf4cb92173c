"""Writes texts.jsonl and held_out.jsonl, which the dictionary of docs/dictionaries.md learns and is evaluated on.

    python benchmarks/texts_of_python.py [FOLDER] [--more FILE.jsonl]

Python's help, the docstrings of its library and of NumPy, and these pages, in parts of 200 to 1,000 characters; of
`--more`, such as GSM8K's test problems, `question` and `answer`.
"""

import argparse
import ast
import inspect
import json
import os
import pydoc_data.topics
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy

HELD_OUT, LEAST, MOST = 100, 200, 1000


def texts(more: Path | None) -> Iterator[str]:
    yield from pydoc_data.topics.topics.values()
    for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md")):
        yield page.read_text(encoding="utf-8")
    for line in more.read_text(encoding="utf-8").splitlines() if more else ():
        entry = json.loads(line)
        yield f"{entry['question']}\n{entry['answer']}"
    library, arrays = Path(os.__file__).parent, Path(numpy.__file__).parent
    for path in (*sorted(library.glob("*.py")), *sorted(library.glob("*/*.py")), *sorted(arrays.rglob("*.py"))):
        if "test" in str(path) or (arrays.parent in path.parents and arrays not in path.parents):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--more", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # of the library's own sources
    parts: dict[str, None] = {}
    for text in texts(given.more):
        whole = inspect.cleandoc(text).strip()
        parts |= {part: None for at in range(0, len(whole), MOST) if len(part := whole[at : at + MOST]) > LEAST}
    shuffled = [*parts]
    random.Random(0).shuffle(shuffled)
    for name, some in (("held_out.jsonl", shuffled[:HELD_OUT]), ("texts.jsonl", shuffled[HELD_OUT:])):
        lines = [json.dumps({"prompt": text}) + "\n" for text in some]
        (given.folder / name).write_text("".join(lines), encoding="utf-8")
        print(f"{given.folder / name}: {len(some)} texts, {sum(map(len, some))} characters")


if __name__ == "__main__":
    main()
