"""The page at /: three files of the package. The page gets what it shows from the API, as any client does."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response

RULES = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""the browser lets the page ask this server, and load nothing from elsewhere"""
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def install(app: FastAPI) -> None:
    """Add the routes of the page."""
    for path, (name, kind) in FILES.items():
        _serve(app, path, Path(__file__).with_name(name).read_bytes(), kind)


def _serve(app: FastAPI, path: str, data: bytes, kind: str) -> None:
    headers = {
        "Content-Security-Policy": RULES,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(data, media_type=kind, headers=headers)
