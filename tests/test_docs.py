"""The docs cannot drift: what they show runs, and what there is, they name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from hookmap import errors
from hookmap.cli.main import main
from hookmap.cli.settings import KEYS, load_settings

CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = sorted([CHECKOUT / "README.md", *(CHECKOUT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def names(page: str) -> str:
    return (CHECKOUT / "docs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_the_python_of_the_first_pages_runs_from_the_checkout(name: str, tmp_path: Path) -> None:
    page = CHECKOUT / name
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, script], cwd=CHECKOUT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_command_page_names_every_command() -> None:
    page = names("cli.md")
    for command in main.list_commands(click.Context(main)):
        assert f"`hookmap {command} " in page


def test_the_settings_file_of_the_docs_is_accepted_and_shows_every_key(tmp_path: Path) -> None:
    (example,) = blocks(CHECKOUT / "docs" / "cli.md", "yaml")
    (tmp_path / "hookmap.yaml").write_text(example, encoding="utf-8")
    assert set(load_settings(tmp_path)) == set(KEYS)


def test_the_error_page_names_every_error() -> None:
    page = names("errors.md")
    tree = [
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert [name for name in tree if f"`{name}`" not in page and f"hookmap.{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
