"""The file that a sweep writes while it runs, so that a killed one goes on: a line for each batch of values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hookmap.errors import StoreError
from hookmap.stores.durable_files import AppendedFile, writing

_FORMAT = "hookmap-sweep"


class SweepFile:
    """Values of jobs, each durable once `add` returns."""

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], resume: bool) -> None:
        """`settings`: plain data, all that decides the values. Raises StoreError where the file is another sweep's."""
        self.path = Path(path)
        self.found: dict[int, float] = {}
        """job -> value, of the runs before"""
        head = json.dumps({"format": _FORMAT, "version": 1, "settings": settings}, sort_keys=True).encode() + b"\n"
        with writing(self.path):
            if self.path.exists() and self.path.stat().st_size and not resume:
                raise StoreError(
                    f"{self.path} is there already: go on with it, resume=True (--resume), or name another."
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            self._file = AppendedFile(self.path)
        try:
            self._read(head)
        except BaseException:
            self._file.close()
            raise

    def add(self, jobs: Sequence[int], values: Sequence[float]) -> None:
        """Write what one batch gave. Raises StoreError."""
        with writing(self.path):
            self._file.append(json.dumps({"jobs": jobs, "values": values}).encode() + b"\n")

    def close(self) -> None:
        self._file.close()

    def _read(self, head: bytes) -> None:
        """Takes the whole lines that are there; one that a kill cut short is written again."""
        data = self.path.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        with writing(self.path):
            self._file.cut(sum(map(len, lines)))
            if not lines:
                self._file.append(head)
                return
        if lines[0] != head:
            raise StoreError(
                f"{self.path} is {self._difference(lines[0], head)}: a sweep goes on with the same model, prompts and "
                "options alone. Name another file."
            )
        for number, line in enumerate(lines[1:], start=2):
            try:
                batch = json.loads(line)
                self.found.update(zip(batch["jobs"], map(float, batch["values"]), strict=True))
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(f"{self.path}, line {number}: no values of a sweep ({error}).") from error

    def _difference(self, line: bytes, head: bytes) -> str:
        try:
            theirs, ours = (json.loads(each) for each in (line, head))
            if theirs["format"] != _FORMAT:
                raise KeyError("format")
            other = [name for name, value in ours["settings"].items() if theirs["settings"].get(name) != value]
        except (ValueError, KeyError, TypeError):
            return "no file of a sweep"
        return f"of a sweep that differs in {', '.join(other) or 'its version'}"
