"""The docs cannot drift: what there is, they name. That they run: test_pages.py."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any

import click
import pytest
from support.pages import CHECKOUT, blocks

import hookmap
from hookmap import errors
from hookmap.cli.configuration import fields
from hookmap.cli.main import main
from hookmap.cli.settings import load_settings

PAGES = sorted([CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")])
PACKAGE = CHECKOUT / "hookmap"
TEXTS = [*PAGES, CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "Makefile", CHECKOUT / "pyproject.toml"]
CODE = [file for folder in ("hookmap", "tests", "scripts", "benchmarks") for file in (CHECKOUT / folder).rglob("*.py")]
FILE_NAME = re.compile(r"(?<![\w/.*-])(?:(?:[\w-]+|\.\.)/)*[a-z_][a-z0-9_]*\.py\b")
DOTTED_NAME = re.compile(r"(?<![\w/.:@-])hookmap((?:\.[A-Za-z]\w*)+)(?!\w)")
OTHER_SUFFIXES = {"yaml", "json", "lan"}
"""of `hookmap.yaml` and the like, which are no modules"""


def shown(page: Path, language: str) -> list[str]:
    """The texts of a page's blocks of this language."""
    return [block.text for block in blocks(page.read_text(encoding="utf-8")) if block.language == language]


def names(page: str) -> str:
    return (CHECKOUT / "docs" / page).read_text(encoding="utf-8")


def test_the_experiment_page_shows_the_bundled_example() -> None:
    example = shown(CHECKOUT / "docs" / "experiments.md", "yaml")[1]  # behind that of a real model
    assert example == (CHECKOUT / "hookmap" / "demo" / "emotions.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_pictures_of_the_lens_page_are_of_todays_numbers() -> None:
    sys.path.insert(0, str(CHECKOUT / "scripts"))
    try:
        import draw_lenses
    finally:
        sys.path.pop(0)
    for name, chart in draw_lenses.charts().items():
        drawn = (CHECKOUT / "docs" / "images" / name).read_text(encoding="utf-8")
        words = re.findall(r">([^<>]+)</text>", drawn)
        fresh = re.findall(r">([^<>]+)</text>", svg(chart))
        assert words == fresh, "draw them again: python scripts/draw_lenses.py"


def svg(chart: Any) -> str:
    import vl_convert

    return str(vl_convert.vegalite_to_svg(chart.to_dict()))


def test_the_home_page_begins_with_a_sentence_two_commands_and_a_picture() -> None:
    """At 1,280 × 800 they fill the screen: the picture has the page's whole width."""
    home = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    first, rest = re.split(r"^```\n", home, maxsplit=1, flags=re.MULTILINE)
    assert len(first.partition("```sh\n")[2].splitlines()) == 2
    above, _, _ = rest.partition("```")
    assert "docs/images/sequential.svg" in above and len(first.partition("```")[0].splitlines()) < 10


def test_the_command_page_names_every_command() -> None:
    page = names("cli.md")
    for command in main.list_commands(click.Context(main)):
        assert f"`hookmap {command} " in page


def test_the_settings_file_of_the_docs_is_accepted_and_shows_every_key(tmp_path: Path) -> None:
    (example,) = shown(CHECKOUT / "docs" / "cli.md", "yaml")
    (tmp_path / "hookmap.yaml").write_text(example, encoding="utf-8")
    assert set(load_settings(tmp_path)) == set(fields())


def errors_of_the_tree() -> list[str]:
    return [
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    ]


def test_the_error_page_names_every_error() -> None:
    page = names("errors.md")
    assert [name for name in errors_of_the_tree() if f"`{name}`" not in page and f"hookmap.{name}`" not in page] == []


def prose(file: Path) -> str:
    """What a person reads: a page, or the docstrings and comments of a module."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return text
    comments = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    return "\n".join(comments + found)


def is_there(dotted: str) -> bool:
    """Whether `.package.module.name` is a module, or a name that its module's text holds."""
    place = PACKAGE
    for part in dotted.strip(".").split("."):
        if place.is_dir() and (place / part).is_dir():
            place /= part
        elif place.is_dir() and (place / f"{part}.py").is_file():
            place = place / f"{part}.py"
        else:
            return part in (place / "__init__.py" if place.is_dir() else place).read_text(encoding="utf-8")
    return True


@pytest.mark.slow
def test_every_file_and_module_that_a_text_names_is_there() -> None:
    """A file's path starts at the repository, at hookmap/, or beside the module whose docstring names it."""
    wrong = []
    for text in TEXTS + CODE:
        said = prose(text)
        starts = (CHECKOUT, PACKAGE, *([text.parent] if text.suffix == ".py" else []))
        wrong += [
            f"{text.relative_to(CHECKOUT)}: {name}"
            for name in sorted(set(FILE_NAME.findall(said)))
            if not any((start / name).exists() for start in starts)
        ]
        wrong += [
            f"{text.relative_to(CHECKOUT)}: hookmap{name}"
            for name in sorted(set(DOTTED_NAME.findall(said)))
            if name.rpartition(".")[2] not in OTHER_SUFFIXES and not is_there(name)
        ]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.slow
def test_the_site_builds_offline_and_strictly_and_asks_no_other_machine(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='pip install "hookmap[docs]"')
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {file: file.read_text(encoding="utf-8") for file in tmp_path.rglob("*.html")}
    elsewhere = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"?https?:[^ >]*")
    assert [found for text in built.values() for found in elsewhere.findall(text)] == []
    commands = built[tmp_path / "reference" / "commands.html"]
    assert [name for name in main.list_commands(click.Context(main)) if f"hookmap {name}" not in commands] == []
    python = built[tmp_path / "reference" / "python.html"]
    assert [name for name in hookmap.__all__ if name != "__version__" and f'id="hookmap.{name}"' not in python] == []


def test_the_python_reference_has_every_module_that_the_docs_import_from() -> None:
    sys.path.insert(0, str(CHECKOUT / "scripts"))
    try:
        import docs_pages
    finally:
        sys.path.pop(0)
    code = "\n".join(block for page in PAGES for block in shown(page, "python"))
    named = set(re.findall(r"^ *from hookmap\.(\S+) import", code, flags=re.MULTILINE))
    assert named - {name for names in docs_pages.MODULES.values() for name in names} == set()
