"""Data sets of prompts: JSON Lines, text, CSV, Parquet, Hugging Face data sets, or records made in Python.

A record is a prompt with its own name (`id`) and what else the data says of it (`labels`); both stay with the sample.
"""

import csv
import gzip
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from hookmap.errors import DataError

FIELDS = ("prompt", "messages", "question", "text", "token_ids", "input_ids")
"""columns that are taken for the prompt, the first that a record has, where none is named"""
FORMATS = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")
_SHOWN = 10
_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class PromptRecord:
    """One prompt of a data set."""

    prompt: Any
    """a text, a list of chat messages, or a list of token ids"""
    id: str | None = None
    """its name in the data set, the same whenever it is read; None where it has none, and its number is its name"""
    labels: Mapping[str, Any] | None = None
    """other columns, as plain JSON data"""

    def __post_init__(self) -> None:
        """As the table of samples can hold it. Raises DataError."""
        try:
            object.__setattr__(self, "id", None if self.id is None else _name(self.id, "id"))
            if self.labels is not None:
                object.__setattr__(self, "labels", _plain(dict(self.labels)))
        except (ValueError, TypeError) as error:
            raise DataError(f"a PromptRecord: {error}") from error


def load_prompts(
    source: Any,
    *,
    prompt: str | None = None,
    id: str | None = None,
    labels: Sequence[str] | Literal["all"] = (),
    skip: int = 0,
    limit: int | None = None,
) -> list[PromptRecord]:
    """The prompts of a data set, for `capture`.

    source: a file (.jsonl, .json, .csv, .tsv, .parquet; .txt has a prompt a line; text also as .gz), a folder of
    `datasets.save_to_disk`, "hf://NAME" or "hf://NAME:SPLIT" of the Hugging Face hub, a `datasets.Dataset`, or any
    iterable of texts, chat messages or mappings.
    prompt: the column of the prompt; the first of FIELDS that a record has, unless given. id: the column of its name;
    "id" where there is one. labels: columns to keep, or "all" others. skip, limit: which records.
    Raises DataError with every wrong record at once.
    """
    if isinstance(labels, str) and labels != "all":
        labels = (labels,)
    for name, count in (("skip", skip), ("limit", limit)):
        if count is not None and (type(count) is not int or count < 0):
            raise DataError(f"{name}: expected a whole number from 0 on, got {count!r}.")
    where, rows = _rows(source)
    found: list[PromptRecord] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    for place, row in islice(rows, skip, None if limit is None else skip + limit):
        try:
            if isinstance(row, Exception):
                raise row
            record = _record(row, prompt, id, labels)
            if record.id is not None and (first := seen.setdefault(record.id, place)) != place:
                raise ValueError(f"the id {record.id!r} is that of {first} already")
            found.append(record)
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        more = f"\n  - … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(f"{where}:\n" + "\n".join(f"  - {problem}" for problem in problems[:_SHOWN]) + more)
    if not found and (skip or limit == 0):
        raise DataError(f"{where} holds no prompts with skip={skip}, limit={limit}: give smaller or larger ones.")
    if not found:
        raise DataError(f'{where} holds no prompts: expected lines such as {{"prompt": "Hello"}}')
    return found


def _rows(source: Any) -> tuple[str, Iterator[tuple[str, Any]]]:
    """What to call the source, and its rows, each with its place in it. A row that cannot be read is an exception."""
    if isinstance(source, str) and source.startswith("hf://"):
        return source, _numbered(_from_hub(source.removeprefix("hf://")), "row")
    if not isinstance(source, str | os.PathLike):
        if not isinstance(source, Iterable) or isinstance(source, Mapping | bytes):
            raise DataError(f"prompts: expected a file, a data set or an iterable of records, got {source!r:.80}")
        return "prompts", _numbered(source, "record")
    path = Path(source)
    if path.is_dir():
        return str(path), _numbered(_from_folder(path), "row")
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    reader = {".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _text, ".parquet": _parquet}.get(kind, _json_lines)
    if kind not in FORMATS:
        raise DataError(f"{path}: expected a file of {', '.join(FORMATS)}, found {kind or 'no ending'}")
    return str(path), reader(path)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The text of a file, gzip or not, with or without a byte order mark."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as unpacked:
                yield unpacked
        else:
            with open(path, encoding="utf-8-sig", newline="") as plain:
                yield plain
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"the prompts file {path} cannot be read: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return ValueError(f"column {error.colno}: not JSON: {error.msg}")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return ValueError(f"not JSON that can be read: {error}")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, or JSON Lines under that name."""
    with _opened(path) as file:
        text = file.read()
    if text.lstrip().startswith("["):
        document = _parsed(text)
        if isinstance(document, list) and all(isinstance(row, Mapping | str | list) for row in document):
            yield from _numbered(document, "record")
            return
        if isinstance(document, ValueError):
            raise DataError(f"{path}: {document}")
    yield from _json_lines(path)


def _text(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", line.rstrip("\r\n")


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        csv.field_size_limit(max(_LONGEST_FIELD, csv.field_size_limit()))  # a document is longer than Python's 128 kB
        reader = csv.DictReader(file, delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield f"line {reader.line_num}", ValueError(str(error))
                return
            if row is None:
                return
            wrong = None in row or None in row.values()
            expected = f"expected {len(reader.fieldnames or ())} columns, as the first line has"
            yield f"line {reader.line_num}", ValueError(expected) if wrong else row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow. pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _numbered(rows, "row")
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"the prompts file {path} cannot be read: {error}") from error


def _from_folder(path: Path) -> Iterable[Any]:
    library = _hugging_face()
    try:
        found: Iterable[Any] = library.load_from_disk(str(path))
    except Exception as error:  # it raises what its many readers raise
        raise DataError(f"{path}: expected a file, or a folder that datasets.save_to_disk wrote: {error}") from error
    if isinstance(found, Mapping):
        raise DataError(f"{path} holds several splits: give one of its folders, {', '.join(map(str, found))}.")
    return found


def _from_hub(name: str) -> Iterable[Any]:
    name, _, split = name.partition(":")
    library = _hugging_face()
    try:
        found: Iterable[Any] = library.load_dataset(name, split=split or "train")
    except Exception as error:  # it raises what its many readers raise
        raise DataError(f"hf://{name}: {error}") from error
    return found


def _hugging_face() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("a Hugging Face data set needs the datasets library. pip install datasets") from error
    return datasets


def _numbered(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    return ((f"{name} {number}", row) for number, row in enumerate(rows))


def _record(row: Any, prompt: str | None, name: str | None, labels: Sequence[str]) -> PromptRecord:
    """Raises ValueError that says what is wrong with the row."""
    if isinstance(row, PromptRecord):
        return row
    if not isinstance(row, Mapping):
        if prompt is not None:
            raise ValueError(f"expected columns with {prompt!r} among them, found {_shown(row)}")
        return PromptRecord(_prompt(row))
    columns = list(map(str, row))
    field = prompt or next((field for field in FIELDS if field in row), None)
    wanted = [*([] if field is None else [field]), *([name] if name else []), *([] if labels == "all" else labels)]
    if missing := [column for column in wanted if column not in row]:
        raise ValueError(f"no column {', '.join(map(repr, missing))}: it has {', '.join(columns)}")
    if field is None:
        raise ValueError(f"expected one of the fields {', '.join(FIELDS)}, found {', '.join(columns) or 'none'}")
    key = name or ("id" if "id" in row and field != "id" else None)
    own = None if key is None else _name(row[key], key)
    kept = [column for column in row if column not in (field, key)] if labels == "all" else labels
    return PromptRecord(_prompt(row[field]), own, {str(c): _plain(row[c]) for c in kept} or None)


def _name(value: Any, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{column}: expected a text or a whole number as a name, found {_shown(value)}")
    return str(value)


def _prompt(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, Mapping) and "role" in item for item in value):
            return value
        if all(type(item) is int for item in value):
            return value
    raise ValueError(f"expected a text, a list of chat messages or a list of token ids, found {_shown(value)}")


def _plain(value: Any) -> Any:
    """As JSON has it: nothing for not-a-number, and the text of what JSON does not know, such as a date."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict | list) else json.dumps(value, default=str)
    return f"{text[:60]}…" if len(text) > 60 else text
