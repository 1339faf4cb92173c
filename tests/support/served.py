"""A real server on a port of this machine, in a thread of the tests."""

import contextlib
import functools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

import hookmap
from hookmap.demo import MODEL_PATH
from hookmap.model import HookedModel
from hookmap.services.server.app import make_app
from hookmap.services.server.models import Models
from hookmap.services.server.run import config_of
from hookmap.services.server.sessions import Sessions
from hookmap.services.server.settings import Settings

QUESTION = "Tom has 3 apples. He buys 4 more. How many apples does Tom have?"
MESSAGES = [{"role": "user", "content": QUESTION}]
NAME = "hookmap-demo"


@functools.cache
def demo() -> HookedModel:
    """The bundled model, loaded once in each test process."""
    return hookmap.open(str(MODEL_PATH), device="cpu")


@dataclass
class Served:
    """A running server and what is inside it."""

    url: str
    hm: HookedModel
    models: Models
    sessions: Sessions
    root: Path
    headers: dict[str, str] = field(default_factory=dict)

    def post(self, path: str, **body: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json", **self.headers}
        return httpx.post(self.url + path, content=json.dumps(body), headers=headers, timeout=240)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={**self.headers, **headers}, timeout=240)

    def delete(self, path: str) -> httpx.Response:
        return httpx.delete(self.url + path, headers=self.headers, timeout=240)

    def chat(self, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", **{"messages": MESSAGES, "temperature": 0, "max_tokens": 12, **body})

    def idle(self, seconds: float = 120.0) -> None:
        """Returns when no model works and nothing waits."""
        end = time.monotonic() + seconds
        while any(loaded.scheduler.running or loaded.scheduler.waiting for loaded in self.models.all):
            assert time.monotonic() < end, "the server does not become idle"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(root: Path, hm: HookedModel | None = None, **limits: Any) -> Iterator[Served]:
    """A server with these settings on a free port; it is told to stop at the end, and must.

    `free`: what the disk of the sessions has left; see `Sessions`.
    """
    free = {"free": limits.pop("free")} if "free" in limits else {}
    settings = Settings(root=root, **{"points": ("resid_mid",), "layers": (8, 12), "port": 0, **limits})
    sessions = Sessions(settings.root, settings.total_bytes, settings.max_age, **free)
    models = Models(settings)
    models.add(NAME, hm or demo())
    server = uvicorn.Server(config_of(make_app(settings, models, sessions), settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", models.all[0].hm, models, sessions, root)
    finally:
        server.should_exit = True
        thread.join(240)
        assert not thread.is_alive(), "the server did not stop"
