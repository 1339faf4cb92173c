"""Where a capture is read from: a folder here, or one that fsspec reaches (an object store, an archive, a server).

A remote folder answers as much of pathlib's Path as reading a capture needs. Reading only: captures are written here.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from hookmap.errors import StoreError


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of an fsspec file system."""

    system: Any
    path: str
    shown: str
    """as the user wrote it"""

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.system, f"{self.path.rstrip('/')}/{name}", f"{self.shown.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.shown

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.system, self.path.rpartition("/")[0], self.shown.rpartition("/")[0])

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:
        """The file; unbuffered, each read is one request for just these bytes. Raises FileNotFoundError, StoreError."""
        try:
            return self.system.open(self.path, mode, **({"cache_type": "none"} if buffering == 0 else {}))
        except FileNotFoundError:
            raise
        except KeyError as error:  # what zip says of a name that it does not have
            raise FileNotFoundError(self.shown) from error
        except Exception as error:  # each system has errors of its own: no rights, no network, no such bucket
            raise StoreError(f"cannot read {self}: {type(error).__name__}: {error}") from error

    def read_bytes(self) -> bytes:
        with self.open() as file:
            data: bytes = file.read()
        return data

    def exists(self) -> bool:
        return bool(self.system.exists(self.path))

    def is_dir(self) -> bool:
        return bool(self.system.isdir(self.path))

    def sizes(self) -> dict[str, int]:
        """Bytes of each file under this folder, by its name from here on."""
        found = self.system.find(self.path, detail=True)
        return {self._below(path): info["size"] or 0 for path, info in sorted(found.items())}

    def _below(self, path: str) -> str:
        return path.strip("/").removeprefix(self.path.strip("/")).strip("/")


Location: TypeAlias = Path | RemotePath


def location(where: "str | os.PathLike[str] | Location") -> Location:
    """A folder by its path, or by a URL that fsspec understands: `s3://…`, `memory://…`. Raises StoreError."""
    if isinstance(where, RemotePath):
        return where
    text = os.fspath(where)
    if "://" not in text:
        return local(text)
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:  # it names the package to install, or the protocols there are
        raise StoreError(f"cannot read {text}: {error}") from error
    except FileNotFoundError as error:  # of the archive
        raise StoreError(f"{text} is not a capture: there is no such file: {error}") from error
    return RemotePath(system, path.rstrip("/"), text)


def local(where: "str | os.PathLike[str]") -> Path:
    """A path of this machine. Raises StoreError for a name that no file system takes."""
    text = os.fspath(where)
    try:
        os.stat(text)
    except (UnicodeEncodeError, ValueError) as error:  # half a surrogate pair, a zero byte
        raise StoreError(f"{text!r} is no name of a file or folder: {error}. Give another one.") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise StoreError(f"{text[:80]}… is too long for a name here. Give a shorter one.") from error
    return Path(text)


@contextlib.contextmanager
def reading(path: Location, missing: StoreError | None = None) -> Iterator[None]:
    """Turn the system's errors of reading into StoreError. `missing`: the error where there is no file."""
    try:
        yield
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError | NotADirectoryError):
            raise missing from error
        raise StoreError(f"cannot read {path}: {error.strerror or error}.") from error


def sizes(folder: Location) -> dict[str, int]:
    """Bytes of each file under a folder, by its name from there on, with `/` between."""
    if isinstance(folder, RemotePath):
        return folder.sizes()
    with reading(folder):
        return dict(_sizes(os.fspath(folder), ""))


def _sizes(folder: str, name: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:  # pathlib takes five times as long, which shows with a million shards
        for entry in entries:
            if entry.is_dir():
                yield from _sizes(entry.path, f"{name}{entry.name}/")
            elif entry.is_file():
                yield f"{name}{entry.name}", entry.stat().st_size
