"""Lets the model go on while the disk writes: a thread hands rows to a writer, in the order in which they came.

What waits is bounded in bytes; only when the disk stays behind for longer does the caller wait. The bytes on disk are
those of the writer alone, since it sees the same calls in the same order.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

from hookmap.activations import Activation, Sample
from hookmap.errors import StoreError
from hookmap.stores.folder import FolderWriter

IN_FLIGHT = 16 * 2**20
"""bytes of rows that may wait for the disk"""


class _Call(NamedTuple):
    run: Callable[[], None]
    bytes: int


class BackgroundWriter:
    """A sink around a FolderWriter, which belongs to it from then on. Use it in a `with` statement, as that one.

    An error of the writer reaches the caller at its next call, or at the end of the `with` statement; the same error,
    each time. Leaving by an exception still writes what was handed over: a sample that was finished stays finished.
    """

    def __init__(self, writer: FolderWriter, in_flight: int = IN_FLIGHT) -> None:
        """`in_flight`: bytes of rows that may wait; a piece that is larger waits alone."""
        self._writer = writer
        self._in_flight = in_flight
        self._waiting: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._put = self._done = 0  # bytes, ever; the one is the caller's and the other the thread's
        self._busy = self._ending = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"writer of {writer.folder}", daemon=True)
        self._thread.start()

    @property
    def finished(self) -> frozenset[int]:
        """Numbers of the samples that are committed, all that was handed over being written. Raises StoreError."""
        self.wait()
        return self._writer.finished

    def write(self, activation: Activation) -> None:
        """Take rows; nobody may write to their memory any more. Raises what an earlier call met in the writer."""
        self._hand_over(_Call(lambda: self._writer.write(activation), activation.tensor.nbytes))

    def finish(self, sample: Sample) -> None:
        """All rows of this sample are handed over. Raises as `write` does."""
        self._hand_over(_Call(lambda: self._writer.finish(sample), 0))

    def abandon(self) -> None:
        """Forget the rows of samples that are not committed; returns when that is done. Raises as `write` does."""
        self._hand_over(_Call(self._writer.abandon, 0))
        self.wait()

    def note(self, run: Mapping[str, Any]) -> None:
        """See FolderWriter's `note`. Raises as `write` does."""
        self._hand_over(_Call(lambda: self._writer.note(run), 0))

    def wait(self) -> None:
        """Return when all that was handed over is with the writer. Raises as `write` does."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)
        self._tell()

    def close(self, finished: bool) -> None:
        """Write what waits and end the writing, as FolderWriter's `close` does. Raises as that one and `write` do."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join()  # interrupted here, `with` closes once more and so waits again
        if finished:
            self._tell()
        self._writer.close(finished)

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close(finished=True)
        finally:
            with contextlib.suppress(StoreError):  # the first error is the one to tell; the folder is valid as it is
                self.close(finished=False)

    def _hand_over(self, call: _Call) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(call.bytes))
            self._tell()
            if self._ending:
                raise StoreError(f"{self._writer.folder} is closed: resume it to write more.")
            self._put += call.bytes
            self._waiting.append(call)
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        idle = not self._waiting and not self._busy
        return idle or self._error is not None or self._put - self._done + size <= self._in_flight

    def _tell(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._ending)
                if not self._waiting:
                    return
                call = self._waiting.popleft()
                self._busy = True
            try:
                call.run()
                error = None
            except BaseException as met:
                error = met
            with self._changed:
                self._busy = False
                self._done += call.bytes
                if error is not None:
                    self._error = error
                    self._waiting.clear()
                self._changed.notify_all()
            del call  # or its rows would stay until the next ones come
            if error is not None:
                return
