"""Files that are not what their names say: Git LFS pointers, and GGUF files under other names."""

from collections.abc import Iterable
from pathlib import Path

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""which a pointer never has: three short lines"""


def why_no_file(path: Path) -> str:
    """What is wrong with a path that is not a file."""
    return f"{path} is a folder: expected a file." if path.is_dir() else f"{path}: there is no such file."


def is_pointer(path: Path) -> bool:
    """Whether this is a Git LFS pointer instead of the file's content."""
    try:
        if path.stat().st_size >= _POINTER_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def pointers(folder: Path, patterns: Iterable[str] = ("*",)) -> list[str]:
    """Names of the files in a folder that are pointers, sorted."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path.name for path in found if is_pointer(path))


def pointers_told(folder: Path, names: list[str]) -> str:
    """What is wrong with these files, and the command that fetches them."""
    shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    are = "is a Git LFS pointer, not the file" if len(names) == 1 else "are Git LFS pointers, not the files"
    return f"{shown} {are}: Git has not fetched the contents. Type: git -C {folder} lfs pull"


def is_gguf(file: str | Path) -> bool:
    """Whether this is a GGUF file: by its name, or its first bytes."""
    path = Path(file)
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as opened:
            return opened.read(4) == b"GGUF"
    except OSError:
        return False
