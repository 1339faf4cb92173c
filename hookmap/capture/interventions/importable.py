"""Functions by the names that another process can import them by: "package.module:function"."""

import importlib
import re
import sys
from collections.abc import Iterable
from functools import reduce
from typing import Any

from hookmap.errors import InterventionError

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def function_of(name: str) -> Any:
    """Import what the name says. Raises InterventionError. It runs the module's code: give names that are trusted."""
    if not _NAME.fullmatch(name):
        raise InterventionError(f'{name!r} is no name of a function. Expected "package.module:function".')
    module, _, path = name.partition(":")
    try:
        found = reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:  # a module may raise anything
        raise InterventionError(f"{name}: it cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InterventionError(f"{name}: expected a function of (rows, at), got {type(found).__name__}.")
    return found


def named(value: Any) -> Any:
    """What a name says; anything else as it is. Raises ValueError."""
    try:
        return function_of(value) if isinstance(value, str) else value
    except InterventionError as error:
        raise ValueError(str(error)) from error


def name_of(fn: Any, known: Iterable[str] = ()) -> str | None:
    """The name that another process can import this function by, one of the `known` first; None where there is none."""
    own = f"{getattr(fn, '__module__', None)}:{getattr(fn, '__qualname__', '')}"
    names = [*known, *([own] if _NAME.fullmatch(own) and not own.startswith("__main__:") else [])]
    return next((name for name in names if _loaded(name) is fn), None)


def _loaded(name: str) -> Any:
    """What the name says, of a module that is imported already."""
    module, _, path = name.partition(":")
    try:
        return reduce(getattr, path.split("."), sys.modules[module])
    except (AttributeError, KeyError):
        return None
