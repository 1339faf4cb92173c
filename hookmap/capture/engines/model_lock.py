"""A lock for each model. Runs that leave the model unchanged share it; a run that changes it holds it exclusively.

A trace of nnsight sees every forward pass, on any thread, and the training flag belongs to all threads: such runs
are exclusive. Plain hooks ignore other threads' passes, so their runs share the model.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn


class ModelLock:
    """A reentrant lock that many threads share or one thread holds exclusively."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._shares: dict[int, int] = {}
        """thread -> how many times it shares the lock"""
        self._owner: int | None = None
        """the thread that holds the lock exclusively"""
        self._depth = 0
        self._waiting = 0
        """threads that wait to hold the lock exclusively; threads that do not share it yet let them go first"""

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock together with other threads."""
        me = threading.get_ident()
        with self._changed:
            while self._owner not in (None, me) or (self._waiting and me not in (*self._shares, self._owner)):
                self._changed.wait()
            self._shares[me] = self._shares.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._shares[me] -= 1
                if not self._shares[me]:
                    del self._shares[me]
                self._changed.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock while no other thread does."""
        me = threading.get_ident()
        with self._changed:
            self._waiting += 1
            try:
                while self._owner not in (None, me) or any(thread != me for thread in self._shares):
                    self._changed.wait()
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            self._owner = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._owner = None
                    self._changed.notify_all()


_locks: "weakref.WeakKeyDictionary[nn.Module, ModelLock]" = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def lock_of(module: nn.Module) -> ModelLock:
    """The lock that every run of this model takes."""
    with _guard:
        return _locks.setdefault(module, ModelLock())
