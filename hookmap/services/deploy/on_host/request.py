"""What `hookmap deploy` asks of the host, sent as JSON. It holds no secret: keys are made on the host and stay there.

Both sides use this class, so it needs the standard library only; the command line has checked every value.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "request.json"


@dataclass(frozen=True)
class Request:
    """The whole document."""

    action: str
    """deploy, stop, status or key"""
    again: str
    """how this `hookmap deploy` is typed, to name the next command in a message"""
    ssh: str
    """how a shell command on the host is typed"""
    port: int = 8000
    model: str | None = None
    """a hub id, or a path on the host; None: the bundled model"""
    name: str | None = None
    """what clients call the model, where that was typed"""
    options: tuple[str, ...] = ()
    """more options of `hookmap serve`"""
    drain: int = 30
    """seconds that a stopping server may still spend on its answers"""
    python: str | None = None
    """an interpreter whose packages are used; None: a venv is made"""
    torch: str | None = None
    """the requirement for PyTorch; None: the host chooses"""
    sync: str = "frozen"
    """frozen: install the locked versions; skip: install nothing"""
    fresh: bool = False
    """whether the environment is made anew"""
    runner: str = "auto"
    """systemd, tmux, detached, or auto: the best one that the host has"""
    wait: float = 600
    """seconds within which the server has to answer"""
    version: str | None = None
    """of the hookmap that is sent"""

    def to_json(self) -> str:
        """The document, indented for readers."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def read_request(file: Path) -> Request:
    """The request that was sent."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    return Request(**{**fields, "options": tuple(fields["options"])})
