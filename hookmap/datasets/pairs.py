"""Pairs of prompts that differ in what is studied: clean and corrupted, with the right answer and the wrong one."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hookmap.datasets.files import rows_of
from hookmap.datasets.messages import relative_to
from hookmap.datasets.records import read_name, read_prompt, shown, told
from hookmap.errors import DataError

_PROMPTS, _ANSWERS = ("clean", "corrupted"), ("answer", "wrong")


Answer = str | int | tuple[int, ...] | None
"""a text, a token id, or ids"""


@dataclass(frozen=True)
class Pair:
    """Two prompts of the same number of tokens, each of which has its place in both."""

    clean: Any
    """a prompt: a text, chat messages, token ids, …"""
    corrupted: Any
    """the same with what is studied changed"""
    answer: Answer = None
    """what follows the clean prompt; needed by metrics of an answer"""
    wrong: Answer = None
    """what follows the corrupted prompt; needed by metrics that compare two answers"""
    id: str | None = None
    """its name in the data set"""


def load_pairs(source: Any, *, skip: int = 0, limit: int | None = None) -> list[Pair]:
    """The pairs of a data set, for `sweep`.

    source: a file (.jsonl, .json, .csv, .tsv, .parquet; text also as .gz), a folder, "hf://NAME:SPLIT", a table, or an
    iterable of mappings or pairs: as of `load_prompts`. The columns are `clean` and `corrupted`, and where there are
    such `answer`, `wrong` and `id`; others are left out. skip, limit: which records.
    Raises DataError with every wrong record at once.
    """
    where, rows = rows_of(source)
    folder = None
    if isinstance(source, str | os.PathLike) and not str(source).startswith("hf://"):
        folder = Path(source).parent
    found: list[Pair] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    for place, row in islice(rows, skip, None if limit is None else skip + limit):
        try:
            if isinstance(row, Exception):
                raise row
            pair = row if isinstance(row, Pair) else _pair(row, folder)
            if pair.id is not None and (first := seen.setdefault(pair.id, place)) != place:
                raise ValueError(f"the id {pair.id!r} is that of {first} already")
            found.append(pair)
        except (ValueError, RecursionError) as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise DataError(f"{where}:\n{told(problems)}")
    if not found:
        raise DataError(
            f'{where} holds no pairs: expected lines such as {{"clean": …, "corrupted": …, "answer": …, "wrong": …}}'
        )
    return found


def save_pairs(pairs: Iterable[Pair], path: str | os.PathLike[str]) -> Path:
    """Write pairs as JSON Lines, for `load_pairs`. Raises DataError for prompts that JSON cannot hold."""
    try:
        lines = [json.dumps({k: v for k, v in asdict(pair).items() if v is not None}) for pair in pairs]
    except TypeError as error:
        raise DataError(f"these pairs are no JSON: {error}") from error
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(path)


def read_pairs(given: Any) -> list[Pair]:
    """One pair, or those of a data set. Raises DataError."""
    one = isinstance(given, Pair) or (isinstance(given, Mapping) and "clean" in given)
    return load_pairs([given] if one else given)


def _pair(row: Any, folder: Path | None) -> Pair:
    """Raises ValueError that says what is wrong with the row."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected the columns {', '.join(_PROMPTS + _ANSWERS)}, found {shown(row)}")
    if missing := [name for name in _PROMPTS if row.get(name) is None]:
        raise ValueError(f"no {', '.join(missing)}: it has {', '.join(map(str, row)) or 'no columns'}")
    given: dict[str, Any] = {name: row[name] for name in (*_PROMPTS, *_ANSWERS, "id") if row.get(name) is not None}
    for name in _PROMPTS:
        try:
            given[name] = read_prompt(given[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if folder is not None:
            given[name] = relative_to(given[name], folder)
    for name in _ANSWERS:
        if name in given:
            given[name] = _answer(given[name], name)
    if "id" in given:
        given["id"] = read_name(given["id"], "id")
    return Pair(**given)


def _answer(value: Any, name: str) -> Answer:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) and value:
        return value
    if type(value) is int:
        return value
    if isinstance(value, Sequence) and value and all(type(item) is int for item in value):
        return tuple(value)
    raise ValueError(f"{name}: expected a text, a token id, or a list of token ids, found {shown(value)}")
