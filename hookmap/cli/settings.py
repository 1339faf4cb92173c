"""Where a command gets what was not typed: HOOKMAP_MODEL, hookmap.yaml (found upwards), the bundled demo model."""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

FILE_NAME = "hookmap.yaml"
ENVIRONMENT = "HOOKMAP_MODEL"


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number, at least 1")
    return value


def _count_from_0(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("a whole number, at least 0")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _list(value: Any) -> str:
    """A YAML list or one value, as it would be typed: `8,12,16`."""
    items = value if isinstance(value, list) else [value]
    if not items or any(isinstance(item, bool) or not isinstance(item, str | int) for item in items):
        raise ValueError("a list, or one text such as '8,12,16' or 'all'")
    return ",".join(map(str, items))


# Key of hookmap.yaml -> what reads its value. The names are those of the options.
KEYS: dict[str, Callable[[Any], Any]] = {
    "model": _text,
    "map": _text,
    "tokenizer": _text,
    "points": _list,
    "layers": _list,
    "prompts": _text,
    "max_new_tokens": _count_from_0,
    "batch_size": _count,
    "batch_tokens": _count,
    "positions": _list,
    "every": _count,
    "keep_dtype": _text,
    "dtype": _text,
    "device": _text,
    "trust_remote_code": _flag,
}
_PATHS = ("model", "map", "tokenizer", "prompts")


def load_settings(start: Path | None = None) -> dict[str, Any]:
    """The settings of the nearest hookmap.yaml at or above `start` (the working directory), or {}.

    Paths in it are relative to its folder. Raises click.UsageError with every wrong key at once.
    """
    start = start or Path.cwd()
    file = next((folder / FILE_NAME for folder in (start, *start.parents) if (folder / FILE_NAME).is_file()), None)
    if file is None:
        return {}
    import yaml

    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise click.UsageError(f"{file} is not YAML: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise click.UsageError(f"{file}: expected keys and values such as `model: Qwen/Qwen3-0.6B`, found {document!r}")
    settings, problems = _read(document)
    if problems:
        raise click.UsageError(f"{file}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    for key in _PATHS:
        # A hub id looks like a path too: only what is there is taken for one.
        if key in settings and (file.parent / settings[key]).exists():
            settings[key] = str(file.parent / settings[key])
    return settings


def _read(document: dict[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    settings, problems = {}, []
    for key, value in document.items():
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {', '.join(KEYS)}"
            problems.append(f"unknown key {key!r}: {hint}")
            continue
        try:
            settings[key] = KEYS[key](value)
        except ValueError as error:
            problems.append(f"{key}: expected {error}, found {value!r}")
    return settings, problems


def choose_model(typed: str | None, settings: dict[str, Any]) -> str:
    """The model of this run; stderr says which where it was not typed."""
    if typed:
        return typed
    if named := os.environ.get(ENVIRONMENT):
        model, source = named, f"named by {ENVIRONMENT}"
    elif "model" in settings:
        model, source = settings["model"], f"named by {FILE_NAME}"
    else:
        from hookmap.demo import MODEL_PATH

        model, source = str(MODEL_PATH), "the bundled demo model"
    click.echo(f"model: {model} ({source})", err=True)
    return model


def parse_list(text: str) -> str | list[str]:
    """`resid_pre,resid_mid` -> both names; `all` stays."""
    return text if text == "all" else [item.strip() for item in text.split(",") if item.strip()]


def parse_layers(text: str) -> str | list[int]:
    """`8,12,16`, `0-3`, `-1`, `all`, and any of them together. Raises click.BadParameter."""
    if text.strip() == "all":
        return "all"
    layers: list[int] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", item)
        if match is None:
            raise click.BadParameter(f"{item!r} is no layer: write 8,12,16 or 0-3 or -1 or all", param_hint="--layers")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise click.BadParameter(f"{item!r} counts down: write {last}-{first}", param_hint="--layers")
        layers += range(first, last + 1)
    if not layers:
        raise click.BadParameter("no layer given: write 8,12,16 or 0-3 or -1 or all", param_hint="--layers")
    return layers
