"""What a person reads: notes, tables, spinners and progress bars, on stderr."""

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
    """A terminal has its own width; a file or a pipe gets lines that are wide enough for any table here."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=140)


@contextmanager
def working(what: str, quiet: bool = False, spinner: bool = True) -> Iterator[None]:
    """A spinner while the block runs, then how long it took; no spinner where the work has bars of its own."""
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
    """A bar for work whose length is known. Gone when done; the summary stays. None where stderr is no terminal."""
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
    """A plain table; columns whose name starts with `>` are numbers, set to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for column in columns:
        made.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return made


def size(count: float) -> str:
    """12_345_678 bytes -> "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
