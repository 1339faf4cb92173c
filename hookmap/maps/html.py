"""Small HTML tables, as Jupyter shows maps, captures and stores. Everything in them is escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

SHOWN_TEXT = 160
"""characters of a prompt or an answer"""


def page(title: str, *tables: str) -> str:
    """A title, which may be a `repr` in angle brackets, above tables."""
    return f"<p><b>{escape(title.strip('<>'))}</b></p>" + "".join(tables)


def short(text: str) -> str:
    """The text, cut to what a cell shows."""
    return text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 1] + "…"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """One table with a line for each of `rows`."""

    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag} style='text-align:left'>{escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(each, "td") for each in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"
