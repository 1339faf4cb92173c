"""Data sets of prompts: JSON Lines, text, CSV, Parquet, Hugging Face data sets, or records made in Python.

A record is a prompt with its own name (`id`) and what else the data says of it (`labels`); both stay with the sample.
"""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import islice
from numbers import Integral
from pathlib import Path, PurePath
from typing import Any, Literal
from uuid import UUID

from hookmap.datasets.files import columns_of, rows_of
from hookmap.datasets.messages import relative_to
from hookmap.errors import DataError

FIELDS = ("prompt", "messages", "question", "text", "token_ids", "input_ids")
"""columns that may hold the prompt, where none is named: the first that a record has"""
DECODER = ("decoder_text", "decoder_token_ids")
"""columns that may hold what the decoder of an encoder-decoder begins with"""
_NEVER_TEXT = ("messages", "token_ids", "input_ids")  # in a text table these hold the text of a list
_AS_TEXT = (date, time, timedelta, Decimal, UUID, PurePath)
_SHOWN = 10


@dataclass(frozen=True)
class PromptRecord:
    """One prompt of a data set."""

    prompt: Any
    """a text, a list of chat messages, a list of token ids, or {"text": …, "images": […]}; for an encoder-decoder also
    {"prompt": a text or token ids, "decoder_text": …}, or with "decoder_token_ids"
    """
    id: str | None = None
    """its name in the data set, the same at each reading; None where it has none and is known by its number"""
    labels: Mapping[str, Any] | None = None
    """other columns, as plain JSON data"""

    def __post_init__(self) -> None:
        """Checks that the table of samples can hold it, also a record made by hand."""
        try:
            own = None if self.id is None else read_name(self.id, "id")
            labels = None if self.labels is None else {_whole(str(k)): _label(v, k) for k, v in self.labels.items()}
        except ValueError as error:
            raise DataError(f"a record: {error}") from error
        object.__setattr__(self, "id", own)
        object.__setattr__(self, "labels", labels)


def load_prompts(
    source: Any,
    *,
    prompt: str | None = None,
    id: str | None = None,
    labels: Sequence[str] | Literal["all"] = (),
    images: str | None = None,
    decoder: str | None = None,
    skip: int = 0,
    limit: int | None = None,
) -> list[PromptRecord]:
    """The prompts of a data set, for `capture`.

    source: a file (.jsonl, .json, .csv, .tsv, .parquet; .txt has a prompt a line; text also as .gz), a folder of
    `datasets.save_to_disk`, "hf://NAME" or "hf://NAME:SPLIT" of the Hugging Face hub, a `datasets.Dataset`, a table (a
    DataFrame of pandas or polars, an Arrow table; its column is named), or any iterable of texts, chat messages or
    mappings. Paths of images in a file's messages are relative to its folder.
    prompt: the column of the prompt; the first of FIELDS that a record has, unless given. id: the column of its name;
    "id" where there is one. labels: columns to keep, or "all" others. images: the column of the text's image, or of a
    list of them. decoder: the column of what an encoder-decoder's decoder begins with, a text or token ids;
    "decoder_text" or "decoder_token_ids" where there is one. skip, limit: which records.
    Raises DataError with every wrong record at once.
    """
    if isinstance(labels, str) and labels != "all":
        labels = (labels,)
    for name, number in (("skip", skip), ("limit", limit)):
        if number is not None and (type(number) is not int or number < 0):
            raise DataError(f"{name}: expected a whole number from 0 on, got {number!r}.")
    if prompt is None and (columns := columns_of(source)) is not None:
        raise DataError(
            f"a table with the columns {_listed(columns)}: say which holds the prompts: load_prompts(table, "
            "prompt=NAME), and which the names, id=NAME, and labels, labels=[…] or 'all'."
        )
    where, rows = rows_of(source)
    from_file = isinstance(source, str | os.PathLike) and not str(source).startswith("hf://")
    folder = Path(source).parent if from_file else None
    found: list[PromptRecord] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    for place, row in islice(rows, skip, None if limit is None else skip + limit):
        try:
            if isinstance(row, Exception):
                raise row
            record = _record(row, prompt, id, labels, images, decoder)
            if folder is not None:
                record = replace(record, prompt=relative_to(record.prompt, folder))
            if record.id is not None and (first := seen.setdefault(record.id, place)) != place:
                raise ValueError(f"the id {record.id!r} is that of {first} already")
            found.append(record)
        except (ValueError, RecursionError) as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise DataError(f"{where}:\n{told(problems)}")
    if not found:
        after = f" after the first {skip}" if skip else ""
        raise DataError(f'{where}{after} holds no prompts: expected lines such as {{"prompt": "Hello"}}')
    return found


def told(problems: Collection[str]) -> str:
    """A line for each of the first problems, and how many more there are."""
    lines = [f"  - {problem}" for problem in islice(problems, _SHOWN)]
    return "\n".join([*lines, *([f"  - … and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])])


def _record(
    row: Any,
    prompt: str | None,
    name: str | None,
    labels: Sequence[str],
    images: str | None,
    decoder: str | None,
) -> PromptRecord:
    """Raises ValueError that says what is wrong with the row."""
    if isinstance(row, PromptRecord):
        return row
    if not isinstance(row, Mapping):
        if (column := prompt or images or decoder) is not None:
            raise ValueError(f"expected columns with {column!r} among them, found {shown(row)}")
        return PromptRecord(read_prompt(row))
    columns = list(map(str, row))
    field = prompt or next((field for field in FIELDS if field in row), None)
    wanted = [column for column in (field, name, images, decoder) if column]
    wanted += [] if labels == "all" else labels
    if missing := [column for column in wanted if column not in row]:
        raise ValueError(f"no column {', '.join(map(repr, missing))}: it has {_listed(columns)}")
    if field is None:
        raise ValueError(f"expected one of the fields {', '.join(FIELDS)}, found {_listed(columns)}")
    if prompt is None and field in _NEVER_TEXT and isinstance(row[field], str):
        raise ValueError(f"{field}: expected a list, found the text {shown(row[field])}; to send it as it is, name it")
    key = name or ("id" if "id" in row and field != "id" else None)
    own = None if key is None else read_name(row[key], key)
    begins = [decoder] if decoder else [c for c in DECODER if c in row and (labels == "all" or c not in labels)]
    apart = (field, key, images, *begins)
    kept = [column for column in columns if column not in apart] if labels == "all" else labels
    labels_kept = {str(c): _label(row[c], c) for c in kept}
    found = read_prompt(row[field])
    if images is not None:
        found = _with_images(found, row[images], field)
    if begun := {column: row[column] for column in begins if row[column] is not None}:
        found = _with_decoder(found, begun, field)
    return PromptRecord(found, own, labels_kept or None)


def _with_images(text: Any, images: Any, field: str) -> Any:
    """The text with its images, or the text alone where a row has none."""
    if images is None or images == []:
        return text
    if not isinstance(text, str):
        raise ValueError(f"{field}: expected a text for the images, found {shown(text)}; messages name their own")
    return {"text": text, "images": list(images) if isinstance(images, list | tuple) else [images]}


def _with_decoder(prompt: Any, begun: Mapping[str, Any], field: str) -> Any:
    """The prompt with what the decoder begins with."""
    if len(begun) > 1:
        raise ValueError(f"expected one of {', '.join(begun)}: both say what the decoder begins with")
    ((column, value),) = begun.items()
    value = value.tolist() if hasattr(value, "tolist") else value
    text, ids = DECODER
    is_text, is_ids = isinstance(value, str), isinstance(value, list) and all(type(item) is int for item in value)
    if not (is_text and column != ids) and not (is_ids and column != text):
        expected = {text: "a text", ids: "a list of token ids"}.get(column, "a text or a list of token ids")
        raise ValueError(f"{column}: expected {expected}, found {shown(value)}")
    if isinstance(prompt, Mapping):
        raise ValueError(f"{field}: a prompt with images has no {column}: give what the model's processor makes of it")
    return {"prompt": prompt, text if is_text else ids: value}


def _listed(columns: Sequence[Any]) -> str:
    return ", ".join(map(str, columns)) or "none"


def read_name(value: Any, column: str) -> str:
    """A record's own name. Raises ValueError for something else than a text or a whole number."""
    if isinstance(value, bool) or not isinstance(value, str | Integral) or value == "":
        raise ValueError(f"{column}: expected a text or a whole number as a name, found {shown(value)}")
    return _whole(str(value))


def read_prompt(value: Any) -> Any:
    """A text, messages or token ids. Raises ValueError for something else."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, Mapping) and "role" in item for item in value):
            return value
        if all(type(item) is int for item in value):
            return value
    raise ValueError(f"expected a text, a list of chat messages or a list of token ids, found {shown(value)}")


def _whole(text: str) -> str:
    """The text itself. Raises ValueError for half of a surrogate pair, which no file of UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair in {shown(text)}: read the file it comes from as UTF-8") from error
    return text


def _label(value: Any, column: Any) -> Any:
    try:
        return _plain(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{column}: expected what JSON can hold, found {error}") from error


def _plain(value: Any) -> Any:
    """The value as plain JSON: null for not-a-number, text for dates and the like.

    Raises TypeError for the rest: the text of a set or of an image is another one in every run.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return _whole(value)
    if value is None or isinstance(value, int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {_whole(str(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, _AS_TEXT):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} {shown(value)}")


def shown(value: Any) -> str:
    """The beginning of a value, for messages."""
    text = repr(value) if not isinstance(value, dict | list) else json.dumps(value, default=str)
    return f"{text[:60]}…" if len(text) > 60 else text
