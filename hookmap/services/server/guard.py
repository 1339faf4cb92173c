"""Checks every request before its route: the server's name, the key, the body's size. Gives each answer an id."""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hookmap.services.server.errors import ApiError
from hookmap.services.server.page import FILES
from hookmap.services.server.settings import LOOPBACK, Settings

OPEN = ("/health", *FILES)
"""paths that need no key: the page contains nothing of the model, and asks for the key itself"""
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_ADMIN = ("/models/load", "/models/unload")
_LARGE = 2**18
"""bytes of a body that takes milliseconds of the event loop to parse"""
_REST = 10
"""times as long as such a body took, the next one waits: sent without a pause, they leave the loop to others"""


class Guard:
    """ASGI middleware. `done` is called with the scope, the status and the seconds of each request."""

    def __init__(self, app: ASGIApp, settings: Settings, done: Callable[[Scope, int, float], None]) -> None:
        self._app, self._settings, self._done = app, settings, done
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, start, status = Headers(scope=scope), time.perf_counter(), 500
        given = headers.get("x-request-id", "")
        id = scope["request_id"] = given if _ID.fullmatch(given) else secrets.token_hex(12)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._settings.body_bytes:
                raise HTTPException(413, self._too_large())
            if seen > _LARGE and not message.get("more_body"):
                # Its end is parsed as soon as it is handed on: one at a time, so that others' requests come between.
                await self._turn.acquire()
                asyncio.get_running_loop().call_soon(self._parsed, time.thread_time())
            return message

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = id
            await send(message)

        try:
            self._check(scope, headers)
        except ApiError as error:
            await error.response()(scope, receive, named)
        else:
            await self._app(scope, counted, named)
        finally:
            self._done(scope, status, time.perf_counter() - start)

    def _parsed(self, since: float) -> None:
        """A large body was, which began at this processor time."""
        asyncio.get_running_loop().call_later(_REST * (time.thread_time() - since), self._turn.release)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises ApiError for a wrong host, a wrong key and a body that is too large."""
        settings = self._settings
        host = re.sub(r":\d+$", "", headers.get("host", "")).strip("[]").lower()
        # A page elsewhere may give its own name to this address (DNS rebinding), and then reads the answers.
        if settings.local and host not in (*LOOPBACK, *settings.hosts):
            raise ApiError(421, f"this server is not called {host!r}; name it with --allowed-host.", code="wrong_host")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > settings.body_bytes:
            raise ApiError(413, self._too_large(), code="body_too_large")
        admin = scope["path"] in _ADMIN or (scope["method"] == "PUT" and scope["path"] == "/v1/interventions")
        if admin and settings.admin_key is None:
            raise ApiError(403, "nobody may do this: start the server with --admin-key.", code="no_admin_key")
        if scope["path"] in OPEN or (settings.key is None and not admin):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        keys = [settings.admin_key] if admin else [settings.key, settings.admin_key]
        # Every key is compared, and digests are: the time taken tells nothing of a key or its length.
        right = [_same(key.strip(), each) for each in keys if each is not None]
        if scheme.lower() != "bearer" or not any(right):
            raise ApiError(
                401,
                "a wrong key or none: send Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _too_large(self) -> str:
        return f"the body is larger than {self._settings.body_bytes} bytes."


def _same(given: str, key: str) -> bool:
    return hmac.compare_digest(hashlib.sha256(given.encode()).digest(), hashlib.sha256(key.encode()).digest())
