"""JSON as people read it: what fits on a line stands on one, and numbers and words fill lines."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

WIDTH = 120


def json_text(value: Any, indent: int = 0, before: int = 0) -> str:
    """`before`: characters that stand on the line in front of the value."""
    line = _line(value)
    if (indent and indent + before + len(line) < WIDTH) or not isinstance(value, dict | list) or not value:
        return line
    items = list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, list) and len(items) == 1:
        return f"[{json_text(items[0], indent, before + 1)}]"
    keys = [f"{_line(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    parts: Iterable[str] = (k + json_text(item, indent + 1, len(k)) for k, item in zip(keys, items, strict=True))
    if indent and all(_is_short(item, in_list=isinstance(value, list)) for item in items):
        parts = _filled(parts, WIDTH - indent - 2)
    start, end = "{}" if isinstance(value, dict) else "[]"
    body = f",\n{' ' * (indent + 1)}".join(parts)
    return f"{start}\n{' ' * (indent + 1)}{body}\n{' ' * indent}{end}"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_short(value: Any, in_list: bool) -> bool:
    return isinstance(value, int | float) or (in_list and isinstance(value, str) and " " not in value)


def _filled(parts: Iterable[str], width: int) -> Iterator[str]:
    """As many of them on a line as fit."""
    line = ""
    for part in parts:
        longer = f"{line}, {part}" if line else part
        if line and len(longer) > width:
            yield line
            longer = part
        line = longer
    yield line
