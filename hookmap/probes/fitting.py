"""A matrix [samples, features] and labels -> a linear probe. Each is a logit: sigmoid(x · weights + bias).

- `logistic`: logistic regression on standardised features, L2 with C = 0.1.
- `ridge`: least squares to ±1 on standardised features, L2 of 0.1 for each sample.
- `mean_difference`: the mean of the positives minus that of the negatives, in the tensor's own space.

The scores of the last two become logits by Platt's scaling: a logistic regression of the label on the score, on the
same training samples.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from hookmap.errors import SelectionError
from hookmap.probes.metrics import Floats, Labels

Method = Literal["logistic", "ridge", "mean_difference"]
METHODS: tuple[str, ...] = get_args(Method)
MISSING = 'probes need scikit-learn: pip install "hookmap[eval]"'
_STEPS = 10_000


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
    """Raises SelectionError for an unknown method, or labels of one class. A sparse matrix is not standardised."""
    if method not in METHODS:
        raise SelectionError(f"method {method!r}: expected one of {', '.join(METHODS)}.")
    if labels.all() or not labels.any():
        raise SelectionError("a probe needs positives and negatives: all labels here are the same.")
    sparse = hasattr(matrix, "tocsr")
    if method == "mean_difference":
        return _platt(matrix, labels, _centres(matrix, labels))
    mean, scale = (0.0, 1.0) if sparse else _standard(matrix)
    standardised = matrix if sparse else (matrix - mean) / scale
    weights, bias = _logistic(standardised, labels) if method == "logistic" else _ridge(standardised, labels)
    if not sparse:
        weights = weights / scale
        bias -= float(weights @ mean)
    fitted = Fitted(weights, bias)
    return fitted if method == "logistic" else _platt(matrix, labels, fitted)


def _centres(matrix: Any, labels: Labels) -> Fitted:
    positive = np.asarray(matrix[labels].mean(axis=0), dtype=np.float64).ravel()
    negative = np.asarray(matrix[~labels].mean(axis=0), dtype=np.float64).ravel()
    weights = positive - negative
    return Fitted(weights, -float(weights @ (positive + negative)) / 2)


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


def _platt(matrix: Any, labels: Labels, fitted: Fitted) -> Fitted:
    scores = fitted.logits(matrix)
    if not (spread := float(scores.std())):
        share = float(labels.mean())
        return Fitted(fitted.weights * 0, float(np.log(share / (1 - share))))
    model = _linear_model().LogisticRegression(C=1e3, max_iter=_STEPS).fit((scores / spread)[:, None], labels)
    factor = float(model.coef_[0][0]) / spread
    return Fitted(fitted.weights * factor, fitted.bias * factor + float(model.intercept_[0]))


def _linear_model() -> Any:
    try:
        from sklearn import linear_model
    except ImportError as error:
        raise SelectionError(f"{MISSING}\n({error})") from error
    return linear_model
