"""Writes in a thread, so that the model goes on while the disk writes.

The bytes that wait are bounded: the caller waits only when the disk stays behind for longer. What is on disk is what
the writer alone would have written, because it gets the same calls in the same order.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping, Set
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from hookmap.activations import Activation, Sample, size_of
from hookmap.errors import StoreError
from hookmap.stores.closing import Closing

if TYPE_CHECKING:
    from hookmap.stores.folder import FolderWriter
    from hookmap.stores.whole_writer import WholeWriter

IN_FLIGHT = 16 * 2**20
"""bytes of rows that may wait for the disk"""
AT_ONCE = 32
"""rows are handed over once they fill 1/AT_ONCE of that: waking the thread for each token would cost more"""


class _Mark(NamedTuple):
    """How far the caller, or the thread, has come."""

    calls: int = 0
    bytes: int = 0


class _Work(NamedTuple):
    calls: list[Callable[[], None]]
    mark: _Mark
    """how far the thread has come after them"""


class _End(NamedTuple):
    """The last work: close the writer."""

    finished: bool


class BackgroundWriter(Closing):
    """A sink around another writer, which it owns from then on. Use it in a `with` statement, from one thread.

    An error of the writer is raised at the caller's next call and at each later one, or at the end of the `with`
    statement. Leaving the statement by an exception still writes what was handed over: a finished sample stays
    finished. However often the end is interrupted, the thread completes it, and nothing else touches the folder.
    """

    # An interrupt may fall between any two lines of the caller. So the two sides share no lock that it could leave
    # shut, only what C makes atomic: a queue, a reference to a mark, and a bell, which is a lock that the thread opens.
    # The end of the thread is also signalled: Python 3.11 reports a thread as dead after an interrupted `join`.

    def __init__(self, writer: "FolderWriter | WholeWriter", in_flight: int = IN_FLIGHT) -> None:
        """`in_flight`: bytes of rows that may wait; a piece that is larger waits alone."""
        self._writer = writer
        self._in_flight = in_flight
        self._work: SimpleQueue[_Work | _End | None] = SimpleQueue()
        self._held: list[Callable[[], None]] = []
        self._held_bytes = 0
        self._handed = self._done = _Mark()
        self._error: BaseException | None = None
        self._closed = self._ended = False
        self._bell = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"writer of {writer.folder}", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # Ctrl-C while it starts: nobody would end it, and the folder would stay locked
            self._work.put(None)  # if it runs, it ends; and it has nothing to write, so the writer is ours
            with contextlib.suppress(StoreError):
                writer.close(finished=False)
            raise

    @property
    def finished(self) -> Set[int]:
        """Numbers of the samples that are committed, all that was handed over being written. Raises StoreError."""
        self.wait()
        return self._writer.finished

    def write(self, activation: Activation) -> None:
        """Take rows, whose memory must not change from then on. Raises the error of an earlier call."""
        self._hold(lambda: self._writer.write(activation), size_of(activation.tensor))
        if self._held_bytes * AT_ONCE >= self._in_flight:
            self._hand_over()

    def finish(self, sample: Sample) -> None:
        """Note that the sample has all its rows. Raises as `write` does."""
        self._hold(lambda: self._writer.finish(sample))
        self._hand_over()

    def abandon(self) -> None:
        """Forget the rows of samples that are not committed; returns when that is done. Raises as `write` does."""
        self._hold(self._writer.abandon)
        self.wait()

    def note(self, run: Mapping[str, Any]) -> None:
        """See FolderWriter's `note`. Raises as `write` does."""
        self._hold(lambda: self._writer.note(run))

    def wait(self) -> None:
        """Return when the writer has taken all that was handed over. Raises as `write` does."""
        self._hand_over()
        while self._done.calls < self._handed.calls:
            self._bell.acquire()
        self._tell()

    def close(self, finished: bool) -> None:
        """Write what waits and close the writer. Only the first call decides how.

        With `finished`, raises as the writer's `close` and `write` do.
        """
        if not self._closed:
            self._give()  # there may be no room: an interrupt while waiting for it would leave the thread without end
        self._closed = True
        self._work.put(_End(finished))
        while not self._ended:  # interrupted here, `with` closes once more and so waits again
            self._bell.acquire()
        if finished:
            self._tell()

    def _hold(self, call: Callable[[], None], size: int = 0) -> None:
        self._tell()
        if self._closed:
            raise StoreError(f"{self._writer.folder} is closed: resume it to write more.")
        self._held.append(call)
        self._held_bytes += size

    def _hand_over(self) -> None:
        """Give the thread what is held, once there is room for it. Raises the writer's error."""
        while self._in_hand + self._held_bytes > self._in_flight and self._done.calls < self._handed.calls:
            self._bell.acquire()
        self._tell()
        self._give()

    def _give(self) -> None:
        if self._held:
            mark = _Mark(self._handed.calls + len(self._held), self._handed.bytes + self._held_bytes)
            work = _Work(self._held, mark)
            self._held, self._held_bytes = [], 0
            self._work.put(work)
            self._handed = mark

    @property
    def _in_hand(self) -> int:
        """Bytes that the thread was given and has not written."""
        return self._handed.bytes - self._done.bytes

    def _tell(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while isinstance(work := self._work.get(), _Work):
                for call in work.calls:
                    self._try(call)
                self._done = work.mark
                call = work = None  # type: ignore[assignment]  # or their rows would stay until the next ones come
                self._ring()
            if work is not None:
                self._end(work.finished)
        finally:
            self._ended = True
            self._ring()

    def _end(self, finished: bool) -> None:
        """Close the writer as finished, or, where that or anything before it failed, as unfinished."""
        if finished:
            self._try(lambda: self._writer.close(finished=True))
        if not finished or self._error is not None:
            with contextlib.suppress(StoreError):  # the first error is the one to tell; the folder is valid as it is
                self._writer.close(finished=False)

    def _try(self, call: Callable[[], None]) -> None:
        """Make the call, unless an earlier one failed: then nothing more is written."""
        if self._error is None:
            try:
                call()
            except BaseException as error:
                self._error = error

    def _ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # nobody has listened since it rang last
            self._bell.release()
