"""How well held-out texts are told: accuracy of classes, R² of numbers, with intervals that count whole questions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from hookmap.analysis.probes.metrics import Floats

Z = 1.959964
"""of 95 %"""


@dataclass(frozen=True)
class Score:
    """Accuracy or R²."""

    value: float
    low: float
    high: float


class Scores:
    """Sums over rows that a probe was not trained on, for each set of labels; no row and no score is kept."""

    def __init__(self, classes: int, sets: int, questions: int) -> None:
        self.classes, self.rows = classes, 0
        self._gained = np.zeros((sets, questions))
        """of classes the rows told right; of numbers the squares of the error"""
        self._possible = np.zeros((sets, questions))
        """of classes the rows; of numbers the squares around the mean of what was learnt"""
        self._loss = 0.0
        self.confusion = np.zeros((classes, classes), dtype=np.int64)
        """[true class, class told], of the real labels"""
        self._moments = np.zeros(5)
        """of the numbers told and true: sums, squares, products"""

    def state(self) -> dict[str, torch.Tensor]:
        """Every sum, as tensors that a file can hold."""
        found = {name: torch.from_numpy(getattr(self, f"_{name}")) for name in ("gained", "possible", "moments")}
        counts = {"rows": torch.tensor(self.rows), "loss": torch.tensor(self._loss, dtype=torch.float64)}
        return {**found, **counts, "confusion": torch.from_numpy(self.confusion)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Self:
        """The same again. Raises KeyError where the tensors are no state."""
        found = cls(len(state["confusion"]), *state["gained"].shape)
        found._gained, found._possible, found._moments = (
            state[name].numpy().copy() for name in ("gained", "possible", "moments")
        )
        found.rows, found._loss = int(state["rows"]), float(state["loss"])
        found.confusion = state["confusion"].numpy().copy()
        return found

    def take(self, scores: torch.Tensor, values: torch.Tensor, questions: torch.Tensor) -> None:
        """scores: [n, sets, outputs]; values: [sets, n]; questions: int64 [n]."""
        told, where = scores.double().cpu(), questions.cpu().numpy()
        true = values.double().cpu()
        self.rows += len(told)
        if self.classes:
            best = told.argmax(-1).T
            gained, possible = (best == true.long()).double(), torch.ones_like(true)
            logs = told[:, 0].log_softmax(-1).gather(1, true[0].long()[:, None])
            self._loss -= float(logs.sum())
            np.add.at(self.confusion, (true[0].long().numpy(), best[0].numpy()), 1)
        else:
            said = told[..., 0].T
            gained, possible = (said - true) ** 2, true**2
            a, b = said[0], true[0]
            self._moments += np.array([float(x.sum()) for x in (a, b, a * a, b * b, a * b)])
        for number in range(len(gained)):
            np.add.at(self._gained[number], where, gained[number].numpy())
            np.add.at(self._possible[number], where, possible[number].numpy())

    def of(self, number: int = 0) -> Score | None:
        """That of one set of labels: the real ones are 0. None without rows, or numbers that do not differ."""
        gained, possible = self._gained[number], self._possible[number]
        total = float(possible.sum())
        if not total:
            return None
        share = float(gained.sum()) / total
        if self.classes:
            effective = total**2 / float((possible**2).sum())
            return Score(share, *_wilson(share, effective))
        apart = gained - share * possible
        held = int((possible > 0).sum())
        half = Z * math.sqrt(float((apart**2).sum()) * held / max(1, held - 1)) / total
        return Score(1 - share, 1 - share - half, min(1.0, 1 - share + half))

    @property
    def controls(self) -> float | None:
        """The mean over the sets of the controls."""
        found = [score.value for n in range(1, len(self._gained)) if (score := self.of(n)) is not None]
        return float(np.mean(found)) if found else None

    @property
    def log_loss(self) -> float | None:
        """Of classes: the mean negative log-probability of the true one, in nats."""
        return self._loss / self.rows if self.classes and self.rows else None

    @property
    def balanced(self) -> float | None:
        """Of classes: the mean of the shares that are told right of each class."""
        counts = self.confusion.sum(1)
        held = counts > 0
        return float((np.diag(self.confusion)[held] / counts[held]).mean()) if held.any() else None

    @property
    def correlation(self) -> float | None:
        """Of numbers: Pearson's, of those told and those true."""
        if self.classes or not self.rows:
            return None
        a, b, aa, bb, ab = self._moments / self.rows
        spread = (aa - a * a) * (bb - b * b)
        return float((ab - a * b) / math.sqrt(spread)) if spread > 0 else None


def _wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion; it never has width 0."""
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def of_majority(classes: int, learnt: Floats, tested: Floats) -> float:
    """Accuracy of the class that is commonest in what is learnt."""
    counts = np.bincount(learnt.astype(np.int64), minlength=classes)
    return float((tested == counts.argmax()).mean())
