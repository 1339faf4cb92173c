"""What `hookmap deploy` asks of the host, as JSON. It holds no secret: keys are made on the host and stay there."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

REQUEST = "request.json"


class Request(BaseModel):
    """The whole document; `on_host.py` reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Literal["deploy", "stop", "status", "key"]
    again: str = Field(description="how this command is typed, to name the next one in a message")
    ssh: str = Field(description="how a shell command on the host is typed")
    port: int = Field(default=8000, ge=1, le=65535)
    model: str | None = Field(default=None, description="a hub id, or a path on the host; null is the bundled one")
    name: str | None = Field(default=None, description="what clients call it, where that was typed")
    options: tuple[str, ...] = Field(default=(), description="more options of `hookmap serve`")
    drain: int = Field(default=30, description="seconds that a server which is stopped may still answer")
    python: str | None = Field(default=None, description="an interpreter whose packages are used; null makes a venv")
    torch: str | None = Field(default=None, description="the requirement for PyTorch; null lets the host choose")
    sync: Literal["frozen", "skip"] = "frozen"
    fresh: bool = False
    runner: Literal["auto", "systemd", "tmux", "detached"] = "auto"
    wait: float = Field(default=600, description="seconds in which the server has to answer")
    version: str | None = Field(default=None, description="of the hookmap that travels")
