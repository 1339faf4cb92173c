"""Parse texts of options, of variables and of hookmap.yaml."""

import re

import click

FILE_NAME = "hookmap.yaml"
PREFIX = "HOOKMAP_"
"""each key is a variable, too: HOOKMAP_BATCH_SIZE"""
_LAYERS = re.compile(r"(-?[0-9]{1,9})(?:[-–](-?[0-9]{1,9}))?")


def parse_list(text: str) -> str | list[str]:
    """Split `resid_pre,resid_mid` at its commas; `all` stays a text."""
    return text if text == "all" else [item.strip() for item in text.split(",") if item.strip()]


def _points_with_layers(text: str) -> dict[str, str | None]:
    """The points of `resid_post@3,5,z@8,logits`, each with its layers as they were typed."""
    found: dict[str, str | None] = {}
    last = ""
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, at, own = (part.strip() for part in item.partition("@"))
        if not at and _LAYERS.fullmatch(name):
            if found.get(last) is None:
                raise click.BadParameter(f"{item!r}: write layers behind a point's name: z@8", param_hint="--points")
            found[last] = f"{found[last]},{name}"
            continue
        if name in found or (at and not own):
            why = "is there twice" if name in found else "has no layers behind its @"
            raise click.BadParameter(f"{name!r} {why}: write resid_post@3,5,z@8-10", param_hint="--points")
        found[last := name] = own if at else None
    return found


def parse_layers(text: str) -> str | list[int]:
    """Parse `8,12,16`, `0-3`, `-1`, a list of these, or `all`. Raises click.BadParameter."""
    return "all" if text.strip() == "all" else _numbers(text, "layer", "8,12,16 or 0-3 or -1 or all", "--layers")


def parse_calls(text: str, option: str = "--calls") -> str | list[int]:
    """The same of `--calls`, which may be `last` too."""
    words = text.strip()
    return words if words in ("all", "last") else _numbers(text, "call", "0,2 or 0-3 or all or last", option)


def parse_heads(text: str) -> list[int]:
    """The same of `--heads`, without `all`."""
    return _numbers(text, "head", "0,3 or 0-3", "--heads")


def _numbers(text: str, what: str, write: str, option: str) -> list[int]:
    found: list[int] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _LAYERS.fullmatch(item)
        if match is None:
            raise click.BadParameter(f"{item!r} is no {what}: write {write}", param_hint=option)
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise click.BadParameter(f"{item!r} counts down: write {last}-{first}", param_hint=option)
        found += range(first, last + 1)
    if not found:
        raise click.BadParameter(f"no {what} given: write {write}", param_hint=option)
    return found
