"""What architectures that nobody published are made of, and the check that discovery is right about them.

Every model writes its own tensors on a tape while it runs; what the map's selectors give to plain PyTorch hooks must
be those tensors, and a point that the tape has and the map has not must be refused with the reason that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookmap.discovery.discover import discover
from hookmap.maps.selectors import Term
from hookmap.verification.verify import verify

D, V, DEPTH = 24, 50, 3
IDS = torch.tensor([[5, 17, 3, 44, 9, 40, 31, 8], [11, 2, 41, 6, 30, 4, 23, 49]])
CORE = (
    "embed", "resid_pre", "mixer_in", "mixer_out", "resid_mid", "mlp_in", "mlp_out", "resid_post", "final_norm",
    "logits",
)  # fmt: skip
_tape: dict[tuple[str, int | None], list[Tensor]] | None = None
"""(point, layer) -> the tensor of each run of the layer"""


def note(layer: int | None, **tensors: Tensor) -> None:
    """What a model says of itself, while somebody listens."""
    if _tape is not None:
        for name, tensor in tensors.items():
            _tape.setdefault((name, layer), []).append(tensor.detach().clone())


@contextmanager
def taped() -> Iterator[dict[tuple[str, int | None], list[Tensor]]]:
    """The tape that a model writes on inside."""
    global _tape
    _tape = tape = {}
    try:
        yield tape
    finally:
        _tape = None


def listening() -> bool:
    """Whether somebody does."""
    return _tape is not None


def check(model: nn.Module, missing: dict[str, str] | None = None) -> Any:
    """The map says what the tape says, of each run of each layer; it lacks exactly the points of `missing`, each for a
    reason that matches."""
    missing = missing or {}
    model.eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = discover(model)
    parts: dict[Any, Tensor] = {}
    handles = []
    for selector in found.selectors():
        for number, term in enumerate(selector.terms):
            calls = [0]

            def hook(_: Any, args: Any, kwargs: Any, output: Any, key: Any = (selector, number, calls)) -> None:
                selector, number, calls = key
                term, calls[0] = selector.terms[number], calls[0] + 1
                if term.call in (None, calls[0] - 1):
                    tensor = term.resolve(args, kwargs, output).detach().clone()
                    parts[selector, number] = term.arrange(tensor, *IDS.shape)

            handles.append(model.get_submodule(term.module).register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad(), taped() as expected:
        model(IDS)
    for handle in handles:
        handle.remove()
    selected: dict[tuple[str, int | None], list[Any]] = {}
    for s in found.selectors():
        runs = selected.setdefault((s.point, s.layer), [])
        runs.append(sum(t.times(parts[s, n], _parameter(model, t)) for n, t in enumerate(s.terms)))
    bare = {(s.point, s.layer) for s in found.selectors() if [(t.scale, t.weight) for t in s.terms] == [(1.0, None)]}
    wrong = []
    for point in dict.fromkeys((*CORE, *(point for point, _ in expected))):
        for layer in [None] if point in ("embed", "final_norm", "logits") else range(found.num_layers):
            reason = found.unavailable(point, layer)
            if (point, layer) in selected:
                if (point, layer) not in expected:
                    wrong.append(f"{point}[{layer}] is offered, but is no such thing")
                elif len(selected[point, layer]) != len(expected[point, layer]):
                    wrong.append(f"{point}[{layer}] is offered {len(selected[point, layer])} times")
                pairs = enumerate(zip(selected[point, layer], expected.get((point, layer), []), strict=False))
                far = [run for run, (own, theirs) in pairs if not _same(own, theirs, (point, layer) in bare)]
                wrong += [f"{point}[{layer}] is another tensor in run {run}" for run in far]
            elif (point, layer) in expected and point not in missing:
                wrong.append(f"{point}[{layer}] is refused: {reason}")
            if point in missing and not re.search(missing[point], reason or "(it is there)"):
                wrong.append(f"{point}[{layer}] is refused because {reason!r}, expected {missing[point]!r}")
    assert not wrong, "\n".join(wrong)
    result = verify(model)
    assert result.passed, [check for check in result.checks if not check.passed]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return found


def _same(found: Tensor, wanted: Tensor, exactly: bool) -> bool:
    """A sum may round otherwise than the model, and a product with a factor."""
    return torch.equal(found, wanted) if exactly else torch.allclose(found.float(), wanted.float(), atol=1e-5)


def _parameter(model: nn.Module, term: Term) -> Tensor | None:
    return None if term.weight is None else attrgetter(term.weight)(model)


class Mix(nn.Module):
    """Attention under no known name."""

    def __init__(self, width: int = D, heads: int = 2) -> None:
        super().__init__()
        self.three, self.back, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.three(x).chunk(3, -1))
        scores = q @ k.transpose(2, 3) * k.shape[-1] ** -0.5
        mask = torch.full((s, s), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        return self.back((torch.softmax(scores + mask, -1) @ v).transpose(1, 2).reshape(b, s, d))


class Think(nn.Module):
    """A multilayer perceptron under no known name."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(x)))


class Rung(nn.Module):
    """A pre-norm block; subclasses say how it runs."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.i = i
        self.calm, self.cool = nn.LayerNorm(D), nn.LayerNorm(D)
        self.blend, self.think = Mix(), Think()

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = x + a
        m = self.cool(y)
        f = self.think(m)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


class Behind(Rung):
    """Something stands behind each branch: `warm` and `hot`, of which subclasses say what they are."""

    warm: nn.Module
    hot: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.warm(self.blend(n))
        y = x + a
        m = self.cool(y)
        f = self.hot(self.think(m))
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


class Ladder(nn.Module):
    """The model around the blocks."""

    def __init__(self, rung: Callable[[int], nn.Module] = Rung, depth: int = DEPTH) -> None:
        super().__init__()
        self.lookup = nn.Embedding(V, D)
        self.rungs = nn.ModuleList(rung(i) for i in range(depth))
        self.still, self.speak = nn.LayerNorm(D), nn.Linear(D, V)

    def climb(self, x: Tensor) -> Tensor:
        for rung in self.rungs:
            x = rung(x)
        return x

    def finish(self, x: Tensor) -> Tensor:
        n = self.still(x)
        logits = self.speak(n)
        note(None, final_norm=n, logits=logits)
        return logits

    def forward(self, tokens: Tensor) -> Any:
        x = self.lookup(tokens)
        note(None, embed=x)
        return self.finish(self.climb(x))
