"""Which questions are asked with which prefixes."""

import random
from dataclasses import dataclass

from hookmap.evaluation.experiments.document import Experiment, Prefix
from hookmap.evaluation.gsm8k.problems import DEMO, Question, read_questions

_DEMO_POOL = 2000
"""the number of demo problems from which a seed chooses"""


@dataclass(frozen=True)
class Request:
    """One question with one prefix."""

    id: str
    """`gsm8k_0001.anxious`; it is the same in every run"""
    question: Question
    prefix: Prefix

    def answer_id(self, draw: int) -> str:
        """The id of an answer to it. `draw` counts from 0."""
        return f"{self.id}.{draw}"


def requests(experiment: Experiment) -> list[Request]:
    """All requests; those of one question are next to each other. Raises DataError where the data cannot be read."""
    return [Request(f"{q.id}.{p.name}", q, p) for q in _questions(experiment) for p in experiment.prefixes]


def _questions(experiment: Experiment) -> list[Question]:
    chosen = experiment.samples
    if chosen.seed is None:
        return read_questions(chosen.data, chosen.number)
    everything = read_questions(chosen.data, _DEMO_POOL if chosen.data == DEMO else None)
    drawn = random.Random(chosen.seed).sample(everything, min(chosen.number, len(everything)))
    return sorted(drawn, key=lambda question: question.id)
