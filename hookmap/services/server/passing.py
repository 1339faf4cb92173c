"""Computing in a thread that ends.

Each thread that computes has helpers of its own, OpenMP's, for as long as it lives. Where there are more of them than
cores, GNU's OpenMP lets them all sleep between any two operations, and a pass of a small model then takes up to twice
as long. So the thread of the batch that runs keeps its helpers, and all else computes in passing.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def in_passing(work: Callable[[], _T]) -> _T:
    """What `work` returns or raises, in a thread that ends with it."""
    found, wrong = list[_T](), list[BaseException]()

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=run, name=f"passing for {threading.current_thread().name}", daemon=True)
    thread.start()
    thread.join()
    if wrong:
        try:
            raise wrong[0]
        finally:
            wrong.clear()  # or the error would hold this frame, and this frame the error
    return found[0]
