"""An answer in bytes, of which a client may ask for a part (RFC 9110, one range)."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from fastapi.responses import Response

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)

KIND = "application/octet-stream"
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {"description": "All of it.", "content": {KIND: {}}},
    206: {"description": "The part that was asked for.", "content": {KIND: {}}},
    416: {"description": "There is no such part."},
}
"""the answers of a route, in its OpenAPI document"""


def ranged(data: bytes, headers: Mapping[str, str], name: str) -> Response:
    """All of `data`, or the part that the request's `Range` names; 416 where there is no such part.

    A range in another unit or of absurd size, several ranges, and one for other data (`If-Range`) get all of it, as the
    RFC allows.
    """
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    told = {"Accept-Ranges": "bytes", "ETag": tag, "Content-Disposition": f'attachment; filename="{_plain(name)}"'}
    match = _RANGE.fullmatch(headers.get("range", ""))
    if match is None or not (match[1] or match[2]) or headers.get("if-range", tag) != tag:
        return Response(data, media_type=KIND, headers=told)
    size = len(data)
    first, last = match[1], match[2]
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last), size - 1) if first and last else size - 1
    if start > end:
        return Response(status_code=416, headers={**told, "Content-Range": f"bytes */{size}"})
    told["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Response(data[start : end + 1], 206, media_type=KIND, headers=told)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
