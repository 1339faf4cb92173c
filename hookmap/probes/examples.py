"""Which samples of a capture a probe learns from: the label of each, and which of them are one question."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from hookmap.activations import Sample
from hookmap.dataset_files import rows_of
from hookmap.errors import SelectionError
from hookmap.probes.metrics import Ints, Labels
from hookmap.stores.interface import Store

_SHOWN = 12


@dataclass(frozen=True)
class Examples:
    """Samples with a label, in the order of their numbers."""

    numbers: tuple[int, ...]
    """of the samples, in the store"""
    labels: Labels
    groups: Ints
    """which question each is of, 0-based; samples of one question are never on both sides of a split"""
    left_out: int
    """samples that have no such label, or nothing in it, or no rows"""
    label: str
    """what is positive, in words"""


def read_examples(
    store: Store,
    label: str,
    *,
    table: Any = None,
    positive: Any = None,
    above: float | None = None,
    group: str | None = None,
    limit: int | None = None,
) -> Examples:
    """The samples of `store` that have the label.

    label: a column of the samples' labels, or of `table`: a file (JSON Lines, CSV, …) or records with `id`.
    It is true or false, 0 or 1; else positive: the value that is, or above: numbers over this are.
    group: the column that says which samples are one question; else those of one prompt are. limit: samples at most.
    Raises SelectionError, DataError.
    """
    if positive is not None and above is not None:
        raise SelectionError("positive or above, not both: which of them says what is positive?")
    more = {} if table is None else _table(table)
    values: list[Any] = []
    numbers: list[int] = []
    names: list[str] = []
    left_out = 0
    seen: Counter[str] = Counter()
    for sample in store.samples:
        if limit is not None and len(numbers) == limit:
            break
        known = {**(sample.labels or {}), **more.get(sample.id or "", {})}
        seen.update(known)
        if known.get(label) is None or not sample.rows:
            left_out += 1
            continue
        values.append(known[label])
        numbers.append(sample.sample)
        names.append(_question(sample, known, group))
    if not numbers:
        held = ", ".join(list(seen)[:_SHOWN]) or "none: give a file of them with labels= (--labels)"
        raise SelectionError(f"no sample has a label {label!r}. The labels here are {held}.")
    found, words = _positive(label, values, positive, above)
    _, groups = np.unique(np.array(names), return_inverse=True)
    return Examples(tuple(numbers), found, groups.astype(np.int64), left_out, words)


def _table(source: Any) -> dict[str, Mapping[str, Any]]:
    where, rows = rows_of(source)
    found: dict[str, Mapping[str, Any]] = {}
    for place, row in rows:
        if isinstance(row, Exception) or not isinstance(row, Mapping) or "id" not in row:
            raise SelectionError(f"{where}: {place}: expected columns with an `id` among them, the sample's name.")
        found[str(row["id"])] = row
    return found


def _question(sample: Sample, known: Mapping[str, Any], group: str | None) -> str:
    if group is None:
        return hashlib.sha256(repr(sample.token_ids[: sample.prompt_tokens]).encode()).hexdigest()
    if known.get(group) is None:
        raise SelectionError(f"sample {sample.sample} has no label {group!r}, which says what question it is of.")
    return repr(known[group])


def _number(value: Any) -> float | None:
    """Of a number, or of a text that is one: a CSV file has nothing else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if isfinite(found) else None


def _positive(label: str, values: list[Any], positive: Any, above: float | None) -> tuple[Labels, str]:
    if above is not None:
        numbers = [_number(v) for v in values]
        if None in numbers:
            wrong = values[numbers.index(None)]
            raise SelectionError(f"label {label!r}: above={above:g} needs numbers, found {wrong!r}.")
        return np.array([number > above for number in numbers if number is not None]), f"{label} > {above:g}"
    if positive is not None:
        held = [_text(v) for v in values]
        if _text(positive) not in held:
            shown = ", ".join(name for name, _ in Counter(held).most_common(_SHOWN))
            raise SelectionError(f"label {label!r} is never {positive!r}: its values are {shown}.")
        return np.array([v == _text(positive) for v in held]), f"{label} = {_text(positive)}"
    if all(v in (0, 1) for v in values):  # True and False among them
        return np.array([bool(v) for v in values]), label
    shown = ", ".join(name for name, _ in Counter(map(_text, values)).most_common(_SHOWN))
    raise SelectionError(
        f"label {label!r} is not true or false: its values are {shown}. Say which one is positive (--positive VALUE), "
        "or above which number (--above NUMBER)."
    )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
