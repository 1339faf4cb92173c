"""Read the questions from a file in GSM8K's format, from the hub, or from the bundled demo problems."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hookmap.datasets.files import rows_of
from hookmap.datasets.records import told
from hookmap.errors import DataError
from hookmap.evaluation.gsm8k.answers import strict

DEMO = "demo"
_SEED = 12345


@dataclass(frozen=True)
class Question:
    """One question and the number that answers it."""

    id: str
    """gsm8k_0001: its place in the source, so that it is the same in every run"""
    question: str
    answer: str
    """the worked answer; its last line is `#### x`"""

    @property
    def target(self) -> str:
        """The text of the number after `####`."""
        return self.answer.rpartition("####")[2].strip()


def read_questions(source: Any, samples: int | None = None, skip: int = 0) -> list[Question]:
    """The questions. source: a file of rows with `question` and `answer` (JSON Lines, …), "hf://NAME:SPLIT", or "demo".

    Raises DataError with every wrong row at once.
    """
    if source == DEMO:
        from hookmap.demo import sample_problems

        drawn = sample_problems(skip + (100 if samples is None else samples), _SEED)
        return [Question(f"gsm8k_{n + 1:04d}", p.question, p.answer_text) for n, p in enumerate(drawn)][skip:]
    where, rows = rows_of(source)
    found, problems = [], []
    for number, (place, row) in enumerate(rows):
        if number < skip:
            continue
        if samples is not None and number >= skip + samples:
            break
        try:
            found.append(_question(number + 1, row))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise DataError(f"{where}:\n{told(problems)}")
    if not found:
        raise DataError(f"{where}: it holds no questions.")
    return found


def _question(number: int, row: Any) -> Question:
    if isinstance(row, Exception):
        raise ValueError(str(row))
    texts = isinstance(row, Mapping) and all(isinstance(row.get(name), str) for name in ("question", "answer"))
    if not texts or strict(row["answer"]) is None:
        raise ValueError("expected a `question` and an `answer` that ends in `#### x`, both texts")
    return Question(f"gsm8k_{number:04d}", row["question"], row["answer"])
