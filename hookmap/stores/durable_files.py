"""Files that appear whole or not at all, and appended lines that a crash cannot take back."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, TypeVar

from hookmap.errors import StoreError

Result = TypeVar("Result")


def temporary(path: Path) -> Path:
    """The name under which `path` is written until it is whole: in the same folder, so that the rename is atomic."""
    return path.with_name(f".{path.name}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a leftover of a write that did not end."""
    return name.startswith(".") and name.endswith(".tmp")


@contextlib.contextmanager
def writing(path: "str | Path") -> Iterator[None]:
    """Turn the system's errors of writing into StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}.") from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_draft(path: Path, views: Iterable["bytes | bytearray | memoryview"]) -> None:
    """Write all of these, one after the other, to the temporary file of `path`, which an exception removes."""
    draft = temporary(path)
    try:
        with open(draft, "wb", buffering=0) as file:
            for view in views:
                write_all(file, view)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def put_in_place(path: Path) -> None:
    """Make the temporary file of `path` durable and give it its name, which is durable once its folder is.

    An exception removes the temporary file; what was at `path` before is untouched.
    """
    draft = temporary(path)
    try:
        with open(draft, "rb+", buffering=0) as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Make `data` the content of a file, whole or not at all, and durable."""
    write_draft(path, [data])
    put_in_place(path)
    sync_folder(path.parent)


def beside(work: Callable[[], Result]) -> "Future[Result]":
    """Do this in a thread of its own, while the caller goes on."""
    done = Future[Result]()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="beside a writer", daemon=True).start()
    return done


def write_durably(path: Path, data: "bytes | bytearray") -> None:
    """Write a file that nobody reads yet. Its name is durable once that of a later `write_file` in its folder is."""
    with open(path, "wb", buffering=0) as file:
        write_all(file, data)
        os.fsync(file.fileno())


def write_all(file: BinaryIO, data: "bytes | bytearray | memoryview") -> None:
    """Write all of `data` to an unbuffered file: one system call may take only a part."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


class AppendedFile:
    """A file that grows by whole pieces: the first `size` bytes are complete, whatever an error left after them."""

    def __init__(self, path: Path) -> None:
        """Open an existing file; its present bytes count until `cut` says otherwise."""
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        self.size = os.fstat(self._file.fileno()).st_size

    def cut(self, size: int) -> None:
        """Truncate the file after the first `size` bytes."""
        self._file.truncate(size)
        self.size = size

    def append(self, data: bytes) -> None:
        """Add `data` durably. Raises OSError (a full disk); `cut` then removes what was written of it."""
        self._file.seek(self.size)
        write_all(self._file, data)
        os.fsync(self._file.fileno())
        self.size += len(data)

    def fileno(self) -> int:
        """The file's descriptor, for a lock."""
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
