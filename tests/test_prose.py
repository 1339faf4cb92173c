"""How the pages are written: short sentences. What proselint finds is in `make check` (pyproject.toml)."""

import re

import pytest
from support.pages import CHECKOUT

FOUND = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
MADE = re.compile(r"-table\.md|pads\.md|comparison\.md")  # by programs, of what they found
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in FOUND if not MADE.search(page.name)}
MOST_WORDS = 40
"""of a sentence; half of them have less than 15"""


def paragraphs(page: str) -> list[str]:
    """The running text: no code, tables, headings, pictures and comments; of a list each item by itself."""
    page = re.sub(r"^```.*?^```$|<!--.*?-->|^    .*?$", "", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"^(\||#|!\[|<|-{3}).*$", "", page, flags=re.MULTILINE)
    page = re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", page, flags=re.MULTILINE)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", page) if part.strip()]


def sentences(page: str) -> list[str]:
    plain = [re.sub(r"`[^`]*`", "`code`", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", part)) for part in paragraphs(page)]
    return [one for part in plain for one in re.split(r"(?<=[.!?])[)*\"]* |(?<=[:;]) (?=[A-Z`*(\"0-9])", part)]


def words(sentence: str) -> int:
    return len(re.findall(r"[\w`'-]*\w[\w`'-]*", sentence))


@pytest.mark.parametrize("name", TEXTS)
def test_a_sentence_is_short(name: str) -> None:
    assert [one for one in sentences(TEXTS[name]) if words(one) > MOST_WORDS] == []
