"""Models whose blocks are no modules: a method, or the lists that it goes through, says what a block is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from support.invented import DEPTH, D, Ladder, Mix, Think, note, told
from torch import Tensor, nn


class Method(Ladder):
    """A block is a method of the model; its parts are in lists side by side, and a norm is a function."""

    def __init__(self) -> None:
        super().__init__()
        del self.rungs
        self.blends = nn.ModuleList(Mix() for _ in range(DEPTH))
        self.thinks = nn.ModuleList(Think() for _ in range(DEPTH))
        self.scales = nn.Parameter(torch.rand(2 * DEPTH, D) + 0.5)

    def rung(self, i: int, x: Tensor) -> Tensor:
        n = F.layer_norm(x, (D,), self.scales[2 * i])
        a = self.blends[i](n)
        y = x + a
        m = F.layer_norm(y, (D,), self.scales[2 * i + 1])
        f = self.thinks[i](m)
        return told(i, x, n, a, y, m, f, y + f)

    def climb(self, x: Tensor) -> Tensor:
        for i in range(DEPTH):
            x = self.rung(i, x)
        return x


class SideBySide(Ladder):
    """The parts of a block are in lists side by side."""

    def __init__(self) -> None:
        super().__init__()
        del self.rungs
        self.calms = nn.ModuleList(nn.LayerNorm(D) for _ in range(DEPTH))
        self.blends = nn.ModuleList(Mix() for _ in range(DEPTH))
        self.cools = nn.ModuleList(nn.LayerNorm(D) for _ in range(DEPTH))
        self.thinks = nn.ModuleList(Think() for _ in range(DEPTH))

    def parts(self) -> Iterator[tuple[nn.Module, ...]]:
        yield from zip(self.calms, self.blends, self.cools, self.thinks, strict=True)

    def climb(self, x: Tensor) -> Tensor:
        for i, (calm, blend, cool, think) in enumerate(self.parts()):
            n = calm(x)
            a = blend(n)
            y = x + a
            m = cool(y)
            f = think(m)
            x = told(i, x, n, a, y, m, f, y + f)
        return x


class InWords(SideBySide):
    """The parts of a block are attributes of the model: calm_low, blend_low, …"""

    def __init__(self) -> None:
        super().__init__()
        del self.calms, self.blends, self.cools, self.thinks
        for place in ("low", "mid", "high"):
            self.add_module(f"calm_{place}", nn.LayerNorm(D))
            self.add_module(f"blend_{place}", Mix())
            self.add_module(f"cool_{place}", nn.LayerNorm(D))
            self.add_module(f"think_{place}", Think())

    def parts(self) -> Iterator[tuple[nn.Module, ...]]:
        for place in ("low", "mid", "high"):
            yield tuple(getattr(self, f"{name}_{place}") for name in ("calm", "blend", "cool", "think"))


class Normed(nn.Module):
    """A branch with its norm."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.norm, self.core, self.read = nn.LayerNorm(D), core, None

    def forward(self, x: Tensor) -> Tensor:
        self.read = self.norm(x)
        return self.core(self.read)  # type: ignore[no-any-return]


class Pairs(Ladder):
    """Attention, MLP, attention, MLP, … in one list, and the final norm behind them."""

    def __init__(self) -> None:
        super().__init__()
        del self.rungs
        pairs = [Normed(core) for _ in range(DEPTH) for core in (Mix(), Think())]
        self.trunk, self.still = nn.ModuleList([*pairs, self.still]), None

    def climb(self, x: Tensor) -> Tensor:
        for i, (blend, think) in enumerate(zip(self.trunk[:-1:2], self.trunk[1::2], strict=True)):
            a = blend(x)
            y = x + a
            f = think(y)
            x = told(i, x, blend.read, a, y, think.read, f, y + f)
        return x

    def finish(self, x: Tensor) -> Tensor:
        self.still = self.trunk[-1]
        try:
            return super().finish(x)
        finally:
            self.still = None


class LoopedMethod(SideBySide):
    """The parts of a block are in lists side by side, and all blocks run twice."""

    def climb(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for calm, blend, cool, think in self.parts():
                x = x + blend(calm(x))
                x = x + think(cool(x))
        return x


class Convolve(nn.Module):
    """Each position takes in the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(D, D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.along(F.pad(x.transpose(1, 2), (1, 0))).transpose(1, 2)


class Assorted(SideBySide):
    """Of lists side by side, one holds mixers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.blends[1] = Convolve()


class Adding(Think):
    """An MLP that adds to what it is given."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.norm, self.i = nn.LayerNorm(D), i

    def forward(self, x: Tensor) -> Tensor:
        m = self.norm(x)
        f = super().forward(m)
        note(self.i, resid_mid=x, mlp_in=m, mlp_out=f, resid_post=x + f)
        return x + f


class HalfInside(Ladder):
    """A method adds what the attention gives; the MLP adds to the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        del self.rungs
        self.blends = nn.ModuleList(Normed(Mix()) for _ in range(DEPTH))
        self.thinks = nn.ModuleList(Adding(i) for i in range(DEPTH))

    def climb(self, x: Tensor) -> Tensor:
        for i, (blend, think) in enumerate(zip(self.blends, self.thinks, strict=True)):
            a = blend(x)
            note(i, resid_pre=x, mixer_in=blend.read, mixer_out=a)
            x = think(x + a)
        return x


class Looking(nn.Module):
    """An attention that adds to what it is given."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.norm, self.core, self.i = nn.LayerNorm(D), Mix(), i

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        a = self.core(n)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a)
        return x + a


class BothInside(HalfInside):
    """The modules of two lists add to the stream in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.blends = nn.ModuleList(Looking(i) for i in range(DEPTH))

    def climb(self, x: Tensor) -> Tensor:
        for blend, think in zip(self.blends, self.thinks, strict=True):
            x = think(blend(x))
        return x


class Couples(Ladder):
    """A list of lists of an attention and an MLP, and a method that adds what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(nn.ModuleList([Normed(Mix()), Normed(Think())]) for _ in range(DEPTH))

    def climb(self, x: Tensor) -> Tensor:
        for i, (blend, think) in enumerate(self.rungs):
            a = blend(x)
            y = a + x
            f = think(y)
            x = told(i, x, blend.read, a, y, think.read, f, f + y)
        return x


class Dictionaries(SideBySide):
    """A list of dictionaries of modules."""

    def __init__(self) -> None:
        super().__init__()
        parts = [dict(zip(("calm", "blend", "cool", "think"), each, strict=True)) for each in super().parts()]
        del self.calms, self.blends, self.cools, self.thinks
        self.layers = nn.ModuleList(map(nn.ModuleDict, parts))

    def parts(self) -> Iterator[tuple[nn.Module, ...]]:
        yield from (tuple(layer.values()) for layer in self.layers)  # type: ignore[operator]
