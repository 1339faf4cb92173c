"""Fits linear probes to a matrix and labels: a score is x · weights + bias.

- `logistic`: logistic regression on standardised features, L2 with C = 0.1.
- `ridge`: least squares to ±1 on standardised features, L2 of 0.1 for each sample.
- `mean_difference`: the mean of the positives minus that of the negatives, in the tensor's own space.

Many labellings of the same samples are fitted together, because shuffled labels take most of a report's time. Platt
scaling, on samples that the probe was not fitted on, turns scores into logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from hookmap.analysis.probes.metrics import Floats, Labels
from hookmap.errors import SelectionError
from hookmap.extras import needed

Method = Literal["logistic", "ridge", "mean_difference"]
METHODS: tuple[str, ...] = get_args(Method)

STRENGTH = 0.1
"""C of the logistic regression"""
ROUNDING = 8 * float(np.finfo(np.float32).eps)
"""standard deviations below this share of the mean are rounding errors, as activations are float32 at best"""
_STEPS = 500
_CLOSE = 2e-6
_LEAST_SLOPE = 1e-3
_AT_ONCE = 2_000_000
"""scores that are fitted together, 16 MB of them"""
_ROWS = 256


@dataclass(frozen=True)
class Fitted:
    """A direction in the space of the features; x · weights + bias is the logit of the label."""

    weights: Floats
    """[features]"""
    bias: float


def directions(matrix: Any, labels: Labels, method: str, strength: float = STRENGTH) -> tuple[Floats, Floats]:
    """An uncalibrated probe for each labelling: weights [features, labellings] and biases [labellings].

    matrix: [samples, features], dense, or sparse for a logistic regression, which then scales but does not centre it.
    labels: [labellings, samples]. A labelling of one class has weights of 0.
    """
    told = labels.any(axis=1) & ~labels.all(axis=1)
    weights, biases = np.zeros((matrix.shape[1], len(labels))), np.zeros(len(labels))
    if told.any():
        if hasattr(matrix, "tocsr"):
            found = _sparse(matrix, labels[told], strength)
        elif method == "mean_difference":
            found = _centres(matrix, labels[told])
        else:
            found = _standardised(matrix, labels[told], method, strength)
        weights[:, told], biases[told] = found
    return weights, biases


def moments(matrix: Any) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each feature in float64; a deviation is 0 where it is only rounding.

    This is scikit-learn's rule for constant features at float32's precision. Besides, all are 0 where no feature varies
    by more than rounding relative to the size of the whole tensor.
    """
    mean = np.asarray(sum(part.sum(axis=0) for _, part in _parts(matrix)) / len(matrix))
    variance = np.asarray(sum(((part - mean) ** 2).sum(axis=0) for _, part in _parts(matrix)) / len(matrix))
    scale = np.sqrt(variance)
    scale[scale <= ROUNDING * np.abs(mean)] = 0
    if scale.max(initial=0) <= ROUNDING * np.sqrt(np.mean(mean**2 + variance)):
        scale[:] = 0
    return mean, scale


def platt(scores: Floats, labels: Labels) -> tuple[float, float]:
    """Factor and shift that turn scores into logits (Platt 1999). The probe must not be fitted on these samples.

    The factor of a probe that is worse than chance here is next to 0, but positive, so that its direction stays.
    """
    share = (labels.sum() + 1) / (len(labels) + 2)
    spread, middle = float(scores.std()), float(scores.mean())
    if spread <= ROUNDING * abs(middle):
        return 0.0, float(np.log(share / (1 - share)))
    sides, centred = labels.sum(), ((scores - middle) / spread)[:, None]
    sure = np.where(labels, (sides + 1) / (sides + 2), 1 / (len(labels) - sides + 2))  # Platt's: never 0 or 1
    twice, kinds = np.concatenate([centred, centred]), np.repeat([True, False], len(labels))
    model = sklearn("linear_model").LogisticRegression(C=1e6, max_iter=_STEPS)
    model.fit(twice, kinds, sample_weight=np.concatenate([sure, 1 - sure]))
    slope, shift = float(model.coef_[0][0]), float(model.intercept_[0])
    if slope < _LEAST_SLOPE:
        slope, shift = _LEAST_SLOPE, float(np.log(share / (1 - share)))
    return slope / spread, shift - slope * middle / spread


def _parts(matrix: Any) -> Iterator[tuple[slice, Any]]:
    """Rows in float64, a few at a time, because a copy of the whole would need twice its memory."""
    for start in range(0, len(matrix), _ROWS):
        yield slice(start, start + _ROWS), matrix[start : start + _ROWS].astype(np.float64)


def _centres(matrix: Any, labels: Labels) -> tuple[Floats, Floats]:
    """The class means of all labellings, as one product of the matrix with each sample's share in each mean."""
    sides = labels.sum(axis=1)
    shares = np.concatenate([labels.T / sides, ~labels.T / (labels.shape[1] - sides)], axis=1)
    means = sum(part.T @ shares[rows] for rows, part in _parts(matrix))
    positive, negative = np.split(means, 2, axis=1)
    weights = positive - negative
    return weights, -(weights * (positive + negative)).sum(axis=0) / 2


def _standardised(matrix: Any, labels: Labels, method: str, strength: float) -> tuple[Floats, Floats]:
    mean, scale = moments(matrix)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = np.empty(matrix.shape, dtype=np.float32)
    for rows, part in _parts(matrix):
        scaled[rows] = (part - mean) * inverse
    if method == "ridge":
        found, biases = _descend(scaled, np.where(labels, 1.0, -1.0).T, 0.1 * len(matrix), 1.0, lambda f, y: f - y)
    else:
        found, biases = _descend(
            scaled, labels.T.astype(np.float64), 1 / strength, 0.25, lambda f, y: (1 + np.tanh(f / 2)) / 2 - y
        )
    weights = found * inverse[:, None]
    return weights, biases - mean @ weights


def _descend(
    x: Any, targets: Floats, penalty: float, curvature: float, slope: Callable[[Floats, Floats], Floats]
) -> tuple[Floats, Floats]:
    """Minimise loss(x @ w + b, targets) + penalty / 2 |w|² for every column of targets, [samples, labellings].

    slope: of the loss; curvature: its upper bound. Newton's steps with that curvature need one factorisation for
    all columns and all steps (Böhning & Lindsay 1988), of the smaller of x'x and xx'. x: centred, float32.
    """
    from scipy.linalg import cho_factor

    wide = x.shape[1] > x.shape[0]  # then w = x' u, with one entry of u per sample
    gram = (x @ x.T if wide else x.T @ x).astype(np.float64)
    hessian = curvature * gram
    hessian[np.diag_indices_from(hessian)] += penalty
    factor = cho_factor(hessian, overwrite_a=True)
    step = max(1, _AT_ONCE // len(x))
    blocks = [targets[:, start : start + step] for start in range(0, targets.shape[1], step)]
    found = [_steps(x, gram if wide else None, factor, block, penalty, curvature, slope) for block in blocks]
    weights, biases = (np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
    return weights, biases


def _steps(
    x: Any,
    gram: Any | None,
    factor: Any,
    targets: Floats,
    penalty: float,
    curvature: float,
    slope: Callable[[Floats, Floats], Floats],
) -> tuple[Floats, Floats]:
    """gram: xx' where x is wide. factor: of the penalty and curvature times the smaller product."""
    from scipy.linalg import cho_solve

    at, shift = np.zeros((min(x.shape), targets.shape[1])), np.zeros(targets.shape[1])
    scores = np.zeros_like(targets)
    before, pace, moved = (at, shift, scores), 1.0, np.inf
    for _ in range(_STEPS):
        down = slope(scores, targets)
        pull = x.T @ down.astype(np.float32) if gram is None else down
        new = at - cho_solve(factor, pull + penalty * at)
        new_shift = shift - down.mean(axis=0) / curvature
        new_scores = (x @ new.astype(np.float32) if gram is None else gram @ new) + new_shift
        last, moved = moved, float(np.abs(new_scores - scores).max())
        if moved < _CLOSE * (1 + float(np.abs(new_scores).max())):
            break
        pace, old = (1.0, 1.0) if moved > last else ((1 + np.sqrt(1 + 4 * pace**2)) / 2, pace)
        push = (old - 1) / pace  # Nesterov's momentum, restarted where it overshoots
        after = (new, new_shift, new_scores)
        at, shift, scores = (a + push * (a - b) for a, b in zip(after, before, strict=True))
        before = after
    return (new if gram is None else x.T @ new.astype(np.float32)).astype(np.float64), new_shift


def _sparse(matrix: Any, labels: Labels, strength: float) -> tuple[Floats, Floats]:
    scaler = sklearn("preprocessing").StandardScaler(with_mean=False)
    scaled = scaler.fit_transform(matrix)
    model = sklearn("linear_model").LogisticRegression(C=strength, max_iter=10_000)
    fits = [(model.fit(scaled, own).coef_[0] / scaler.scale_, float(model.intercept_[0])) for own in labels]
    return np.stack([weights for weights, _ in fits], axis=1), np.array([bias for _, bias in fits])


def sklearn(name: str) -> Any:
    """A module of scikit-learn. Raises SelectionError where it is not installed."""
    return needed(f"sklearn.{name}", 'probes need scikit-learn: pip install "hookmap[eval]"', SelectionError)
