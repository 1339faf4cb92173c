"""A matrix [samples, features] and labels -> a linear probe. Each is a logit: sigmoid(x · weights + bias).

- `logistic`: logistic regression on standardised features, L2 with C = 0.1.
- `ridge`: least squares to ±1 on standardised features, L2 of 0.1 for each sample.
- `mean_difference`: the mean of the positives minus that of the negatives, in the tensor's own space.

The scores of the last two become logits by Platt's scaling: a logistic regression of the label on the score, on the
same training samples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from hookmap.errors import SelectionError
from hookmap.probes.metrics import Floats, Ints, Labels

Method = Literal["logistic", "ridge", "mean_difference"]
METHODS: tuple[str, ...] = get_args(Method)
MISSING = 'probes need scikit-learn: pip install "hookmap[eval]"'
_STEPS = 10_000
_ROWS = 256


@dataclass(frozen=True)
class Fitted:
    """A direction in the space of the features; x · weights + bias is the logit of the label."""

    weights: Floats
    """[features]"""
    bias: float

    def logits(self, matrix: Any) -> Floats:
        """[samples, features], dense or sparse -> [samples]."""
        return np.asarray(matrix @ self.weights, dtype=np.float64).ravel() + self.bias


def fit(matrix: Any, labels: Labels, method: str) -> Fitted:
    """Of all samples. Raises SelectionError for an unknown method, or labels of one class.

    A sparse matrix is not standardised.
    """
    (fitted,) = directions(matrix, labels, [np.arange(len(labels))], method)
    factor, shift = platt(fitted.logits(matrix), labels, method)
    return Fitted(fitted.weights * factor, fitted.bias * factor + shift)


def directions(matrix: Any, labels: Labels, trains: Sequence[Ints], method: str) -> list[Fitted]:
    """A probe of each training part, not calibrated yet. Raises as `fit` does."""
    if method not in METHODS:
        raise SelectionError(f"method {method!r}: expected one of {', '.join(METHODS)}.")
    if any(labels[train].all() or not labels[train].any() for train in trains):
        raise SelectionError("a probe needs positives and negatives: all labels here are the same.")
    if method == "mean_difference":
        return _centres(matrix, labels, trains)
    solve = _logistic if method == "logistic" else _ridge
    return [_solved(matrix[train], labels[train], solve) for train in trains]


def scores(matrix: Any, fitted: Sequence[Fitted]) -> Floats:
    """What each probe says of each sample, [samples, probes]."""
    weights = np.stack([one.weights for one in fitted], axis=1)
    found = np.concatenate([part @ weights for _, part in _parts(matrix)])
    return np.asarray(found + np.array([one.bias for one in fitted]), dtype=np.float64)


def platt(scores: Floats, labels: Labels, method: str) -> tuple[float, float]:
    """Factor and shift that make logits of what `directions` scored: those of a logistic regression are some."""
    if method == "logistic":
        return 1.0, 0.0
    if not (spread := float(scores.std())):
        share = float(labels.mean())
        return 0.0, float(np.log(share / (1 - share)))
    model = _linear_model().LogisticRegression(C=1e3, max_iter=_STEPS).fit((scores / spread)[:, None], labels)
    return float(model.coef_[0][0]) / spread, float(model.intercept_[0])


def _parts(matrix: Any) -> Iterator[tuple[slice, Any]]:
    """Rows in float64, a few at a time: a copy of the whole would be twice its size. A sparse matrix as it is."""
    if hasattr(matrix, "tocsr"):
        yield slice(None), matrix
        return
    for start in range(0, len(matrix), _ROWS):
        yield slice(start, start + _ROWS), matrix[start : start + _ROWS].astype(np.float64)


def _centres(matrix: Any, labels: Labels, trains: Sequence[Ints]) -> list[Fitted]:
    """All parts in one pass: their means are one product of the matrix with shares of each sample in each mean."""
    shares = np.zeros((len(labels), 2, len(trains)))
    for number, train in enumerate(trains):
        for side, mine in enumerate((train[labels[train]], train[~labels[train]])):
            shares[mine, side, number] = 1 / len(mine)
    flat = shares.reshape(len(labels), -1)
    means = sum(part.T @ flat[rows] for rows, part in _parts(matrix))
    positive, negative = means.reshape(-1, 2, len(trains)).transpose(1, 2, 0)
    return [Fitted(p - n, -float((p - n) @ (p + n)) / 2) for p, n in zip(positive, negative, strict=True)]


def _solved(matrix: Any, labels: Labels, solve: Callable[[Any, Labels], tuple[Floats, float]]) -> Fitted:
    if hasattr(matrix, "tocsr"):
        return Fitted(*solve(matrix, labels))
    mean, scale = _standard(matrix)
    weights, bias = solve((matrix - mean) / scale, labels)
    weights = weights / scale
    return Fitted(weights, bias - float(weights @ mean))


def _standard(matrix: Any) -> tuple[Any, Any]:
    scale = matrix.std(axis=0)
    scale[scale == 0] = 1
    return matrix.mean(axis=0), scale


def _logistic(matrix: Any, labels: Labels) -> tuple[Floats, float]:
    model = _linear_model().LogisticRegression(C=0.1, max_iter=_STEPS).fit(matrix, labels)
    return model.coef_[0].astype(np.float64), float(model.intercept_[0])


def _ridge(matrix: Any, labels: Labels) -> tuple[Floats, float]:
    model = _linear_model().Ridge(alpha=0.1 * matrix.shape[0]).fit(matrix, np.where(labels, 1.0, -1.0))
    return np.asarray(model.coef_, dtype=np.float64).ravel(), float(np.ravel(model.intercept_)[0])


def _linear_model() -> Any:
    try:
        from sklearn import linear_model
    except ImportError as error:
        raise SelectionError(f"{MISSING}\n({error})") from error
    return linear_model
