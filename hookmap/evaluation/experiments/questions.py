"""Which questions are asked after which prefixes."""

import random
from dataclasses import dataclass

from hookmap.evaluation.experiments.document import Experiment, Prefix
from hookmap.evaluation.gsm8k.problems import DEMO, Question, read_questions

_DEMO_POOL = 2000
"""problems of the demo model, out of which a seed draws"""


@dataclass(frozen=True)
class Request:
    """One question after one prefix."""

    id: str
    """gsm8k_0001.anxious: the same in every run"""
    question: Question
    prefix: Prefix

    def answer_id(self, draw: int) -> str:
        """The name of one answer to it, 0-based."""
        return f"{self.id}.{draw}"


def requests(experiment: Experiment) -> list[Request]:
    """All of them, a question's prefixes beside each other. Raises DataError."""
    return [Request(f"{q.id}.{p.name}", q, p) for q in _questions(experiment) for p in experiment.prefixes]


def _questions(experiment: Experiment) -> list[Question]:
    chosen = experiment.samples
    if chosen.seed is None:
        return read_questions(chosen.data, chosen.number)
    everything = read_questions(chosen.data, _DEMO_POOL if chosen.data == DEMO else None)
    drawn = random.Random(chosen.seed).sample(everything, min(chosen.number, len(everything)))
    return sorted(drawn, key=lambda question: question.id)
