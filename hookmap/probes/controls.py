"""What is known of the label without looking inside the model. A probe that is no better found nothing.

Each control is a logistic regression on what the sample shows, cross-validated in the same folds as the probe.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hookmap.activations import Sample
from hookmap.errors import SelectionError
from hookmap.probes.folds import Split, out_of_fold
from hookmap.probes.metrics import Floats, Ints, Labels
from hookmap.stores.interface import Store

WORDS = r"\w+|[^\w\s]"
MOST_WORDS = 5000
_ROWS = 256


@dataclass(frozen=True)
class Control:
    """One thing to be better than."""

    name: str
    scores: Floats | None
    """out of fold, [samples]; None where it cannot be told"""
    why: str | None = None
    """why not"""

    @property
    def sees_answer(self) -> bool:
        """Whether it looks at what was generated."""
        return "prompt" not in self.name


def controls(store: Store, numbers: Sequence[int], labels: Labels, folds: Ints) -> tuple[Control, ...]:
    """Prompt length, answer length, words of the prompt and of the answer, and the model's own log-probability."""

    def samples() -> Iterator[Sample]:
        return (store.sample(number) for number in numbers)

    sources: dict[str, Callable[[], Any]] = {
        "prompt length": lambda: _column(sample.prompt_tokens for sample in samples()),
        "answer length": lambda: _column(len(s.token_ids) - s.prompt_tokens for s in samples()),
        "bag of words (prompt)": lambda: _words(sample.prompt for sample in samples()),
        "bag of words (answer)": lambda: _words(sample.text for sample in samples()),
        "logprob": lambda: _column(_logprob(store, sample) for sample in samples()),
    }
    found = []
    for name, source in sources.items():
        try:
            scores = out_of_fold(source(), labels, Split(folds), "logistic").held_out(folds)
            found.append(Control(name, scores))
        except SelectionError as error:
            found.append(Control(name, None, str(error)))
    return tuple(found)


def _column(values: Iterator[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)[:, None]


def _words(texts: Iterator[str]) -> Any:
    """How often each word is in each text, sparse; the commonest words of all texts, labels unseen."""
    from sklearn.feature_extraction.text import CountVectorizer

    try:
        return CountVectorizer(token_pattern=WORDS, max_features=MOST_WORDS, dtype=np.float64).fit_transform(texts)
    except ValueError as error:
        raise SelectionError("the texts hold no words") from error


def _logprob(store: Store, sample: Sample) -> float:
    """Mean log-probability of the answer's tokens: a label of that name, else out of the logits of the capture."""
    given = (sample.labels or {}).get("logprob")
    if isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    if ("logits", None) not in store.keys:
        raise SelectionError("the capture holds no logits, and its samples no label logprob")
    known = range(sample.rows) if sample.positions is None else sample.positions
    rows_of = {} if known == "mean" else {int(position): row for row, position in enumerate(known)}
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
