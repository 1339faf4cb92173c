"""Learns a sparse autoencoder from rows: top-k (Gao et al. 2024) or JumpReLU (Rajamanoharan et al. 2024). No model.

Rows are scaled by one number, so that their mean norm is the root of their width, and the number is folded into the
weights at the end. The decoder's rows have length 1. Top-k: the mean squared error, and of features that have been
silent for long, the share of the error that they would explain. JumpReLU: the mean squared error, and the square of
how far the number of active features is from `k`, as a share; the thresholds learn by a straight-through estimator.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from hookmap.analysis.dictionaries.dictionary import About, Dictionary
from hookmap.errors import SelectionError

Tensor = torch.Tensor
Kind = Literal["topk", "jumprelu"]
KINDS: tuple[str, ...] = get_args(Kind)

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_WARM_UP, _COOL_DOWN = 0.05, 0.2
"""shares of the training in which the learning rate rises, and falls"""
_AUXILIARY = 1 / 32
"""weight of what silent features would explain"""
_BANDWIDTH = 0.1
"""of JumpReLU: how near to a threshold a number moves it; rows have a mean size of 1"""
_LEAST_THRESHOLD, _FIRST_ROWS = 1e-3, 1024
_SPARSITY = 0.3
"""weight of JumpReLU's distance from k, in shares of the rows' variance"""


@dataclass(frozen=True)
class Learning:
    """How a dictionary is trained."""

    kind: Kind
    features: int
    k: int
    """active features of a row: exactly (top-k), or aimed at on average (JumpReLU)"""
    rows: int
    """that the whole training sees"""
    batch: int
    """rows of one step"""
    rate: float
    """of Adam, at its highest"""
    silent: int
    """rows after which a feature that was not active counts as dead"""
    seed: int


@dataclass
class Progressed:
    """What one block of rows showed, before and while it was learnt."""

    rows: int
    """seen so far"""
    explained_variance: float
    l0: float
    dead: float
    """share of the features"""


class Trainer:
    """The weights as they learn. What it computes depends on the rows, their order and the seed alone."""

    def __init__(self, learning: Learning, first: Tensor | None = None, state: dict[str, Tensor] | None = None) -> None:
        """`first`: rows [n, d] that come first, which decide the scale and the first bias; or the state of another."""
        self.learning = learning
        if state is None:
            assert first is not None
            state = _begun(learning, first.float())
        self.state = state

    @property
    def _parameters(self) -> dict[str, Tensor]:
        start = "weight/"
        return {name.removeprefix(start): each for name, each in self.state.items() if name.startswith(start)}

    @property
    def seen(self) -> int:
        """Rows that were learnt."""
        return int(self.state["seen"])

    def learn(self, rows: Tensor) -> Progressed:
        """Learn a block of rows [n, d], in the order of a shuffle of its own."""
        self._follow(rows.device)
        order = torch.randperm(len(rows), generator=self._generator()).to(rows.device)
        parts = max(1, round(len(rows) / self.learning.batch))
        error = around = active = 0.0
        for places in torch.tensor_split(order, parts):
            one, other, count = self._step(rows[places].float() * self.state["scale"])
            error, around, active = error + one, around + other, active + count
        if error != error or error == float("inf"):
            raise SelectionError(f"the training diverged by row {self.seen}: try a smaller learning_rate.")
        dead = float((self.state["silent"] >= self.learning.silent).double().mean())
        variance = 1 - error / around if around else float("nan")
        return Progressed(self.seen, variance, active / len(rows), dead)

    def _follow(self, device: torch.device) -> None:
        """Bring the state to where the rows are."""
        if self.state["silent"].device != device:
            self.state = {name: each.to(device) for name, each in self.state.items()}

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed((self.learning.seed * 1_000_003 + self.seen) % 2**63)

    def _step(self, rows: Tensor) -> tuple[float, float, float]:
        """One step; the squares of its error and around its mean, and the number of active features."""
        weights = {name: each.detach().requires_grad_() for name, each in self._parameters.items()}
        around = ((rows - rows.mean(0)) ** 2).sum()
        with torch.enable_grad():
            before = (rows - weights["decoder_bias"]) @ weights["encoder"] + weights["encoder_bias"]
            features, extra = self._features(before, weights, around / len(rows))
            made = features @ weights["decoder"] + weights["decoder_bias"]
            error = ((made - rows) ** 2).sum()
            loss = error / len(rows) + extra
            if self.learning.kind == "topk":
                loss = loss + self._of_silent(before, weights, (rows - made).detach())
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        with torch.no_grad():
            self._adam(dict(zip(weights, gradients, strict=True)))
            self._count(features.detach(), len(rows))
        return float(error.detach()), float(around), float((features.detach() != 0).sum())

    def _features(self, before: Tensor, weights: dict[str, Tensor], variance: Tensor) -> tuple[Tensor, Tensor]:
        if self.learning.kind == "topk":
            best = before.topk(self.learning.k, dim=-1)
            found = torch.zeros_like(before).scatter(-1, best.indices, torch.relu(best.values))
            return found, before.new_zeros(())
        threshold = weights["log_threshold"].exp()
        found, active = (each.apply(before, threshold) for each in (_Jump, _Step))  # type: ignore[no-untyped-call]
        distance = active.sum(-1).mean() / self.learning.k - 1
        return found, _SPARSITY * self._warm * variance * distance**2

    def _of_silent(self, before: Tensor, weights: dict[str, Tensor], error: Tensor) -> Tensor:
        """What features that have been silent for long would explain of the error: so they come back."""
        dead = self.state["silent"] >= self.learning.silent
        count = min(int(dead.sum()), max(1, error.shape[1] // 2))
        if not count:
            return error.new_zeros(())
        best = before.masked_fill(~dead, -torch.inf).topk(count, dim=-1)
        found = torch.zeros_like(before).scatter(-1, best.indices, torch.relu(best.values)) @ weights["decoder"]
        size = ((error**2).sum() / ((error - error.mean(0)) ** 2).sum().clamp(min=1e-12)).clamp(max=1e3)
        return _AUXILIARY * size * ((found - error) ** 2).sum() / len(error)

    @property
    def _warm(self) -> float:
        return min(1.0, self.seen / max(1.0, _WARM_UP * self.learning.rows))

    def _rate(self) -> float:
        done, end = self.seen / self.learning.rows, 1 - _COOL_DOWN
        warm = (self.seen + self.learning.batch) / max(1.0, _WARM_UP * self.learning.rows)
        return self.learning.rate * min(1.0, warm) * (1.0 if done <= end else max(0.0, (1 - done) / _COOL_DOWN))

    def _adam(self, gradients: dict[str, Tensor | None]) -> None:
        self.state["steps"] += 1
        steps, rate = int(self.state["steps"]), self._rate()
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            weight = self._parameters[name]
            if name == "decoder":  # what would only change the lengths is left out
                gradient = gradient - (gradient * weight).sum(1, keepdim=True) * weight
            first, second = self.state[f"first/{name}"], self.state[f"second/{name}"]
            first.lerp_(gradient, 1 - _BETAS[0])
            second.lerp_(gradient**2, 1 - _BETAS[1])
            size = (second / (1 - _BETAS[1] ** steps)).sqrt_().add_(_EPSILON)
            weight.addcdiv_(first, size, value=-rate / (1 - _BETAS[0] ** steps))
        decoder = self._parameters["decoder"]
        decoder /= decoder.norm(dim=1, keepdim=True).clamp(min=_EPSILON)

    def _count(self, features: Tensor, rows: int) -> None:
        self.state["seen"] += rows
        silent = self.state["silent"]
        silent += rows
        silent[(features != 0).any(0)] = 0

    def dictionary(self, about: About) -> Dictionary:
        """What was learnt, for rows as they are."""
        w, scale = self._parameters, self.state["scale"]
        bias = w["decoder_bias"] / scale
        common: dict[str, Any] = {"input_bias": bias, "about": about}
        if self.learning.kind == "topk":
            common |= {"activation": "topk", "k": self.learning.k}
        else:
            common |= {"activation": "jumprelu", "threshold": w["log_threshold"].exp() / scale}
        found = Dictionary(w["encoder"], w["decoder"], w["encoder_bias"] / scale, bias, **common)
        return found.to("cpu")


def _begun(learning: Learning, rows: Tensor) -> dict[str, Tensor]:
    """The first weights: random directions, read as they are written; the mean row as the bias."""
    d, count = rows.shape[1], learning.features
    scale = d**0.5 / rows.norm(dim=1).mean().clamp(min=1e-12)
    decoder = torch.randn(count, d, generator=torch.Generator().manual_seed(learning.seed))
    decoder = (decoder / decoder.norm(dim=1, keepdim=True)).to(rows.device)
    weights = {
        "encoder": decoder.T.contiguous(),
        "decoder": decoder,
        "encoder_bias": torch.zeros(count, device=rows.device),
        "decoder_bias": rows.mean(0) * scale,
    }
    if learning.kind == "jumprelu":
        some = (rows[:_FIRST_ROWS] * scale - weights["decoder_bias"]) @ weights["encoder"]
        kept = min(len(some) * learning.k, some.numel())
        first = some.flatten().kthvalue(some.numel() - kept + 1).values.clamp(min=_LEAST_THRESHOLD)
        weights["log_threshold"] = first.log().repeat(count)  # as many features are active as are aimed at
    state = {"scale": scale, "seen": torch.tensor(0), "steps": torch.tensor(0)}
    state["silent"] = torch.zeros(count, dtype=torch.int64, device=rows.device)
    for name, each in weights.items():
        state |= {f"weight/{name}": each, f"first/{name}": torch.zeros_like(each)}
        state[f"second/{name}"] = torch.zeros_like(each)
    return state


def blocks(pieces: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Rows that come in pieces, as blocks of `size` rows or somewhat more; the last has the remainder."""
    held: list[Tensor] = []
    for piece in pieces:
        held.append(piece)
        if sum(map(len, held)) >= size:
            yield torch.cat(held)
            held = []
    if any(map(len, held)):
        yield torch.cat(held)


class _Step(torch.autograd.Function):
    """1 above the threshold, else 0; its gradient to the threshold is that of a ramp around it."""

    @staticmethod
    def forward(context: Any, before: Tensor, threshold: Tensor) -> Tensor:
        context.save_for_backward(before, threshold)
        return (before > threshold).to(before.dtype)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        near = _near(*context.saved_tensors)
        return None, -(near * gradient).sum(0) / _BANDWIDTH


class _Jump(torch.autograd.Function):
    """Numbers above the threshold as they are, else 0."""

    @staticmethod
    def forward(context: Any, before: Tensor, threshold: Tensor) -> Tensor:
        context.save_for_backward(before, threshold)
        return before * (before > threshold)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        before, threshold = context.saved_tensors
        moved = -(threshold / _BANDWIDTH * _near(before, threshold) * gradient).sum(0)
        return (before > threshold) * gradient, moved


def _near(before: Tensor, threshold: Tensor) -> Tensor:
    return ((before - threshold).abs() < _BANDWIDTH / 2).to(before.dtype)
