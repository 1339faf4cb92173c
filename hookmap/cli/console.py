"""Notes, tables, spinners and progress bars for a person, on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


def console(stderr: bool = True) -> Console:
    """A console of the terminal's width; in a file or a pipe, wide enough for any table here."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=140)


@contextmanager
def working(what: str, quiet: bool = False, spinner: bool = True) -> Iterator[None]:
    """Show a spinner while the block runs, then how long it took. `spinner=False`: the work has its own bars."""
    screen, start = console(), perf_counter()
    if quiet:
        yield
        return
    if spinner:
        with screen.status(escape(what)):
            yield
    else:
        screen.print(f"[dim]{escape(what)} …[/]")
        yield
    screen.print(f"[dim]{escape(what)}: {perf_counter() - start:.1f} s[/]")


def progress() -> Progress:
    """Progress bars that vanish when the work is done. Nothing is shown if stderr is no terminal."""
    screen = console()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )


def table(*columns: str) -> Table:
    """A plain table; a column whose name starts with `>` is aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for column in columns:
        made.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return made


def size(count: float) -> str:
    """Bytes in words: 12_345_678 is "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
