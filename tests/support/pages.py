"""A page of the docs as a session: every block runs, from top to bottom, in a folder of its own.

```python           runs, all of a page in one namespace; ```text behind it is what it prints, or the error it ends with
```console          each line behind `$ ` is a command, the lines below it are what it prints, `…` is what is left out
```sh               commands whose output is not shown
```yaml title="F"   (or json, …) is what stands in the file F
<!-- not run: why --> above a block: it does not run, but its hookmap commands are parsed, and its Python is compiled
<!-- not run: needs the real model --> blocks of a page are a session by themselves: Session(…, real=True)

hookmap's commands run in this process; with a last `&` one runs beside until the page ends. Port 8000 is any free one:
its server is given `--port 8000`.
"""

import contextlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from types import CodeType
from typing import Any

import click
from click.testing import CliRunner
from support.ports import free_port

from hookmap.cli.main import main

CHECKOUT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<not_run>[^\n]+) -->\n)?"
    r'^```(?P<language>\w*)(?: title="(?P<file>\S+)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
REAL = "needs the real model"
NUMBER = r"\d+\.\d+(?:e[-+]\d+)?"
# What each run has of its own: times, memory, versions, ids, the spaces that line a table up.
VARIES = (r"\d[\d.]* s\b", r"\d[\d.]* [MG]B", r"\d[\d.]* kB on disk", r"\d+\.\d+\.\d+\w*", r"\b[0-9a-f]{12,}\b", r"\s+")
PIECE = re.compile("(" + "|".join(("…", *VARIES, NUMBER)) + ")")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    line: int
    """where its fence is"""
    language: str
    text: str
    file: str | None
    """the file whose text it shows"""
    not_run: str | None
    """why it does not run"""


def blocks(page: str) -> list[Block]:
    """In their order. Raises AssertionError where a fence or a mark is of another form than those above."""
    found = [Block(1 + page.count("\n", 0, one.start("language")), **one.groupdict()) for one in FENCE.finditer(page)]
    assert len(re.findall("^ *```", page, re.MULTILINE)) == 2 * len(found), "a fence of another form"
    assert page.count("<!-- not run") == sum(block.not_run is not None for block in found), "a mark above no block"
    return found


def of_the_real_model(page: Sequence[Block]) -> Iterator[Block]:
    """The blocks that need the real model, and what they print, as blocks that run."""
    wanted = False
    for block in page:
        wanted = block.not_run == REAL or (wanted and block.language == "text" and not block.not_run)
        if wanted:
            yield replace(block, not_run=None)


def agree(shown: str, printed: str) -> bool:
    """Whether a page may show this of that output. Decimal numbers may differ by one in the last digit, or 0.0001."""
    pattern, numbers = "", []
    for place, piece in enumerate(PIECE.split(shown.strip())):
        kind = next((kind for kind in VARIES if re.fullmatch(kind, piece)), None)
        if place % 2 == 0:
            pattern += re.escape(piece)
        elif piece == "…":
            pattern += ".*?"
        elif kind:
            pattern += kind
        else:
            pattern += f"({NUMBER})"
            numbers.append(Decimal(piece))
    found = re.fullmatch(pattern, printed.strip(), re.DOTALL)
    return found is not None and all(map(near, numbers, map(Decimal, found.groups())))


def near(shown: Decimal, printed: Decimal) -> bool:
    last_digit = Decimal(1).scaleb(int(shown.as_tuple().exponent))
    return abs(shown - printed) <= max(last_digit, Decimal("0.0001"))


def parse(line: str) -> None:
    """Raises click.UsageError where the line is a hookmap command and is not understood."""
    _, (program, *words) = words_of(line)
    command: click.Command | None = main
    if program != "hookmap":
        return
    while isinstance(command, click.Group) and words:
        _, command, words = command.resolve_command(click.Context(command), words)
    assert command is not None
    command.make_parser(click.Context(command)).parse_args(words)  # no more: files that it names are not there


def words_of(line: str) -> tuple[dict[str, str], list[str]]:
    """The variables that a command begins with, and its words."""
    words = shlex.split(line, comments=True)
    count = next((place for place, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


class Session:
    """What the blocks of a page share: names, variables, what runs beside. The working folder is the page's own."""

    def __init__(self, name: str, page: str, *, real: bool = False) -> None:
        """real: of the blocks that need the real model, and no others."""
        self.port = free_port()
        self.name, self.blocks = name, blocks(re.sub(r"(:|port )8000", rf"\g<1>{self.port}", page))
        if real:
            self.blocks = list(of_the_real_model(self.blocks))
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.variables = {"PYTHONPATH": str(CHECKOUT)}
        self.beside: list[subprocess.Popen[str]] = []
        self.printed: str | None = ""
        """by the last block of python; None where it did not run"""

    def run(self) -> None:
        """Raises at the first block that is not as the page shows it."""
        try:
            for block, after in zip(self.blocks, [*self.blocks[1:], None], strict=False):
                self.one(block, after is not None and after.language == "text")
        finally:
            for process in self.beside:
                process.terminate()
                process.communicate(timeout=120)

    def one(self, block: Block, text_follows: bool) -> None:
        if block.language == "text" and not block.not_run:
            if self.printed is not None:
                self.check(block, block.text, self.printed)
            return
        self.printed = None if block.not_run else ""
        if block.language in ("sh", "console"):
            (self.parsed if block.not_run else self.shell)(block)
        elif block.not_run:
            if block.language == "python":
                self.compiled(block)
        elif block.language == "python":
            self.printed = self.python(block, text_follows)
        else:
            assert block.file, f"{self.name}:{block.line}: no language that runs, no file's title, no mark `not run`"
            file = Path(block.file)
            file.parent.mkdir(exist_ok=True)
            file.write_text(block.text, encoding="utf-8")

    def check(self, block: Block, shown: str, printed: str) -> None:
        """Files are named as from the checkout, or from the page's folder."""
        printed = printed.replace(f"{CHECKOUT}/", "").replace(f"{Path.cwd()}/", "")
        assert agree(shown, printed), f"{self.name}:{block.line} shows\n\n{shown}\nand what comes is\n\n{printed}"

    def python(self, block: Block, may_raise: bool) -> str:
        """What it prints, and the error that it ends with."""
        out = io.StringIO()
        code = self.compiled(block)
        try:
            with contextlib.redirect_stdout(out):
                exec(code, self.names)  # noqa: S102 - the page is ours
        except Exception as error:
            if not may_raise:
                raise
            out.write("".join(traceback.format_exception_only(error)))
        return out.getvalue()

    def compiled(self, block: Block) -> CodeType:
        return compile("\n" * block.line + block.text, self.name, "exec", dont_inherit=True)

    def parsed(self, block: Block) -> None:
        for line, _ in steps(block):
            parse(line)

    def shell(self, block: Block) -> None:
        for line, shown in steps(block):
            code, printed = self.command(line)
            if shown is not None:
                self.check(block, shown, printed)
            assert code == 0 or "error:" in (shown or "").lower(), f"{self.name}:{block.line}: {line}\n\n{printed}"

    def command(self, line: str) -> tuple[int, str]:
        """Its exit code, and what it prints on stdout and stderr."""
        variables, words = words_of(line)
        if words[0] == "export":
            self.variables |= words_of(line.removeprefix("export "))[0]
        elif words[-1] == "&":
            self.start(line.rstrip("& "))
        elif words[0] == "hookmap":
            done = CliRunner().invoke(main, words[1:], prog_name="hookmap", env=self.variables | variables)
            return done.exit_code, done.output
        else:
            process = self.process(line)
            printed, _ = process.communicate()
            return process.returncode, printed
        return 0, ""

    def process(self, line: str) -> "subprocess.Popen[str]":
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **self.variables, "PATH": path}
        return subprocess.Popen(
            ["bash", "-c", line], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def start(self, server: str) -> None:
        """Runs beside what follows; returns when it listens."""
        process = self.process(f"exec {server} > .log 2>&1")
        self.beside.append(process)
        end = time.monotonic() + 120
        while not listens(self.port):
            assert process.poll() is None and time.monotonic() < end, Path(".log").read_text(encoding="utf-8")
            time.sleep(0.1)


def listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def steps(block: Block) -> list[tuple[str, str | None]]:
    """The commands of a shell block, each with what is shown of it; None where that is nothing."""
    text = block.text.replace("\\\n", "")
    if block.language == "sh":
        return [(line, None) for line in text.splitlines() if line.strip()]
    assert text.startswith("$ "), text
    found = [step.partition("\n") for step in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]
    return [(line, shown) for line, _, shown in found]
