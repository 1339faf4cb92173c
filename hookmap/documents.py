"""What every document of hookmap is, and JSON where what `json` would read in silence as something else is refused."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A document, or a part of one: immutable, and without fields that it does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read_json(text: "str | bytes") -> Any:
    """What the document says. Raises ValueError, also for a key that is given twice and for nesting without end."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found
