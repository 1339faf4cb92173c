"""Answers a download, or the one range of it that a client asks for (RFC 9110)."""

import hashlib
import itertools
import re
from collections.abc import Mapping
from typing import Any

from fastapi.responses import Response, StreamingResponse

from hookmap.services.server.downloads import Download

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)

KIND = "application/octet-stream"
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {"description": "All of it.", "content": {KIND: {}}},
    206: {"description": "The part that was asked for.", "content": {KIND: {}}},
    416: {"description": "There is no such part."},
}
"""the answers of a route, in its OpenAPI document"""


def ranged(file: Download, headers: Mapping[str, str], name: str, which: str) -> Response:
    """The whole file, or the part that the request's `Range` names; 416 where there is no such part.

    `which`: identifies the bytes, for the ETag. A range in another unit or of absurd size, several ranges, and a range
    of other data (`If-Range`) get the whole file, as the RFC allows. Raises StoreError where the first piece cannot be
    read.
    """
    tag = f'"{hashlib.sha256(which.encode()).hexdigest()[:32]}"'
    told = {"Accept-Ranges": "bytes", "ETag": tag, "Content-Disposition": f'attachment; filename="{_plain(name)}"'}
    match = _RANGE.fullmatch(headers.get("range", ""))
    if match is None or not (match[1] or match[2]) or headers.get("if-range", tag) != tag:
        return _sent(file, 0, file.size, 200, told)
    size = file.size
    first, last = match[1], match[2]
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last), size - 1) if first and last else size - 1
    if start > end:
        return Response(status_code=416, headers={**told, "Content-Range": f"bytes */{size}"})
    return _sent(file, start, end + 1, 206, {**told, "Content-Range": f"bytes {start}-{end}/{size}"})


def _sent(file: Download, start: int, end: int, status: int, headers: Mapping[str, str]) -> Response:
    pieces = file.between(start, end)
    first = next(pieces)  # now, while what goes wrong has a status
    told = {**headers, "Content-Length": str(end - start)}
    return StreamingResponse(itertools.chain([first], pieces), status, told, KIND)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
