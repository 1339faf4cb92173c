"""The settings of a server."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Every limit of a server; `hookmap serve` has an option for each."""

    root: Path
    """the folder of the sessions; requests read and write nothing outside it"""
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    """the bearer key that every route but /health needs; None: none is needed"""
    admin_key: str | None = None
    """the bearer key that loads and unloads models; None: nobody may"""
    hosts: tuple[str, ...] = ()
    """host names that requests may use besides the loopback's; checked only when listening on the loopback"""
    allow: tuple[str, ...] = ()
    """models that requests may load"""
    vectors: Path | None = None
    """the folder of the steering vectors that are offered"""
    points: str | tuple[str, ...] | Mapping[str, Any] = ("resid_post",)
    """what is recorded for `store_activations: true`, and for a `hookmap` field that names no points"""
    layers: str | tuple[int, ...] = "all"
    calls: str | tuple[int, ...] = "all"
    queue: int = 64
    """requests that may wait for a model"""
    batch: int = 16
    """rows that may run together; 1: each request runs alone, so that no other changes its last bits"""
    batch_tokens: int = 32768
    """the most tokens of such a batch: its rows times the longest prompt and completion"""
    max_new_tokens: int = 4096
    """the most that a request may ask for, and what it gets by default where its context has room"""
    max_choices: int = 16
    """the most rows of one request: `n` times its prompts"""
    body_bytes: int = 4 * 2**20
    connections: int = 1000
    """clients that may be connected"""
    header_seconds: float = 15.0
    """how long the headers of a request may take, from the beginning of the connection or their first byte"""
    body_seconds: float = 60.0
    """how long its body may take"""
    image_pixels: int = 2**24
    """the most pixels of the images of one request, each with an equal share: a small file can hold many"""
    request_bytes: int = 2 * 2**30
    """the most activations of one request"""
    inline_bytes: int = 16 * 2**20
    """the most activations that are sent in an answer"""
    total_bytes: int = 20 * 2**30
    """the most bytes of all sessions; the oldest finished ones are removed first"""
    max_age: float = 7 * 24 * 3600.0
    """seconds for which a finished session is kept"""
    drain: float = 30.0
    """seconds for which requests may go on when the server is told to stop"""
    functions: tuple[str, ...] = ()
    """functions that interventions of requests may name, "package.module:function": they are imported and called"""
    engine: Literal["hooks", "vllm"] = "hooks"
    """what runs the models"""
    loads: dict[str, Any] = field(default_factory=dict)
    """options of `hookmap.open` for every model: dtype, device, map, tokenizer; or those of `hookmap.open_on_vllm`"""

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK
