"""What a server is started with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Every limit of a server; `hookmap serve` has an option for each."""

    root: Path
    """the folder of the sessions; nothing is read or written outside it"""
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    """the bearer key that every route but /health needs; None: none is needed"""
    admin_key: str | None = None
    """the bearer key that loads and unloads models; None: nobody may"""
    hosts: tuple[str, ...] = ()
    """names of this server that a request may say besides the loopback's; on other addresses any may be said"""
    allow: tuple[str, ...] = ()
    """models that may be loaded"""
    points: str | tuple[str, ...] | Mapping[str, Any] = ("resid_post",)
    """what `store_activations: true` keeps, and a `hookmap` field that names no points"""
    layers: str | tuple[int, ...] = "all"
    queue: int = 64
    """requests that may wait for a model"""
    batch: int = 8
    """rows of plain requests that run together; 1: each request runs alone"""
    batch_tokens: int = 32768
    """of such a batch: rows times the longest prompt and what may be generated"""
    max_new_tokens: int = 4096
    """that a request may ask for, and what it gets where it does not say, as far as the context goes"""
    max_choices: int = 16
    """`n` times the prompts of one request"""
    body_bytes: int = 4 * 2**20
    request_bytes: int = 2 * 2**30
    """activations of one request, at most"""
    inline_bytes: int = 16 * 2**20
    """activations that an answer may carry itself"""
    total_bytes: int = 20 * 2**30
    """of all sessions; the oldest finished go first"""
    max_age: float = 7 * 24 * 3600.0
    """seconds that a finished session stays"""
    drain: float = 30.0
    """seconds that running requests get when the server is told to stop"""
    loads: dict[str, Any] = field(default_factory=dict)
    """how models are opened: dtype, device, map, tokenizer"""

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK
