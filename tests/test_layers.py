"""Imports run one way: each package knows only those above it. Lazy imports and those for types count, too."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hookmap"
LEAVES = frozenset("errors activations documents extras placeholders wording _version demo".split())
ORDER = (
    "maps", "light", "datasets", "loading", "stores", "discovery", "verification", "sweep", "capture", "analysis",
    "metrics", "model", "vllm", "services", "evaluation", "cli",
)  # fmt: skip
"""what each room may know: the rooms before it, and the leaves"""
LONGEST = 400
"""lines of a file"""
AT_THE_ROOT = 12
"""files: what everybody knows, and the public modules"""


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module below `package`."""
    found = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that one module names in its import statements, wherever they stand."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name: write the whole one"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in known or node.module in known:
                    yield whole if whole in known else str(node.module)


@cache
def edges(package: Path) -> list[tuple[str, str]]:
    known = modules(package)
    return [(name, other) for name, file in known.items() for other in imported(name, file, known) if other != name]


def room(name: str) -> int:
    """Its place in the order: leaves before all, the package's own `__init__` and `__main__` after all."""
    below = name.split(".")[1:2]
    if not below or below == ["__main__"]:
        return len(ORDER)
    return -1 if below[0] in LEAVES else ORDER.index(below[0])


def upward(package: Path) -> list[str]:
    """The imports against the order. The command line may use the package as its users do."""
    return [
        f"{name} imports {other}"
        for name, other in edges(package)
        if room(other) > room(name) and not (other == package.name and room(name) == ORDER.index("cli"))
    ]


def circles(package: Path) -> list[list[str]]:
    """Groups of modules each of which comes back to itself; a package's own parts are no part of its `__init__`."""
    graph: dict[str, set[str]] = {name: set() for name in modules(package)}
    for name, other in edges(package):
        if other != package.name and not name.startswith(f"{other}."):
            graph[name].add(other)

    def reached(name: str) -> set[str]:
        found: set[str] = set()
        left = [name]
        while left:
            new = graph[left.pop()] - found
            found |= new
            left += new
        return found

    reach = {name: reached(name) for name in graph}
    groups = {tuple(sorted(o for o in reach[name] if name in reach[o])) for name in graph if name in reach[name]}
    return sorted(map(list, groups))


def test_no_import_goes_up() -> None:
    assert upward(PACKAGE) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(PACKAGE) == []


def test_verification_knows_discovery_in_one_place() -> None:
    """There it finds a map where none is given; no check knows how a map was found."""
    known = [pair for pair in edges(PACKAGE) if "verification" in pair[0] and "hookmap.discovery" in pair[1]]
    assert {name for name, _ in known} == {"hookmap.verification.subject"}


def test_every_module_has_a_room() -> None:
    rooms = {name.split(".")[1] for name in modules(PACKAGE) if "." in name}
    assert rooms <= {*LEAVES, *ORDER, "__main__"}


def test_the_root_holds_a_dozen_files() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= AT_THE_ROOT


def test_no_file_is_longer_than_a_reader_follows() -> None:
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in modules(PACKAGE).items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize(
    ("where", "text", "said"),
    [
        ("maps/a.py", "from hookmap.cli import b\n", "hookmap.maps.a imports hookmap.cli.b"),
        ("maps/a.py", "def f():\n    import hookmap.cli.b\n", "hookmap.maps.a imports hookmap.cli.b"),
        (
            "maps/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hookmap.cli.b import C\n",
            "hookmap.maps.a imports hookmap.cli.b",
        ),
        ("errors.py", "from hookmap.maps.a import x\n", "hookmap.errors imports hookmap.maps.a"),
    ],
)
def test_an_import_against_the_order_is_seen(tmp_path: Path, where: str, text: str, said: str) -> None:
    package = tmp_path / "hookmap"
    for name in ("maps/a.py", "cli/b.py", "errors.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("C = x = 1\n")
    (package / where).write_text(text)
    assert upward(package) == [said]


def test_a_circle_is_seen(tmp_path: Path) -> None:
    package = tmp_path / "hookmap"
    (package / "maps").mkdir(parents=True)
    (package / "maps" / "a.py").write_text("from hookmap.maps.b import x\n")
    (package / "maps" / "b.py").write_text("def f():\n    from hookmap.maps import a\n")
    assert circles(package) == [["hookmap.maps.a", "hookmap.maps.b"]]
