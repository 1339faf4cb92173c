"""The docs cannot drift: what they show runs, and gives what they show."""

import os
from pathlib import Path

import pytest
from pages import CHECKOUT, Session

PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]


@pytest.fixture(autouse=True)
def _a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the demo model where a checkout has it, and no settings of the person who runs the tests."""
    (tmp_path / "hookmap").symlink_to(CHECKOUT / "hookmap")
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("HOOKMAP_"):
            monkeypatch.delenv(name)


# inspect_ai's own calls of what its dependencies have deprecated; clients of the server page are left open.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs_and_prints_what_it_shows(page: Path) -> None:
    Session(page.name, page.read_text(encoding="utf-8")).run()
