"""The one error tree. The command line prints the message; a traceback is for `--debug`.

    HookmapError
    ├── ModelError                  the model cannot be found, built or loaded
    │   └── TokenizerError          its tokenizer cannot
    ├── DataError                   a data set of prompts cannot be read
    ├── DiscoveryError              the dataflow has no structure that hookmap understands
    ├── MapError                    a map document is broken
    │   ├── MapNotFoundError        no map file and no shipped map
    │   └── MapMismatchError        the map contradicts the model in front of it
    ├── SelectionError              unknown points, layers out of range, unavailable points: all of them
    ├── CaptureError                a run did not see what its selectors promise
    ├── InterventionError           a point cannot be written, or not with what was given
    ├── StoreError                  a capture folder is missing, broken, full or of another run
    └── DeployError                 a host is not reached, or no server comes up there

Every message says what, where, what was expected and what was found, and ends with the next thing to type.
Below the tree stands the one warning: what is retired goes on working for a while, and says what takes its place.
"""

import sys
import warnings


class HookmapError(Exception):
    """Everything that hookmap raises on purpose."""


class ModelError(HookmapError):
    """The model cannot be found, built or loaded."""


class TokenizerError(ModelError):
    """The model's tokenizer is missing, gated or cannot be loaded."""


class DataError(HookmapError):
    """A data set of prompts cannot be read; every wrong record is in one message."""


class DiscoveryError(HookmapError):
    """The dataflow has no structure that hookmap understands; nothing is guessed."""


class MapError(HookmapError):
    """A map document is broken: the message names the field, what was expected and what was found."""


class MapNotFoundError(MapError):
    """There is no such map file, and no shipped map for this model."""


class MapMismatchError(MapError):
    """The map contradicts the model in front of it."""


class SelectionError(HookmapError):
    """Points or layers that cannot be selected; all problems are in one message."""


class CaptureError(HookmapError):
    """A run did not see what its selectors promise; nothing wrong is returned."""


class InterventionError(HookmapError):
    """A point that cannot be written, or not with what was given; nothing is written wrong."""


class StoreError(HookmapError):
    """A capture folder is missing, broken, full, or belongs to another run."""


class DeployError(HookmapError):
    """A host is not reached, something is missing there, or no server comes up; the host's words are in it."""


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
