"""What architectures that nobody published are made of, and the check that discovery is right about them.

Every model writes its own tensors on a tape while it runs; what the map's selectors give to plain PyTorch hooks must
be those tensors, and a point that the tape has and the map has not must be refused with the reason that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from support import mutants
from torch import Tensor, nn

from hookmap.discovery.discover import discover
from hookmap.loading.operations import Forward, showing
from hookmap.maps.selectors import Selector
from hookmap.maps.terms import Term
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


def read(
    model: nn.Module, selectors: Iterable[Selector], ids: Tensor = IDS, **settings: Any
) -> dict[tuple[Selector, int], Tensor]:
    """What plain hooks in one run find at the terms of the selectors, (selector, number of the term) -> tensor: in the
    call that the term names, else in the last. At an operation in a module's forward, what a dispatch mode finds."""
    found: dict[tuple[Selector, int], Tensor] = {}
    forwards: dict[nn.Module, Forward] = {}

    def kept(selector: Selector, number: int) -> Any:
        term, calls = selector.terms[number], count()

        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            if term.call in (None, next(calls)):
                found[selector, number] = term.resolve(args, kwargs, output).detach().clone()

        if term.operation is not None:
            own = forwards.setdefault(model.get_submodule(term.module), Forward(term.module))
            own.add(term, term.side, [lambda args, kwargs, output: hook(None, args, kwargs, output)])
            return None
        return model.get_submodule(term.module).register_forward_hook(hook, with_kwargs=True)

    handles = [kept(selector, number) for selector in selectors for number in range(len(selector.terms))]
    with torch.no_grad(), showing(forwards, lambda: True):
        model(ids, **settings)
    for handle in filter(None, handles):
        handle.remove()
    return found


def check(model: nn.Module, missing: dict[str, str] | None = None) -> Any:
    """The map says what the tape says, of each run of each layer; it lacks exactly the points of `missing`, each for a
    reason that matches."""
    missing = missing or {}
    model.eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = discover(model)
    with taped() as expected:
        seen = read(model, found.selectors())
    parts = {(s, n): s.terms[n].arrange(tensor, *IDS.shape) for (s, n), tensor in seen.items()}
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
    assert not mutants.asked or not mutants.survivors(found, model)
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

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, [batch, head, pos, d_head]."""
        b, s, _ = x.shape
        return tuple(t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.three(x).chunk(3, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, s, _ = q.shape
        scores = q @ k.transpose(2, 3) * k.shape[-1] ** -0.5
        mask = torch.full((s, s), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
        return (torch.softmax(scores + mask, -1) @ v).transpose(1, 2).reshape(b, s, -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.attend(*self.split(x)))


class Think(nn.Module):
    """A multilayer perceptron under no known name."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(x)))


def told(i: int, x: Tensor, n: Tensor, a: Tensor, y: Tensor, m: Tensor, f: Tensor, z: Tensor) -> Tensor:
    """What a block leaves behind, with its tensors on the tape."""
    note(i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=z)
    return z


class Rung(nn.Module):
    """A pre-norm block; a subclass writes the step in which it differs, or all of `forward`."""

    def __init__(self, i: int, width: int = D) -> None:
        super().__init__()
        self.i = i
        self.calm, self.cool = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blend, self.think = Mix(width), Think(width)

    def to_mixer(self, x: Tensor) -> Tensor:
        """What the mixer reads of the stream."""
        return self.calm(x)

    def mixed(self, n: Tensor) -> Tensor:
        """What the mixer adds."""
        return self.blend(n)

    def to_mlp(self, y: Tensor) -> Tensor:
        return self.cool(y)

    def thought(self, m: Tensor) -> Tensor:
        return self.think(m)

    def joined(self, x: Tensor, branch: Tensor) -> Tensor:
        """The stream with what a branch adds."""
        return x + branch

    def forward(self, x: Tensor) -> Tensor:
        n = self.to_mixer(x)
        a = self.mixed(n)
        y = self.joined(x, a)
        m = self.to_mlp(y)
        f = self.thought(m)
        return told(self.i, x, n, a, y, m, f, self.joined(y, f))


class Behind(Rung):
    """Something stands behind each branch: `warm` and `hot`, of which subclasses say what they are."""

    warm: nn.Module
    hot: nn.Module

    def mixed(self, n: Tensor) -> Tensor:
        return self.warm(self.blend(n))

    def thought(self, m: Tensor) -> Tensor:
        return self.hot(self.think(m))


def through(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The stream behind one block after the other."""
    for block in blocks:
        x = block(x)
    return x


class Ladder(nn.Module):
    """The model around the blocks."""

    def __init__(self, rung: Callable[[int], nn.Module] = Rung, depth: int = DEPTH) -> None:
        super().__init__()
        self.lookup = nn.Embedding(V, D)
        self.rungs = nn.ModuleList(rung(i) for i in range(depth))
        self.still, self.speak = nn.LayerNorm(D), nn.Linear(D, V)

    def enter(self, tokens: Tensor) -> Tensor:
        x = self.lookup(tokens)
        note(None, embed=x)
        return x

    def climb(self, x: Tensor) -> Tensor:
        return through(self.rungs, x)

    def finish(self, x: Tensor) -> Tensor:
        n = self.still(x)
        logits = self.speak(n)
        note(None, final_norm=n, logits=logits)
        return logits

    def forward(self, tokens: Tensor) -> Any:
        return self.finish(self.climb(self.enter(tokens)))
