"""Connections that send nothing, or too slowly, take no place from those that ask.

uvicorn waits for ever for the headers and the body of a request. Here both have a time limit; and where there are as
many connections as the server holds, the one that has been silent for longest makes room for a new one.
"""

import asyncio
import sys
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from hookmap.services.server.errors import ApiError
from hookmap.services.server.settings import Settings

_SPARE = 256
"""files that the server opens besides its connections: shards of sessions, the model's, the log"""


def timed(settings: Settings) -> type[asyncio.Protocol]:
    """uvicorn's protocol with the limits of these settings."""
    most = min(settings.connections, open_files() - _SPARE)

    class Timed(AutoHTTPProtocol):  # type: ignore[misc,valid-type]  # chosen by what is installed
        """A connection."""

        _timer: asyncio.TimerHandle | None = None
        _waits_for: str | None = None
        _since = 0.0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._since = self.loop.time()
            if len(self.connections) > most and not self._made_room():
                self._refuse(503, f"{most} clients are connected, the most that this server holds; try again.", "busy")
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Begin to wait for what is missing of a request, where something else was missing until now."""
            waits_for = self._missing()
            if waits_for != self._waits_for:
                self._stop()
                self._waits_for, self._since = waits_for, self.loop.time()
                if waits_for is not None:
                    seconds = settings.header_seconds if waits_for == "headers" else settings.body_seconds
                    self._timer = self.loop.call_later(seconds, self._too_late)

        def _missing(self) -> str | None:
            if self.cycle is None or self.cycle.response_complete:
                return "headers"
            return "body" if self.cycle.more_body else None

        def _too_late(self) -> None:
            missing = self._missing()
            if missing is not None and missing == self._waits_for:
                self._refuse(408, f"the {missing} of the request did not come in time.", "request_timeout")

        def _made_room(self) -> bool:
            silent = [each for each in self.connections if each is not self and each._missing() == "headers"]
            if not silent:
                return False
            min(silent, key=lambda each: each._since).transport.abort()
            return True

        def _refuse(self, status: int, message: str, code: str) -> None:
            """Answer without the application, unless it answers already, and close."""
            if not self.transport.is_closing():
                if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                    self.transport.write(_raw(ApiError(status, message, code=code)))
                self.transport.close()

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Timed


def open_files() -> int:
    """How many files this process may have open, after asking for as many as it may ask for."""
    if sys.platform == "win32":
        return 2**31
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError):  # macOS has a smaller limit of its own
            pass
    return 2**31 if soft == resource.RLIM_INFINITY else soft


def _raw(error: ApiError) -> bytes:
    """A whole HTTP answer."""
    answer = error.response()
    head = [
        f"HTTP/1.1 {answer.status_code} {'Request Timeout' if answer.status_code == 408 else 'Service Unavailable'}"
    ]
    head += [f"{name.decode()}: {value.decode()}" for name, value in answer.raw_headers]
    return "\r\n".join([*head, "Connection: close", "", ""]).encode() + bytes(answer.body)
