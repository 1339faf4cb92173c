"""An error's type, and what its message must name: files, numbers, points, the next command. Not its wording."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises(kind: type[BaseException] | tuple[type[BaseException], ...], *named: str) -> Iterator[pytest.ExceptionInfo]:
    """The block raises `kind`, and its message, with its notes, has each of these texts somewhere."""
    with pytest.raises(kind) as caught:
        yield caught
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    missing = [text for text in named if text not in said]
    assert not missing, f"not in the message: {missing}\n{said}"
