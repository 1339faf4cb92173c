"""The checksum of bytes that are being written, computed beside the disk's work."""

import hashlib
import threading
from queue import Queue

WAITING = 16
"""views that wait to be hashed, at most: the writer waits then"""


class Sha256Beside:
    """SHA-256 in a thread of its own, from the start of a `with` statement to its end.

    Hashing takes about as long as writing and syncing does, and both leave Python's lock to others.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._views: Queue[bytes | memoryview | None] = Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="hashing", daemon=True)

    def update(self, view: bytes | memoryview) -> None:
        """Add bytes, which must not change before the end of the statement."""
        self._views.put(view)

    def hexdigest(self) -> str:
        """Of all bytes, behind the statement."""
        return self._digest.hexdigest()

    def __enter__(self) -> "Sha256Beside":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._views.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (view := self._views.get()) is not None:
            self._digest.update(view)
