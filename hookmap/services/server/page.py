"""The page at /: files of the package. The page gets what it shows from the API, as any client does."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from hookmap.maps.document import ArchitectureMap

RULES = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""the browser lets the page ask this server, and load nothing from elsewhere"""
MODULES = (
    "page",
    "api",
    "parts",
    "chat",
    "answers",
    "map",
    "token",
    "attention",
    "changes",
    "keeping",
    "sessions",
    "tree",
)
"""its scripts"""
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in MODULES},
}


def install(app: FastAPI) -> None:
    """Add the routes of the page."""
    for path, (name, kind) in FILES.items():
        _serve(app, path, (Path(__file__).with_name("static") / name).read_bytes(), kind)


def places(architecture_map: ArchitectureMap) -> dict[str, dict[str, Any]]:
    """For each point of a layer: the layers that have it, and how many heads it has there; None where it has none."""
    names = dict.fromkeys(name for kind in architecture_map.kinds for name in kind.points)
    found: dict[str, dict[str, Any]] = {}
    for selector in architecture_map.selectors(list(names)):
        place = found.setdefault(selector.point, {"layers": [], "heads": None})
        if selector.layer not in place["layers"]:
            place["layers"].append(selector.layer)
        if (heads := selector.terms[0].heads) is not None:
            place["heads"] = heads.groups * (heads.stop - heads.start) // heads.d_head
    return found


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
