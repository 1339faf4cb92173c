"""Reads a file of prompts: JSON Lines, one prompt a line."""

import json
from pathlib import Path
from typing import Any

import click

FIELDS = ("prompt", "messages", "question", "text", "token_ids")


def read_prompts(path: str) -> list[Any]:
    """The prompts of a JSONL file. A line is a text, chat messages, token ids, or an object with one of FIELDS.

    Raises click.UsageError with every wrong line at once.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"the prompts file {path} cannot be read: {error}") from error
    prompts, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt(json.loads(line)))
        except json.JSONDecodeError as error:
            problems.append(f"line {number}, column {error.colno}: not JSON: {error.msg}")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f"\n  - … and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise click.UsageError(f"{path}:\n" + "\n".join(f"  - {problem}" for problem in problems[:10]) + more)
    if not prompts:
        raise click.UsageError(f'{path} holds no prompts: expected lines such as {{"prompt": "Hello"}}')
    return prompts


def _prompt(value: Any) -> Any:
    if isinstance(value, dict):
        field = next((name for name in FIELDS if name in value), None)
        if field is None:
            raise ValueError(f"expected one of the fields {', '.join(FIELDS)}, found {', '.join(value) or 'none'}")
        value = value[field]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return value
    raise ValueError(f"expected a text, a list of chat messages or a list of token ids, found {json.dumps(value)[:60]}")
