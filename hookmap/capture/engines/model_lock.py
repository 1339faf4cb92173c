"""Who may run the model now. Runs that leave it as it is go side by side; one that changes it has it alone.

A trace of nnsight serves whatever runs meanwhile, whichever thread it is on, and a training flag is every thread's:
such runs are alone. Plain hooks that look at the thread they are on share the model.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn


class Turns:
    """A lock of one model: `shared` by many threads, or held `alone` by one, which may take it again."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._sharing: dict[int, int] = {}
        """thread -> how often it shares"""
        self._alone: int | None = None
        self._depth = 0
        self._queued = 0
        """threads that wait to be alone: who does not share yet lets them go first"""

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Others may share inside; nobody is alone."""
        me = threading.get_ident()
        with self._free:
            while self._alone not in (None, me) or (self._queued and me not in (*self._sharing, self._alone)):
                self._free.wait()
            self._sharing[me] = self._sharing.get(me, 0) + 1
        try:
            yield
        finally:
            with self._free:
                self._sharing[me] -= 1
                if not self._sharing[me]:
                    del self._sharing[me]
                self._free.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else runs inside."""
        me = threading.get_ident()
        with self._free:
            self._queued += 1
            try:
                while self._alone not in (None, me) or any(thread != me for thread in self._sharing):
                    self._free.wait()
            finally:
                self._queued -= 1
                self._free.notify_all()
            self._alone = me
            self._depth += 1
        try:
            yield
        finally:
            with self._free:
                self._depth -= 1
                if not self._depth:
                    self._alone = None
                    self._free.notify_all()


_turns: "weakref.WeakKeyDictionary[nn.Module, Turns]" = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def turns_of(module: nn.Module) -> Turns:
    """The turns that every run on these weights takes, while captures may run on other threads."""
    with _guard:
        return _turns.setdefault(module, Turns())
