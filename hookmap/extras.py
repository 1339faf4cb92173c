"""Packages that only some functions need, imported when they are."""

from importlib import import_module
from typing import Any

from hookmap.errors import CaptureError, HookmapError


def needed(module: str, why: str, kind: type[HookmapError] = CaptureError) -> Any:
    """The module. Raises `kind` where it is not installed: `why` says what needs it and how it is installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise kind(f"{why}\n({error})") from error
