"""Sessions: capture folders under one root, one for each recorded request, with limits on their bytes and age.

A session is found by looking its id up among those that the server made: no path is built from a request.
"""

import contextlib
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hookmap.errors import HookmapError, StoreError
from hookmap.services.server.errors import ApiError, missing
from hookmap.stores import open_store
from hookmap.stores.durable_files import AppendedFile
from hookmap.stores.manifest import MANIFEST, Manifest, read_manifest
from hookmap.stores.reader import CaptureStore
from hookmap.stores.write_access import lock

_ID = re.compile(r"act-[0-9a-f]{32}")


@dataclass(frozen=True)
class About:
    """What a client finds its session by."""

    label: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    """the beginning of what was asked"""
    points: tuple[str, ...] = ()

    def fits(self, label: str | None, metadata: Collection[str]) -> bool:
        """Whether it has this label, and each of these `key:value`."""
        own = {f"{key}:{value}" for key, value in self.metadata.items()}
        return label in (None, self.label) and own.issuperset(metadata)


NOTHING = About()


@dataclass
class Session:
    """One recorded request."""

    id: str
    model: str | None
    created: float
    """seconds since 1970"""
    bytes: int
    """on disk; while the session is written, the most that it may take"""
    about: About = NOTHING
    finished: bool = False

    def described(self) -> dict[str, Any]:
        """As JSON."""
        state = "finished" if self.finished else "running"
        return {
            "id": self.id,
            "object": "activations.session",
            "model": self.model,
            "created": int(self.created),
            "bytes": self.bytes,
            "status": state,
            "label": self.about.label,
            "metadata": dict(self.about.metadata),
            "prompt": self.about.prompt,
            "points": list(self.about.points),
        }


class Sessions:
    """Makes, finds and removes sessions. Every method may be called from any thread."""

    def __init__(
        self,
        root: Path,
        total_bytes: int,
        max_age: float,
        clock: Callable[[], float] = time.time,
        most: int | None = None,
        free: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        """Finds the finished sessions of an earlier server, and removes those that it left unfinished. `most`: of them.

        `free`: bytes that the disk of a folder has left. Raises StoreError where another server uses the folder.
        """
        self._root, self._total, self._max_age, self._clock = root.absolute(), total_bytes, max_age, clock
        self._most, self._free = most, free
        self._lock = threading.RLock()
        self._sessions: dict[str, Session] = {}
        self._root.mkdir(parents=True, exist_ok=True)
        (self._root / ".server").touch()
        self._own = AppendedFile(self._root / ".server")
        lock(self._own, self._root, "--sessions")
        for folder in sorted(self._root.iterdir()):
            if _ID.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                self._found(folder)
        self.sweep()

    def close(self) -> None:
        """Release the folder for another server."""
        self._own.close()

    def begin(self, model: str | None, expected: int, about: About = NOTHING) -> tuple[Session, Path]:
        """A new session of at most `expected` bytes, and the path of its folder, which does not exist yet.

        Removes the oldest finished sessions to make room. Raises ApiError where that is not enough.
        """
        with self._lock:
            self.check_room(expected)
            self.sweep(expected)
            session = Session(f"act-{secrets.token_hex(16)}", model, self._clock(), expected, about)
            self._sessions[session.id] = session
            return session, self._root / session.id

    def check_room(self, expected: int) -> None:
        """Raises ApiError where not even the removal of all finished sessions makes room for so many bytes."""
        with self._lock:
            done = sum(session.bytes for session in self._sessions.values() if session.finished)
            used = sum(session.bytes for session in self._sessions.values()) - done
            held, free = f"{used} bytes are in use by running requests", self._free(self._root)
        again = {"Retry-After": "5"} if used else {}
        if used + expected > self._total:
            raise ApiError(
                503,
                f"no room for up to {expected} bytes of activations: of {self._total} bytes of sessions {held}. "
                "Try again, or keep less.",
                code="no_room",
                headers=again,
            )
        if used + expected > free + done:
            raise ApiError(
                503 if expected <= free + done else 507,
                f"no room for up to {expected} bytes of activations: the server's disk has {free} left, sessions that "
                f"may go have {done}, and {held}. Keep less, inline or none" + (", or try again." if used else "."),
                code="no_room",
                headers=again,
            )

    def end(self, session: Session) -> None:
        """Mark a session as finished: its folder is complete."""
        with self._lock:
            session.bytes, session.finished = _size(self._root / session.id), True
            self.sweep()

    def drop(self, session: Session) -> None:
        """Remove a session that failed, and what it wrote."""
        with self._lock:
            self._remove(session)

    def all(self) -> list[Session]:
        """All sessions, oldest first."""
        with self._lock:
            self.sweep()
            return sorted(self._sessions.values(), key=lambda session: session.created)

    def get(self, id: str) -> Session:
        """The session with this id. Raises ApiError where there is none."""
        with self._lock:
            self.sweep()
            session = self._sessions.get(id)
        if session is None:
            raise missing(
                "no session has this id: it was deleted, it was too old, or it never was.", "session_not_found"
            )
        return session

    def folder(self, id: str) -> Path:
        """The folder of a finished session. Raises ApiError."""
        session = self.get(id)
        if not session.finished:
            raise ApiError(409, f"session {session.id} is still being written.", code="session_running")
        return self._root / session.id

    @contextlib.contextmanager
    def reading(self, id: str) -> Iterator[CaptureStore]:
        """Open a finished session's store. Raises ApiError, also where the session is deleted meanwhile."""
        folder = self.folder(id)
        try:
            yield open_store(folder)
        except (StoreError, OSError):
            self.get(id)
            raise

    def delete(self, id: str) -> None:
        """Remove a finished session. Raises ApiError."""
        with self._lock:
            session = self.get(id)
            if not session.finished:
                raise ApiError(409, f"session {session.id} is still being written.", code="session_running")
            self._remove(session)

    def sweep(self, coming: int = 0) -> None:
        """Remove finished sessions that are too old, and the oldest ones until `coming` more bytes fit.

        The newest is removed only for a coming one: its manifest may exceed the limit, and an answer just named it.
        """
        with self._lock:
            finished = sorted((s for s in self._sessions.values() if s.finished), key=lambda s: s.created)
            for session in finished:
                old = self._clock() - session.created > self._max_age
                goes = coming > 0 or session is not finished[-1]
                used = sum(each.bytes for each in self._sessions.values())
                full = coming > 0 and self._unwritten() + coming > self._free(self._root)
                many = self._most is not None and len(self._sessions) + (coming > 0) > self._most
                if not old and not (goes and (many or full or used + coming > self._total)):
                    break  # all others are newer, and the room is the same for them
                self._remove(session)

    def _unwritten(self) -> int:
        """The most that running sessions may still take."""
        return sum(session.bytes for session in self._sessions.values() if not session.finished)

    def _remove(self, session: Session) -> None:
        self._sessions.pop(session.id, None)
        shutil.rmtree(self._root / session.id, ignore_errors=True)

    def _found(self, folder: Path) -> None:
        try:
            manifest = read_manifest(folder)
        except HookmapError:
            manifest = None
        if manifest is None or not manifest.finished:
            shutil.rmtree(folder, ignore_errors=True)
            return
        created = (folder / MANIFEST).stat().st_mtime
        about = about_of(manifest)
        self._sessions[folder.name] = Session(folder.name, manifest.model, created, _size(folder), about, finished=True)


SERVED = "served"
"""where the settings of a manifest say what its client called it"""


def about_of(manifest: Manifest) -> About:
    """What the manifest of a session says of it; nothing, where another program wrote that."""
    given = manifest.settings.get(SERVED, {})
    given = given if isinstance(given, dict) else {}
    label, metadata, prompt = (given.get(name) for name in ("label", "metadata", "prompt"))
    known = {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}
    points = tuple(dict.fromkeys(tensor.point for tensor in manifest.tensors))
    return About(label if isinstance(label, str) else None, known, prompt if isinstance(prompt, str) else "", points)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
