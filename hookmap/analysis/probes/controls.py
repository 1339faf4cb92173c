"""Predictions of the label without looking inside the model. A probe that is not better found nothing.

Each control is a logistic regression on scaled features of the text, cross-validated in the same folds as the probe.
For a fair comparison, the regularisation of the bag of words, and whether it counts pairs of words, are chosen within
the training part, as the layer of a probe is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hookmap.activations import Sample
from hookmap.analysis.probes.examples import as_number
from hookmap.analysis.probes.fitting import STRENGTH
from hookmap.analysis.probes.folds import Choice, held_out
from hookmap.analysis.probes.metrics import Floats, Ints, Labels
from hookmap.errors import SelectionError
from hookmap.stores.interface import Store

WORDS = r"\w+|[^\w\s]"
MOST_WORDS = 5000
STRENGTHS = (0.01, STRENGTH, 1.0)
"""C of the logistic regression of words"""
FEW = 10**6
"""counts of up to this many numbers are a dense matrix, which is fitted faster than a sparse one"""
LONGEST = (1, 2)
"""lengths of n-grams: up to single words, up to pairs"""
_ROWS = 256


@dataclass(frozen=True)
class Control:
    """One baseline."""

    name: str
    auroc: float | None
    """out of fold; None where it cannot be computed"""
    why: str | None = None
    """why not"""

    @property
    def sees_answer(self) -> bool:
        """Whether it uses the generated text."""
        return "prompt" not in self.name


def controls(store: Store, numbers: Sequence[int], labels: Labels, folds: Ints) -> tuple[Control, ...]:
    """The baselines: prompt length, answer length, words of prompt and answer, the model's log-probability."""

    def samples() -> Iterator[Sample]:
        return (store.sample(number) for number in numbers)

    sources: dict[str, Callable[[], Iterable[tuple[Any, float]]]] = {
        "prompt length": lambda: _column(sample.prompt_tokens for sample in samples()),
        "answer length": lambda: _column(len(s.token_ids) - s.prompt_tokens for s in samples()),
        "bag of words (prompt)": lambda: _words(sample.prompt for sample in samples()),
        "bag of words (answer)": lambda: _words(sample.text for sample in samples()),
        "logprob": lambda: _column(logprob(store, sample) for sample in samples()),
    }
    found = []
    for name, source in sources.items():
        choice = Choice[float](labels[None], folds)
        try:
            for matrix, strength in source():
                choice.take(strength, held_out(matrix, labels[None], folds, "logistic", strength))
            found.append(Control(name, float(choice.aurocs[0])))
        except SelectionError as error:
            found.append(Control(name, None, str(error)))
    return tuple(found)


def _column(values: Iterator[float]) -> list[tuple[Floats, float]]:
    return [(np.fromiter(values, dtype=np.float64)[:, None], STRENGTH)]


def _words(texts: Iterator[str]) -> Iterator[tuple[Any, float]]:
    """Counts of the commonest words in each text, with each strength of regularisation. The labels are not used."""
    from sklearn.feature_extraction.text import CountVectorizer

    held = list(texts)
    for longest in LONGEST:
        counter = CountVectorizer(
            token_pattern=WORDS, max_features=MOST_WORDS, ngram_range=(1, longest), dtype=np.float64
        )
        try:
            counts = counter.fit_transform(held)
        except ValueError as error:
            raise SelectionError("the texts hold no words") from error
        if counts.shape[0] * counts.shape[1] <= FEW:
            counts = counts.toarray()
        for strength in STRENGTHS:
            yield counts, strength


def logprob(store: Store, sample: Sample) -> float:
    """Mean log-probability of the answer's tokens: from a label of that name, else from the logits of the capture."""
    given = as_number((sample.labels or {}).get("logprob"))
    if given is not None:
        return given
    if ("logits", None) not in store.keys:
        raise SelectionError("the capture holds no logits, and its samples no label logprob")
    rows_of = {position: row for row, position in enumerate(sample.row_positions)}
    answered = range(sample.prompt_tokens, len(sample.token_ids))
    if not answered or any(position - 1 not in rows_of for position in answered):
        raise SelectionError(f"sample {sample.sample} has no answer, or its logits are not all kept")
    total = 0.0
    for start in range(0, len(answered), _ROWS):
        part = answered[start : start + _ROWS]
        logits = store.rows_at(sample.sample, ("logits", None), [rows_of[p - 1] for p in part]).float()
        tokens = torch.tensor([sample.token_ids[p] for p in part])
        total += float(logits.log_softmax(-1).gather(1, tokens[:, None]).double().sum())
    return total / len(answered)
