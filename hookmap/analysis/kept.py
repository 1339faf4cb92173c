"""A result that grows batch by batch, and the file that a killed run goes on from."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from hookmap.documents import Frozen, read_json
from hookmap.errors import HookmapError, StoreError
from hookmap.stores.durable_files import write_file, writing
from hookmap.stores.location import local, reading
from hookmap.stores.number_set import NumberSet

METADATA = "hookmap"
"""the entry of the file's metadata that holds the document"""
SECONDS = 60.0
"""between two files of a run that goes on"""


class Result(Protocol):
    """What grows."""

    samples: NumberSet
    """numbers of the samples that are in it"""
    complete: bool
    """whether every sample of the run is"""

    def identity(self) -> dict[str, Any]:
        """What a run has to have in common with it to go on with it, as plain data; of objects each entry is told."""


R = TypeVar("R", bound=Result)


class Kind(Generic[R]):
    """How one kind of result is a file in a folder: safetensors, whose metadata holds a document."""

    def __init__(
        self,
        file: str,
        name: str,
        make: str,
        document: type[Frozen],
        write: Callable[[R], tuple[Frozen, Mapping[str, torch.Tensor]]],
        read: Callable[[Any, dict[str, torch.Tensor]], R],
    ) -> None:
        """`name`: in words, plural. `make`: a command that makes one. `write`, `read`: a `document` and tensors of it.

        `read` may raise what a document or tensors that do not fit lead to.
        """
        self.file, self.name, self.make = file, name, make
        self._document, self._write, self._read = document, write, read

    def to_bytes(self, result: R) -> bytes:
        """The file's content."""
        document, tensors = self._write(result)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return bytes(save(plain, {METADATA: document.model_dump_json()}))

    def from_bytes(self, data: bytes, where: Any = "this file") -> R:
        """The result of a file's content. Raises StoreError that says what is wrong."""
        try:
            size = int.from_bytes(data[:8], "little")
            header = read_json(data[8 : 8 + size]) if size <= len(data) else {}
            text = (header.get("__metadata__") or {}).get(METADATA, "{}")
            return self._read(self._document.model_validate_json(text), load(data))
        except ValidationError as error:
            problems = "\n".join(f"  - {'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors()[:5])
            raise StoreError(f"{where} holds no {self.name}, or is broken:\n{problems}") from error
        except (SafetensorError, AttributeError, LookupError, ValueError, TypeError, HookmapError) as error:
            raise StoreError(f"{where} is broken: {error}. Copy it again, or make it anew: {self.make}") from error

    def save(self, result: R, folder: str | os.PathLike[str]) -> Path:
        """Write the folder's file, whole or not at all; the folder is made. Raises StoreError."""
        path, data = local(folder) / self.file, self.to_bytes(result)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, data)
        return path

    def open(self, folder: str | os.PathLike[str]) -> R:
        """What is in a folder, or in the file itself; complete or not. Raises StoreError."""
        path = local(folder)
        path = path / self.file if path.is_dir() else path
        if not path.is_file():
            raise StoreError(
                f"{folder} holds no {self.name}: there is no file {self.file}. Make them: {self.make} -o {folder}"
            )
        with reading(path):
            data = path.read_bytes()
        return self.from_bytes(data, path)

    def refuse_used(self, folder: str | os.PathLike[str]) -> None:
        """Raises StoreError where the folder holds some already, or is a file."""
        if local(folder).is_file():
            raise StoreError(f"{folder} is a file: expected a new folder. Write to another one: -o DIR")
        if (local(folder) / self.file).exists():
            raise StoreError(
                f"{folder} already holds {self.name}. Go on with them (resume=True, --resume), or write to another "
                "folder: -o DIR"
            )


class Kept(Generic[R]):
    """A result of a run, and the folder that it is written to now and then, where there is one."""

    def __init__(self, result: R, kind: Kind[R], store: str | os.PathLike[str] | None, resume: bool) -> None:
        """Raises StoreError: no folder to go on with, one that is used, one of another run, one that takes nothing."""
        if resume and store is None:
            raise StoreError("resume=True needs the folder to go on with: give store=FOLDER.")
        self.result, self._kind, self._store, self._written = result, kind, store, time.monotonic()
        if store is not None and resume:
            self.result = self._resumed(result, store)
        elif store is not None:
            kind.refuse_used(store)
            kind.save(result, store)  # a folder that cannot be written to is known before the model runs

    def now_and_then(self) -> None:
        """Write, where the last time was a minute ago."""
        if self._store is not None and time.monotonic() - self._written > SECONDS:
            self._kind.save(self.result, self._store)
            self._written = time.monotonic()

    def end(self, samples: int) -> R:
        """Write; the result is complete where it has so many samples."""
        self.result.complete = len(self.result.samples) == samples
        if self._store is not None:
            self._kind.save(self.result, self._store)
        return self.result

    def _resumed(self, run: R, store: str | os.PathLike[str]) -> R:
        found = self._kind.open(store)
        here, now = (dict(_each(of.identity())) for of in (found, run))
        lines = [
            f"  - {name}: the folder has {here.get(name)!r:.200}, this run has {now.get(name)!r:.200}"
            for name in dict.fromkeys((*here, *now))
            if here.get(name) != now.get(name)
        ]
        if lines:
            raise StoreError(f"{store} is of another run:\n" + "\n".join(lines) + "\nWrite to another folder: -o DIR")
        return found


def _each(identity: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries, and those of objects one by one: `settings.dtype`."""
    for name, value in identity.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", own) for key, own in value.items())
        else:
            yield name, value
