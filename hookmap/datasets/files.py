"""The rows of a data set, each with its place: JSON Lines, JSON, CSV, Parquet, text, Hugging Face data sets.

What a row means is not known here. A row that cannot be read is an exception in its place.
"""

import csv
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from hookmap.documents import read_json
from hookmap.errors import DataError
from hookmap.extras import needed
from hookmap.placeholders import is_pointer, pointers_told

FORMATS = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")
_NEEDS_DATASETS = 'a Hugging Face data set needs the datasets library: pip install "hookmap[data]"'
_LONGEST_CELL = 2**31 - 1  # the csv module's own limit is 128 KiB; this is the largest C long on every system


def rows_of(source: Any) -> tuple[str, Iterator[tuple[str, Any]]]:
    """The name of the source for messages, and its rows, each with its place. Raises DataError."""
    if isinstance(source, str) and source.startswith("hf://"):
        return source, _numbered(_from_hub(source.removeprefix("hf://")), "row")
    if isinstance(source, Mapping):  # a datasets.DatasetDict is one
        raise DataError(f"prompts: expected one data set or an iterable of records, got a mapping of {_some(source)}")
    if (columns := columns_of(source)) is not None:
        _check_names("the table", list(map(str, columns)))
        return "the table", _numbered(_table_rows(source), "row")
    if not isinstance(source, str | os.PathLike):
        if not isinstance(source, Iterable) or isinstance(source, bytes):
            raise DataError(f"prompts: expected a file, a data set or an iterable of records, got {source!r:.80}")
        return "prompts", _numbered(source, "record")
    path = Path(source)
    if path.is_dir():
        return str(path), _numbered(_from_folder(path), "row")
    if is_pointer(path):
        raise DataError(f"the prompts file {path} cannot be read: {pointers_told(path.parent, [path.name])}")
    kind = next((s for s in reversed([s.lower() for s in path.suffixes]) if s != ".gz"), "")
    tsv = partial(_csv, separator="\t")
    readers: dict[str, Any] = {".json": _json, ".csv": _csv, ".tsv": tsv, ".txt": _text, ".parquet": _parquet}
    if kind not in FORMATS:
        raise DataError(f"{path}: expected a file of {', '.join(FORMATS)}, found {kind or 'no ending'}")
    rows: Iterator[tuple[str, Any]] = readers.get(kind, _json_lines)(path)
    return str(path), rows


def columns_of(source: Any) -> list[Any] | None:
    """The columns of a table in memory: a DataFrame of pandas or polars, an Arrow table. None for anything else."""
    if hasattr(source, "to_dict") and hasattr(source, "iterrows"):  # pandas
        return list(source.columns)
    if hasattr(source, "to_pylist") and hasattr(source, "schema"):  # pyarrow
        return list(source.schema.names)
    if hasattr(source, "to_dicts"):  # polars
        return list(source.columns)
    return None


def _table_rows(table: Any) -> Iterable[Mapping[Any, Any]]:
    """A missing cell becomes None."""
    if hasattr(table, "iterrows"):
        found: Iterable[Mapping[Any, Any]] = table.astype(object).where(table.notna(), None).to_dict("records")
    else:
        found = table.to_pylist() if hasattr(table, "to_pylist") else table.to_dicts()
    return found


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The text of a file, gzip or not, with or without a byte order mark."""
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as unpacked:
                yield unpacked
        else:
            with open(path, encoding="utf-8-sig", newline="") as plain:
                yield plain
    except UnicodeDecodeError as error:  # its own position is one within a buffer
        raise DataError(f"the prompts file {path} cannot be read: {_first_bad_line(path)}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"the prompts file {path} cannot be read: {error}") from error


def _first_bad_line(path: Path) -> str:
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8: byte {error.start + 1} of it is 0x{line[error.start]:02x}"
    return "it is not UTF-8"


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return read_json(line)
    except json.JSONDecodeError as error:
        return ValueError(f"column {error.colno}: not JSON: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        return ValueError(f"not JSON that can be read: {error}")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, one record, or JSON Lines under that name."""
    with _opened(path) as file:
        text = file.read()
    document = _parsed(text)
    if isinstance(document, list):
        yield from _numbered(document, "record")
    elif isinstance(document, Mapping):
        yield "record 0", document
    elif isinstance(document, ValueError) and text.lstrip().startswith("["):
        raise DataError(f"{path}: {document}")
    else:
        yield from _json_lines(path)


def _text(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", line.rstrip("\r\n")


def _csv(path: Path, separator: str = ",") -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_LONGEST_CELL)
    columns: list[str] = []
    with _opened(path) as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        while True:
            place = f"line {reader.line_num + 1}"  # where the row begins: a cell may hold line ends
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield place, ValueError(str(error))
                return
            if cells is None:
                return
            if not columns:
                columns = cells
                _check_names(path, columns)
            elif len(cells) == len(columns):
                yield place, dict(zip(columns, cells, strict=True))
            elif cells:
                yield place, ValueError(f"expected {len(columns)} columns, as the first line has, found {len(cells)}")


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    why = f'{path}: Parquet needs pyarrow: pip install "hookmap[data]"'
    pyarrow, parquet = (needed(name, why, DataError) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        with parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _numbered(rows, "row")
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"the prompts file {path} cannot be read: {error}") from error


def _check_names(path: Path | str, names: Sequence[str]) -> None:
    """Refuses two columns of one name: a row would silently keep the last."""
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"{path}: expected each column once, found {', '.join(map(repr, twice))} more than once")


def _from_hub(name: str) -> Iterable[Any]:
    name, _, split = name.partition(":")
    datasets = needed("datasets", _NEEDS_DATASETS, DataError)
    try:
        found: Iterable[Any] = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # its many readers raise errors of their own
        raise DataError(f"hf://{name}: {error}") from error
    return found


def _from_folder(path: Path) -> Iterable[Any]:
    datasets = needed("datasets", _NEEDS_DATASETS, DataError)
    try:
        found: Iterable[Any] = datasets.load_from_disk(str(path))
    except Exception as error:  # as above
        raise DataError(f"{path}: expected a folder of datasets.save_to_disk: {error}") from error
    if isinstance(found, Mapping):
        raise DataError(
            f"{path} holds the splits {_some(found)}: expected one. For example: {path / next(iter(found))}"
        )
    return found


def _some(names: Iterable[Any]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:5]) + (", …" if len(shown) > 5 else "")


def _numbered(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    return ((f"{name} {number}", row) for number, row in enumerate(rows))
