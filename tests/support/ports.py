"""Ports of this machine for the servers of tests."""

import contextlib
import os
import secrets
import socket


def free_port() -> int:
    """One that nobody listens at, and that is still free when a server has started, seconds later.

    Those that the system gives to whoever asks for any port begin above, and each worker of pytest has a thousand.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = 20_000 + 1_000 * (worker % 9) + secrets.randbelow(1_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
