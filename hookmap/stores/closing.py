"""What every writer of captures does at the end of a `with` statement."""

import contextlib
from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

from hookmap.errors import StoreError

Self = TypeVar("Self", bound="Closing")


class Closing(ABC):
    """Closes itself at the end of a `with` statement: as finished, or unfinished where an exception leaves it."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """End the writing; again, it does nothing. Raises StoreError."""

    def __enter__(self: Self) -> Self:
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
