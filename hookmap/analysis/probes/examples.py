"""The samples of a capture that a probe learns from: their labels, and which of them belong to one question.

Labels, the positive value and groups are all read by one rule (`as_value`), whatever file they come from.
Samples that are left out are counted by reason.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from hookmap.activations import Sample
from hookmap.analysis.probes.metrics import Ints, Labels
from hookmap.datasets.files import rows_of
from hookmap.errors import SelectionError
from hookmap.stores.interface import Store
from hookmap.wording import counted

_SHOWN = 12
_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")


@dataclass(frozen=True)
class Examples:
    """Samples with a label, in the order of their numbers."""

    numbers: tuple[int, ...]
    """of the samples, in the store"""
    labels: Labels
    groups: Ints
    """the question of each sample, 0-based; samples of one question are never on both sides of a split"""
    left_out: Mapping[str, int]
    """reason -> samples"""
    label: str
    """the condition of a positive sample, in words"""
    strangers: int = 0
    """rows of the table without a sample"""


def as_value(given: Any) -> Any:
    """The value of a label: True or False, a number, a text, or None where it has none.

    None stands for None, nan, pandas's NA, and a text that is blank, `nan` or `null`. Texts are stripped; `true` and
    `false` become booleans and numerals numbers, because a CSV file holds only texts. Values are compared as in
    Python: 3 is 3.0, and 1 is True.
    """
    if hasattr(given, "item") and getattr(given, "size", 1) == 1:  # NumPy's
        given = given.item()
    if given is None or type(given).__name__ in ("NAType", "NaTType") or (isinstance(given, float) and given != given):
        return None
    if isinstance(given, bool | int | float):
        return given
    text = str(given).strip()
    if not text or text.lower() in ("nan", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text):
        return int(text)
    try:
        return text if "_" in text else float(text)
    except ValueError:
        return text


def as_number(given: Any) -> float | None:
    """The label if it is a finite number, else None."""
    value = as_value(given)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if isfinite(value) else None
    except OverflowError:
        return None


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
    It is true or false, 0 or 1; else give positive, the positive value, or above: larger numbers are positive.
    group: the column that names each sample's question; else samples of one prompt share one. limit: most samples.
    Raises SelectionError, also where two rows of the table contradict each other, and DataError.
    """
    if positive is not None and above is not None:
        raise SelectionError("positive or above, not both: which of them says what is positive?")
    more = {} if table is None else label_table(table, [name for name in (label, group) if name is not None])
    ids = known_ids(store.samples, more)
    values: list[Any] = []
    numbers: list[int] = []
    groups: list[int] = []
    names: dict[Any, int] = {}
    left_out: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for sample in store.samples:
        if limit is not None and len(numbers) == limit:
            break
        known = {**(sample.labels or {}), **more.get(sample.id, {})}
        seen.update(known.keys())
        question = question_of(sample) if group is None else as_value(known.get(group))
        if why := _why_not(sample, known, label, question, group):
            left_out[why] += 1
            continue
        values.append(as_value(known[label]))
        numbers.append(sample.sample)
        groups.append(names.setdefault(question, len(names)))
    if not numbers:
        held = ", ".join(list(seen)[:_SHOWN]) or "none: give a file of them with labels= (--labels)"
        reasons = "".join(f"\n{why}: {_samples(count)}" for why, count in left_out.items())
        raise SelectionError(f"no sample has a label {label!r}. The labels here are {held}.{reasons}")
    found, words = _positive(label, values, positive, above)
    strangers = len(more.keys() - ids)
    return Examples(tuple(numbers), found, np.array(groups, dtype=np.int64), dict(left_out), words, strangers)


def _why_not(sample: Sample, known: Mapping[str, Any], label: str, question: Any, group: str | None) -> str | None:
    if label not in known:
        return f"no label {label!r}"
    if as_value(known[label]) is None:
        return f"label {label!r} is blank, null or not a number"
    if question is None:
        return f"no label {group!r}, which says what question it is of"
    return None if sample.rows else "no rows in the capture"


def _samples(count: int) -> str:
    return counted(count, "sample")


def label_table(source: Any, columns: list[str]) -> dict[str | None, dict[str, Any]]:
    """The rows by id. A later row of an id may fill blanks, but must not contradict an earlier one in `columns`."""
    where, rows = rows_of(source)
    found: dict[str | None, dict[str, Any]] = {}
    apart: list[str] = []
    for place, row in rows:
        if isinstance(row, Exception) or not isinstance(row, Mapping) or as_value(row.get("id")) is None:
            raise SelectionError(f"{where}: {place}: expected columns with an `id` among them, the sample's name.")
        before = found.setdefault(_id(row["id"]), {})
        for name, value in row.items():
            old = as_value(before.get(name))
            if name in columns and old is not None and as_value(value) not in (None, old):
                apart.append(f"{place}: {name} of id {row['id']!r} is {value!r}, and was {before[name]!r} before")
            if old is None:
                before[name] = value
    if apart:
        more = f"\n… and {len(apart) - _SHOWN} more" if len(apart) > _SHOWN else ""
        raise SelectionError(f"{where}: rows contradict each other:\n" + "\n".join(apart[:_SHOWN]) + more)
    return found


def _id(given: Any) -> str:
    """An id as text; 3.0 is 3, because a data frame with gaps makes floats of integers."""
    return str(int(given)) if isinstance(given, float) and given.is_integer() else str(given)


def known_ids(samples: Iterable[Sample], table: Mapping[str | None, Any]) -> set[str | None]:
    """The ids of the samples. Raises SelectionError where an id of the table has samples with different prompts."""
    prompts: dict[str | None, str] = {}
    for sample in samples if table else ():
        if sample.id is None:
            continue
        own = question_of(sample)
        if sample.id in table and prompts.setdefault(sample.id, own) != own:
            raise SelectionError(
                f"id {sample.id!r} is of several samples with different prompts: which of them is the table's?"
            )
    return set(prompts)


def question_of(sample: Sample) -> str:
    """A digest of the prompt's tokens, which identifies the question."""
    return hashlib.sha256(repr(sample.token_ids[: sample.prompt_tokens]).encode()).hexdigest()


def _positive(label: str, values: list[Any], positive: Any, above: float | None) -> tuple[Labels, str]:
    if above is not None:
        numbers = [as_number(v) for v in values]
        if None in numbers:
            wrong = values[numbers.index(None)]
            raise SelectionError(f"label {label!r}: above={above:g} needs numbers, found {wrong!r}.")
        return np.array([number > above for number in numbers if number is not None]), f"{label} > {above:g}"
    if positive is not None:
        wanted = as_value(positive)
        if wanted is None or wanted not in values:
            raise SelectionError(f"label {label!r} is never {positive!r}: its values are {_some(values)}.")
        return np.array([v == wanted for v in values]), f"{label} = {_text(positive)}"
    if all(v in (0, 1) for v in values):  # True and False among them
        return np.array([bool(v) for v in values]), label
    raise SelectionError(
        f"label {label!r} is not true or false: its values are {_some(values)}. Say which one is positive "
        "(--positive VALUE), or above which number (--above NUMBER)."
    )


def _some(values: list[Any]) -> str:
    return ", ".join(name for name, _ in Counter(map(_text, values)).most_common(_SHOWN))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
