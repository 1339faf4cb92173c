"""A session as one zip file, written while it is sent: `hookmap.open_store` reads what it unpacks to."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

PIECE = 2**20
"""bytes of a file that are in memory at once"""


def zipped(folder: Path, name: str) -> Iterator[bytes]:
    """The zip of a finished session, its files under a folder of this name, not compressed. Raises OSError."""
    out = _Pieces()
    with zipfile.ZipFile(cast(IO[bytes], out), "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.is_symlink():
                continue
            entry = zipfile.ZipInfo.from_file(path, f"{name}/{path.relative_to(folder).as_posix()}")
            with path.open("rb") as read, archive.open(entry, "w") as written:
                while piece := read.read(PIECE):
                    written.write(piece)
                    yield from out.taken()
            yield from out.taken()
    yield from out.taken()


class _Pieces(io.RawIOBase):
    """A file that is written only, and handed on in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def taken(self) -> Iterator[bytes]:
        """What was written since the last time."""
        pieces, self._pieces = self._pieces, []
        yield from pieces
