"""How something of hookmap is retired: it goes on working for a while, and says what takes its place."""

import sys
import warnings


class HookmapDeprecationWarning(FutureWarning):
    """A later version of hookmap will not have this; the message names that version and what to write instead.

    A FutureWarning, and no DeprecationWarning: Python shows the latter only where the main script itself is concerned.
    `warnings.simplefilter("error", hookmap.HookmapDeprecationWarning)` makes it an error.
    """


def deprecated(what: str, instead: str, gone_in: str) -> None:
    """Warn, at the line outside hookmap that asked for it.

    what: as the user wrote it; instead: what to write in its place; gone_in: the version that will not have it.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "hookmap":
        frame, level = frame.f_back, level + 1
    message = f"{what} will be gone in hookmap {gone_in}. Write {instead} instead."
    warnings.warn(message, HookmapDeprecationWarning, stacklevel=level)
