"""What a streamed probe learns: a class or a number for each text or each token, and which texts it never sees."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from hookmap.activations import Sample
from hookmap.analysis.probes.examples import as_number, as_value, known_ids, label_table, question_of
from hookmap.analysis.probes.metrics import Floats, Ints
from hookmap.analysis.probes.pooling import POOLS, pooled_rows
from hookmap.errors import SelectionError
from hookmap.wording import counted

Kind = Literal["classes", "regression"]
KINDS: tuple[str, ...] = get_args(Kind)
Part = Literal["train", "choice", "test"]
TRAIN, CHOICE, TEST = get_args(Part)
MAX = "max"
STREAM_POOLS = {**{name: told for name, told in POOLS.items() if name != "each"}, MAX: "the largest of each feature"}
_TENTH: tuple[Part, ...] = (TEST, TRAIN, TRAIN, CHOICE, TRAIN, TEST, TRAIN, TRAIN, TRAIN, TRAIN)
"""of ten questions of one class: 7 to learn, 1 to choose the layer, 2 to test"""
_LEAST_QUESTIONS, _MOST_CLASSES, _SHOWN = 10, 1000, 8


@dataclass(frozen=True)
class Target:
    """What one text tells."""

    rows: Ints
    """which of its rows are read: one label for all of them together, or one for each"""
    values: Floats
    """[1 + shuffles, 1 or rows]: the class's number, or the value in standard deviations; then those of the controls"""
    part: Part
    question: int


@dataclass(frozen=True)
class Targets:
    """Those of all texts that have a label."""

    kind: Kind
    per: Literal["text", "token"]
    pool: str
    classes: tuple[Any, ...]
    """empty of numbers"""
    of: Mapping[int, Target]
    """by the number of the sample"""
    mean: float
    """of the numbers to learn from; 0 of classes"""
    deviation: float
    left_out: Mapping[str, int]
    """reason -> texts"""
    strangers: int
    """ids of the table of labels that no sample has"""

    @property
    def outputs(self) -> int:
        return len(self.classes) or 1

    @property
    def digest(self) -> str:
        """SHA-256 of what each text tells, and of the part that it is in."""
        made = hashlib.sha256(repr((self.classes, self.mean, self.deviation)).encode())
        for number, each in self.of.items():
            made.update(f"{number} {each.part} {each.question}".encode())
            made.update(each.rows.tobytes() + each.values.tobytes())
        return made.hexdigest()

    def numbers(self, *parts: Part) -> tuple[int, ...]:
        """The samples of these parts."""
        return tuple(number for number, each in self.of.items() if each.part in parts)

    def rows(self, *parts: Part) -> int:
        """Rows that a probe sees of these parts: texts, or tokens."""
        return sum(self.of[number].values.shape[1] for number in self.numbers(*parts))


def read_targets(
    samples: Iterable[Sample],
    label: str,
    labels: Any = None,
    *,
    kind: Kind = "classes",
    group: str | None = None,
    pool: str = "last",
    skip: int = 1,
    shuffles: int = 3,
    seed: int = 0,
) -> Targets:
    """labels: a table with `id`, as of `read_examples`; or a function of a `Sample`, which gives the label itself.

    A list is a label for each token of a text, or of its prompt. Raises SelectionError where there is nothing to learn.
    """
    held = tuple(samples)
    table = {} if labels is None or callable(labels) else label_table(labels, [n for n in (label, group) if n])
    ids = known_ids(held, table)
    read: dict[int, _Read] = {}
    questions: dict[Any, int] = {}
    left_out, seen = Counter[str](), Counter[str]()
    for sample in held:
        known = {**(sample.labels or {}), **table.get(sample.id, {})}
        seen.update(known.keys())
        given = labels(sample) if callable(labels) else known.get(label)
        question = question_of(sample) if group is None else as_value(known.get(group))
        found = f"no label {group!r}" if question is None else _read(sample, given, label, pool, skip)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            read[sample.sample] = found._replace(question=questions.setdefault(question, len(questions)))
    if not read:
        there = ", ".join(list(seen)[:_SHOWN]) or "none: keep columns of the data set (--label NAME), or give a table"
        reasons = "".join(f"\n{why}: {counted(count, 'text')}" for why, count in left_out.items())
        raise SelectionError(f"no text has a label {label!r}. The labels here are {there}.{reasons}")
    if len({each.of_tokens for each in read.values()}) > 1:
        raise SelectionError(f"label {label!r} is a list of tokens' labels for some texts, and one value for others.")
    of_tokens = next(iter(read.values())).of_tokens
    numbers, classes = _numbers(label, [each.values for each in read.values()], kind)
    groups = np.array([each.question for each in read.values()], dtype=np.int64)
    kinds = np.array([0 if of_tokens or not classes else own[0] for own in numbers])
    parts = _parts(groups, kinds, seed)
    learnt = np.concatenate([own for own, part in zip(numbers, parts, strict=True) if part == TRAIN])
    mean, deviation = (0.0, 1.0) if classes else (float(learnt.mean()), float(learnt.std()))
    if learnt.min() == learnt.max():
        raise SelectionError(f"label {label!r} is the same wherever the probe learns: there is nothing to tell apart.")
    numbers = [(own - mean) / deviation for own in numbers]
    if of_tokens:
        dealt = _by_token(numbers, [each.tokens for each in read.values()], parts, shuffles, seed)
    else:
        dealt = _by_question(numbers, groups, parts, shuffles, seed)
    targets = {
        number: Target(each.rows, np.stack([own, *(deal[place] for deal in dealt)]), parts[place], int(groups[place]))
        for place, ((number, each), own) in enumerate(zip(read.items(), numbers, strict=True))
    }
    strangers = len(table.keys() - ids)
    per: Literal["text", "token"] = "token" if of_tokens else "text"
    return Targets(kind, per, pool, classes, targets, mean, deviation, dict(left_out), strangers)


class _Read(NamedTuple):
    """What is read of one text."""

    rows: Ints
    values: list[Any]
    of_tokens: bool
    """whether each row has a label of its own"""
    tokens: Ints
    """the ids of these rows' tokens; of rows that are learnt together, empty"""
    question: int = 0


def _read(sample: Sample, given: Any, label: str, pool: str, skip: int) -> _Read | str:
    """What is read of a text, or why it is left out."""
    if hasattr(given, "tolist"):
        given = given.tolist()
    if not isinstance(given, list | tuple):
        value = as_value(given)
        if value is None:
            return f"no label {label!r}"
        rows = _pooled(sample, pool, skip)
        return rows if isinstance(rows, str) else _Read(rows, [value], False, np.empty(0, dtype=np.int64))
    if sample.positions == "mean":
        return "a mean over positions, which has no tokens"
    if len(given) not in (sample.prompt_tokens, len(sample.token_ids)):
        raise SelectionError(
            f"label {label!r} of sample {sample.sample} has {len(given)} values: expected one for each of its "
            f"{len(sample.token_ids)} tokens, or of its prompt's {sample.prompt_tokens}."
        )
    values = [as_value(each) for each in given]
    places = [
        (row, position)
        for row, position in enumerate(sample.row_positions)
        if skip <= position < len(values) and values[position] is not None
    ]
    if not places:
        return f"no token with a label {label!r}"
    read = [position for _, position in places]
    tokens = np.array([sample.token_ids[position] for position in read])
    return _Read(np.array([row for row, _ in places]), [values[position] for position in read], True, tokens)


def _pooled(sample: Sample, pool: str, skip: int) -> Ints | str:
    if not sample.rows:
        return "no rows in the capture"
    rows = pooled_rows(sample, "mean" if pool == MAX else pool, None)
    if sample.positions != "mean" and len(rows) > 1:
        rows = [row for row in rows if sample.row_positions[row] >= skip]
    return np.array(rows, dtype=np.int64) if len(rows) else f"no rows behind the first {counted(skip, 'token')}"


def _numbers(label: str, values: list[list[Any]], kind: Kind) -> tuple[list[Floats], tuple[Any, ...]]:
    """The labels as numbers, and the classes that they are of."""
    if kind == "regression":
        found = [[as_number(value) for value in own] for own in values]
        for own, numbers in zip(values, found, strict=True):
            if None in numbers:
                raise SelectionError(
                    f"label {label!r}: a regression needs numbers, found {own[numbers.index(None)]!r}."
                )
        return [np.array(own, dtype=np.float64) for own in found], ()
    counts = Counter(value for own in values for value in own)
    if len(counts) > _MOST_CLASSES:
        raise SelectionError(
            f"label {label!r} has {len(counts)} different values, and {_MOST_CLASSES} classes are the most: of numbers "
            'say kind="regression" (--kind regression).'
        )
    classes = tuple(sorted(counts, key=lambda value: (isinstance(value, str), value)))
    place = {value: number for number, value in enumerate(classes)}
    return [np.array([place[value] for value in own], dtype=np.float64) for own in values], classes


def _parts(groups: Ints, first: Floats, seed: int) -> list[Part]:
    """The part of each text: whole questions, of each class about the same shares. Raises SelectionError."""
    names, where, member = np.unique(groups, return_index=True, return_inverse=True)
    if len(names) < _LEAST_QUESTIONS:
        raise SelectionError(
            f"{counted(len(names), 'question')}: a probe needs {_LEAST_QUESTIONS} at least, of which some are held out."
        )
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(first[where][order], kind="stable")]
    parts = np.empty(len(names), dtype=object)
    parts[order] = [_TENTH[place % len(_TENTH)] for place in range(len(names))]
    return list(parts[member])


def _by_question(
    numbers: Sequence[Floats], groups: Ints, parts: Sequence[Part], count: int, seed: int
) -> list[list[Floats]]:
    """Labels dealt anew: each question gets another's of its part."""
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(place)
    found = []
    for deal in range(count):
        chance, dealt = np.random.default_rng([seed, deal]), list(numbers)
        for part in (TRAIN, CHOICE, TEST):
            own = [group for group, places in members.items() if parts[places[0]] == part]
            for group, donor in zip(own, chance.permutation(own).tolist(), strict=True):
                given = members[donor]
                for place, target in enumerate(members[group]):
                    dealt[target] = numbers[given[place % len(given)]]
        found.append(dealt)
    return found


def _by_token(
    numbers: Sequence[Floats], tokens: Sequence[Ints], parts: Sequence[Part], count: int, seed: int
) -> list[list[Floats]]:
    """A control task (Hewitt and Liang 2019): each token id has a label of its own, drawn from the learnt ones."""
    learnt = np.concatenate([own for own, part in zip(numbers, parts, strict=True) if part == TRAIN])
    kinds = np.unique(np.concatenate(list(tokens)))
    deals = [np.random.default_rng([seed, deal]).choice(learnt, len(kinds)) for deal in range(count)]
    return [[deal[np.searchsorted(kinds, own)] for own in tokens] for deal in deals]
