"""A checksum that is computed beside the disk's work."""

import hashlib
import threading

import pytest

from hookmap.stores.hashing import WAITING, Sha256Beside

VIEWS = [bytes([n % 256]) * (n * 5000) for n in range(3 * WAITING)]


def test_it_is_that_of_all_bytes_in_their_order() -> None:
    with Sha256Beside() as digest:
        for view in VIEWS:
            digest.update(memoryview(view))
    assert digest.hexdigest() == hashlib.sha256(b"".join(VIEWS)).hexdigest()


def test_its_thread_ends_with_an_error_of_the_disk() -> None:
    with pytest.raises(OSError, match="full"), Sha256Beside() as digest:
        digest.update(VIEWS[-1])
        raise OSError("full")
    assert "hashing" not in {thread.name for thread in threading.enumerate()}
