"""A linear probe that learns from rows a few at a time: softmax regression of classes, least squares of numbers.

It minimises the mean of the cross-entropy, or of half the squared error, plus `decay` / 2 times the squares of the
weights, of inputs that the first rows scale: as scikit-learn's LogisticRegression(C = 1 / (rows · decay)) of rows that
were standardised, and Ridge(alpha = rows · decay). Adam, with a rate that falls to 0. The labels of the controls are
learnt beside the real ones, from the same rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch

Tensor = torch.Tensor
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_FLAT = 8 * torch.finfo(torch.float32).eps
"""standard deviations below this share of the mean are rounding"""


@dataclass(frozen=True)
class Learning:
    """How a probe learns."""

    classes: int
    """0: numbers"""
    sets: int
    """of labels: the real ones, then those of the controls"""
    rows: int
    """that come, over all passes"""
    batch: int = 256
    """rows of a step"""
    rate: float = 3e-3
    decay: float = 1e-3
    seed: int = 0

    @property
    def outputs(self) -> int:
        return self.classes or 1


@dataclass(frozen=True)
class Scaling:
    """What is made of rows before they are read: dense ones are standardised, sparse ones get one factor."""

    mean: Tensor | None
    factor: Tensor
    """[d], or of sparse rows []"""
    projection: Tensor | None = None
    """[d, n]: random directions in place of the row's own numbers"""

    @classmethod
    def of(cls, rows: Tensor) -> Self:
        """That of the first rows, [n, d]."""
        if rows.is_sparse:
            values = rows.coalesce().values().double()
            size = (values.square().mean().sqrt() if len(values) else values.new_ones(())).clamp(min=1e-12)
            return cls(None, (1 / size).float())
        wide = rows.double()
        mean, deviation = wide.mean(0), wide.std(0, correction=0)
        flat = deviation <= _FLAT * mean.abs()
        return cls(mean.float(), torch.where(flat, 0, 1 / deviation.masked_fill(flat, 1)).float())

    def random(self, width: int, directions: int, seed: int) -> Self:
        """The same for rows of this width, seen along so many random directions."""
        drawn = torch.randn(width, directions, generator=torch.Generator().manual_seed(seed))
        drawn = (drawn / drawn.norm(dim=0)).to(self.factor.device)
        return type(self)(self.mean, self.factor, drawn)

    def inputs(self, rows: Tensor) -> Tensor:
        """[n, d] -> float32 [n, d], sparse where the rows are; [n, directions] of a projection."""
        rows = rows.float()
        found = rows * self.factor if self.mean is None else (rows - self.mean) * self.factor
        return found if self.projection is None else found @ self.projection


class Learner:
    """The weights of one tensor as they learn. They depend on the rows, their order and the seed alone."""

    def __init__(self, learning: Learning, scaling: Scaling, width: int) -> None:
        """`width`: of the inputs."""
        self.learning, self.scaling = learning, scaling
        columns, device = learning.sets * learning.outputs, scaling.factor.device
        self._weights = {
            "weight": torch.zeros(width, columns, device=device),
            "bias": torch.zeros(columns, device=device),
        }
        self._first = {name: torch.zeros_like(each) for name, each in self._weights.items()}
        self._second = {name: torch.zeros_like(each) for name, each in self._weights.items()}
        self.seen, self._steps = 0, 0

    def state(self) -> dict[str, Tensor]:
        """Everything but `learning`, as tensors that a file can hold."""
        found = {name: each for name, each in vars(self.scaling).items() if each is not None}
        for group, tensors in (("weight", self._weights), ("first", self._first), ("second", self._second)):
            found |= {f"{group}-{name}": each for name, each in tensors.items()}
        return found | {"seen": torch.tensor(self.seen), "steps": torch.tensor(self._steps)}

    @classmethod
    def from_state(cls, learning: Learning, state: Mapping[str, Tensor]) -> Self:
        """The same again. Raises KeyError where the tensors are no state."""
        scaling = Scaling(state.get("mean"), state["factor"], state.get("projection"))
        found = cls(learning, scaling, len(state["weight-weight"]))
        for group, tensors in (("weight", found._weights), ("first", found._first), ("second", found._second)):
            for name, each in tensors.items():
                each.copy_(state[f"{group}-{name}"])
        found.seen, found._steps = int(state["seen"]), int(state["steps"])
        return found

    def to(self, device: torch.device) -> Self:
        """Go where the rows are."""
        if self.scaling.factor.device != device:
            mean, factor, seen = (None if x is None else x.to(device) for x in vars(self.scaling).values())
            assert factor is not None
            self.scaling = Scaling(mean, factor, seen)
            for tensors in (self._weights, self._first, self._second):
                tensors.update({name: each.to(device) for name, each in tensors.items()})
        return self

    def learn(self, rows: Tensor, values: Tensor) -> None:
        """Learn rows [n, d] with their labels [sets, n], in an order of its own, `batch` at a time."""
        chance = torch.Generator().manual_seed((self.learning.seed * 1_000_003 + self.seen) % 2**63)
        order = torch.randperm(len(values[0]), generator=chance).to(rows.device)
        for places in torch.tensor_split(order, max(1, round(len(order) / self.learning.batch))):
            self._step(self.scaling.inputs(rows.index_select(0, places)), values[:, places])

    def _step(self, inputs: Tensor, values: Tensor) -> None:
        scores = self._scores(inputs)
        slope = (scores.softmax(-1) if self.learning.classes else scores) - self._wanted(values)
        slope = slope.flatten(1) / len(slope)
        weight = self._weights["weight"]
        gradients = {"weight": inputs.t() @ slope + self.learning.decay * weight, "bias": slope.sum(0)}
        self._steps += 1
        self.seen += values.shape[1]
        rate = self.learning.rate * max(0.0, 1 - (self.seen - values.shape[1]) / self.learning.rows)
        for name, gradient in gradients.items():
            first, second = self._first[name], self._second[name]
            first.lerp_(gradient, 1 - _BETAS[0])
            second.lerp_(gradient**2, 1 - _BETAS[1])
            size = (second / (1 - _BETAS[1] ** self._steps)).sqrt_().add_(_EPSILON)
            self._weights[name].addcdiv_(first, size, value=-rate / (1 - _BETAS[0] ** self._steps))

    def _wanted(self, values: Tensor) -> Tensor:
        """[sets, n] -> [n, sets, outputs]: 1 at the class, or the number."""
        if not self.learning.classes:
            return values.T[..., None].float()
        return torch.nn.functional.one_hot(values.T.long(), self.learning.classes).float()

    def _scores(self, inputs: Tensor) -> Tensor:
        found = inputs @ self._weights["weight"] + self._weights["bias"]
        return found.view(len(found), self.learning.sets, self.learning.outputs)

    def scores(self, rows: Tensor) -> Tensor:
        """[n, d] -> [n, sets, outputs]: of classes the logits, else the number."""
        return self._scores(self.scaling.inputs(rows))

    def readout(self) -> tuple[Tensor, Tensor]:
        """Of the real labels and rows as they are: weights float32 [d, outputs] and biases [outputs]."""
        outputs, factor = self.learning.outputs, self.scaling.factor
        weight = self._weights["weight"][:, :outputs].double()
        weight = weight * (factor.double()[:, None] if factor.ndim else factor.double())
        bias = self._weights["bias"][:outputs].double()
        if self.scaling.mean is not None:
            bias = bias - self.scaling.mean.double() @ weight
        return weight.float().cpu(), bias.float().cpu()


def pieces(rows: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows a few at a time, dense or sparse."""
    for start in range(0, rows.shape[0], size):
        part = slice(start, min(start + size, rows.shape[0]))
        yield part, rows.index_select(0, torch.arange(part.start, part.stop, device=rows.device))
