"""Starts the server: opens the model, then the port, and answers requests until it is told to stop."""

import logging
import math
import socket
import time

import uvicorn
from fastapi import FastAPI

from hookmap.errors import HookmapError, SelectionError
from hookmap.model import HookedModel
from hookmap.services.server.app import make_app
from hookmap.services.server.connections import timed
from hookmap.services.server.models import Models
from hookmap.services.server.sessions import Sessions
from hookmap.services.server.settings import Settings
from hookmap.vllm.model import VllmModel

log = logging.getLogger("hookmap.server")


def serve(source: str | None, settings: Settings, name: str | None = None) -> None:
    """Serve a model until SIGTERM or Ctrl-C. Requests that still run then have `settings.drain` seconds to end.

    `name`: what clients call the model. Without a source, models are loaded by requests only.
    Raises ModelError, StoreError, SelectionError for unknown default points, HookmapError for a taken port.
    """
    _refuse_taken(settings.host, settings.port)
    _log_to_stderr()
    sessions = Sessions(settings.root, settings.total_bytes, settings.max_age)
    models = Models(settings)
    if source is not None:
        load_first(models, source, settings, name)
    config = config_of(make_app(settings, models, sessions), settings)
    uvicorn.Server(config).run()


def load_first(models: Models, source: str, settings: Settings, name: str | None) -> None:
    """Open the model that the server starts with. One that it cannot serve is closed again. See `serve`."""
    hm = models.open(source)
    try:
        check_points(hm, settings)
        models.add(models.called(source, name), hm)
    except BaseException:
        if isinstance(hm, VllmModel):
            hm.close()
        raise


def check_points(hm: HookedModel, settings: Settings) -> None:
    """Raises SelectionError where the model has not the server's own points. Warns where vLLM compiled it without."""
    selectors = hm.map.selectors(settings.points, settings.layers, settings.calls)
    if isinstance(hm, VllmModel):
        try:
            hm.engine_of_vllm.refuse_untapped([selector.key for selector in selectors])
        except SelectionError as error:
            log.warning("requests that name no points are refused, unless they keep none: %s", error)


def config_of(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=timed(settings),
        ws="none",
        timeout_graceful_shutdown=int(settings.drain),
        log_config=None,  # its own sends requests to stdout
        server_header=False,
    )


def _refuse_taken(host: str, port: int) -> None:
    """Raises HookmapError where the server cannot listen at this address; checked before the model is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        why = str(error.strerror or error).partition(" (while")[0]
        raise HookmapError(
            f"cannot listen at {host}:{port}: {why}. Give another: --port N (0 takes a free one), --host NAME"
        ) from error


class _NoFilesLeft(logging.Filter):
    """One line a minute where no connection can be accepted: asyncio writes thousands of tracebacks a second then."""

    def __init__(self) -> None:
        super().__init__()
        self._next = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        if "out of system resource" not in record.getMessage():
            return True
        if (now := time.monotonic()) < self._next:
            return False
        self._next = now + 60
        record.msg = "no connection is accepted: all files that this process may open are open; see ulimit -n"
        record.args = record.exc_info = None
        return True


def _log_to_stderr() -> None:
    """Log uvicorn's lines, hookmap's and the event loop's in one format."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("asyncio").addFilter(_NoFilesLeft())
    for name in ("hookmap", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
