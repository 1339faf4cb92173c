"""Invented blocks whose residual stream is no plain sum: what a branch gives joins it in some other way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.invented import D, Ladder, Rung, V, note, told
from torch import Tensor, nn


class Joined(Rung):
    """A pre-norm block; subclasses say how the output of a branch joins the stream."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.rates, self.rate = nn.Parameter(torch.rand(D) + 0.3), nn.Parameter(torch.rand(()) + 0.3)
        self.pair = nn.Parameter(torch.rand(2) + 0.5)

    def join(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """What is added, and the stream with it."""
        return branch, x + branch

    def before(self, x: Tensor) -> Tensor:
        """What is done to the stream before the first branch reads it."""
        return x

    def between(self, x: Tensor) -> Tensor:
        """What is done to it before the second branch does."""
        return x

    def behind(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        entered, x = x, self.before(x)
        n = self.calm(x)
        b = self.mixed(n)
        a, y = self.join(x, b)
        y = self.between(y)
        m = self.cool(y)
        g = self.thought(m)
        f, z = self.join(y, g)
        note(self.i, mixer_out_raw=b, mlp_out_raw=g)
        return told(self.i, entered, n, a, y, m, f, self.behind(z))


# Steps from the stream towards the branch's output ----------------------------------------------------------------


class Step(Joined):
    """x + rate * (branch - x)."""

    def how_far(self) -> Tensor | float:
        return 0.3

    def join(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        added = self.how_far() * (branch - x)
        return added, x + added


class StepBack(Step):
    """The other way round, from the other side."""

    def join(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        added = (x - branch) * -0.3
        return added, added + x


class StepOfEach(Step):
    def how_far(self) -> Tensor:
        return self.rates


class StepLearned(Step):
    def how_far(self) -> Tensor:
        return self.rate


class StepComputed(Step):
    def how_far(self) -> Tensor:
        return (self.rates * 2.5).abs()


class Interpolated(Joined):
    def join(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return 0.25 * branch, torch.lerp(x, branch, 0.25)


class InterpolatedOfEach(Joined):
    def join(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return self.rates * branch, torch.lerp(x, branch, self.rates)


# Learned factors --------------------------------------------------------------------------------------------------


class Kept(Joined):
    """A learned factor on the stream."""

    def join(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return branch, self.rate * x + branch


class KeptOfEach(Joined):
    def join(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return branch, branch + x * self.rates


class Weighted(Joined):
    """A learned factor on both."""

    def join(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        added = 0.5 * branch * self.rates
        return added, self.rate * x + added


class InOneOperation(Joined):
    def join(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * self.rates * branch, torch.addcmul(x, branch, self.rates, value=0.5)


class Side(Joined):
    """Both branches beside one another, each with a factor of its own: no boundary stands between the additions."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a, f = self.rates * self.blend(n), self.rate * self.think(n)
        z = x + a + f
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, mlp_in=n, mlp_out=f, resid_post=z)
        return z


# The stream as a point on a sphere --------------------------------------------------------------------------------


class Sphere(Joined):
    """norm(x + rate * (norm(branch) - x)), with the norms in a spelling per subclass."""

    def norm(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        b = self.blend(x)
        s = x + self.rates * (self.norm(b) - x)
        y = self.norm(s)
        g = self.think(y)
        z = self.norm(y + self.rates * (self.norm(g) - y))
        note(self.i, resid_pre=x, mixer_in=x, mixer_out_raw=b, resid_mid=y, mlp_in=y, mlp_out_raw=g, resid_post=z)
        return z


class SphereByLength(Sphere):
    def norm(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)


class SphereBySize(Sphere):
    """Another statistic: the sum of the sizes."""

    def norm(self, x: Tensor) -> Tensor:
        return 4 * x / x.abs().sum(-1, keepdim=True)


class SphereOfGroups(Sphere):
    """Another statistic: one for each group of features."""

    def norm(self, x: Tensor) -> Tensor:
        return F.normalize(x.view(*x.shape[:-1], 4, -1), dim=-1).view(x.shape)


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class SphereOfModules(Joined):
    """The norms are modules: the sum before each, and what is added to it, can be seen."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.calm, self.cool, self.warm, self.hot = Unit(), Unit(), Unit(), Unit()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        b = self.blend(x)
        a = self.rates * (self.calm(b) - x)
        y = self.cool(x + a)
        g = self.think(y)
        f = self.rates * (self.warm(g) - y)
        z = self.hot(y + f)
        note(self.i, resid_pre=x, mixer_in=x, mixer_out_raw=b, mixer_out=a, resid_mid_sum=x + a, resid_mid=y)
        note(self.i, mlp_in=y, mlp_out_raw=g, mlp_out=f, resid_post=z)
        return z


# What is no branch's ----------------------------------------------------------------------------------------------


class WithFirst(Joined):
    """What entered the first block is mixed in again, with learned weights."""

    def forward(self, x: Tensor, first: Tensor) -> Tensor:  # type: ignore[override]
        self.first = first
        return super().forward(x)

    def before(self, x: Tensor) -> Tensor:
        return self.pair[0] * x + self.pair[1] * self.first


class WithFirstByConstants(WithFirst):
    def before(self, x: Tensor) -> Tensor:
        return 0.8 * x + 0.2 * self.first


class First(Ladder):
    """The model around them."""

    def climb(self, x: Tensor) -> Tensor:
        first = x = F.rms_norm(x, (D,))
        for rung in self.rungs:
            x = rung(x, first)
        return x


class WithTable(Joined):
    """Rows of a further table are added in each block."""

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:  # type: ignore[override]
        self.rows = rows
        return super().forward(x)

    def before(self, x: Tensor) -> Tensor:
        return x + self.rate * self.rows


class Tables(Ladder):
    """The model around them."""

    def __init__(self) -> None:
        super().__init__(WithTable)
        self.tables = nn.ModuleList(nn.Embedding(V, D) for _ in self.rungs)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.enter(tokens)
        for rung, table in zip(self.rungs, self.tables, strict=True):
            x = rung(x, table(tokens))
        return self.finish(x)


class Squashed(Joined):
    """A function of the stream without weights is added to it first."""

    def before(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(x)


class SquashedByWeights(Joined):
    def before(self, x: Tensor) -> Tensor:
        return x + self.rates * F.silu(x)


class Normed(Joined):
    def before(self, x: Tensor) -> Tensor:
        return x + F.rms_norm(x, (D,))


class Smeared(Joined):
    """The position before is mixed in: no mixer of its own beside an attention, for it has no matrix."""

    def before(self, x: Tensor) -> Tensor:
        return x + self.rates * F.pad(x, (0, 0, 1, -1))


class SquashedBetween(Joined):
    """resid_mid is what the MLP reads."""

    def between(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(x)


class SquashedBehind(Joined):
    def behind(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(x)


# The principal branch ---------------------------------------------------------------------------------------------


class Short(nn.Module):
    """A short convolution of each feature for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Conv1d(D, D, 3, groups=D, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.taps(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Canon(Joined):
    """A short convolution on the stream before each branch: the mixer is the attention."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.one, self.two = Short(), Short()

    def forward(self, x: Tensor) -> Tensor:
        c = self.one(x)
        w = x + c
        n = self.calm(w)
        a = self.blend(n)
        s = w + a
        e = self.two(s)
        y = s + e
        m = self.cool(y)
        f = self.think(m)
        note(self.i, **{"mixer_out.0": c, "mixer_out.1": a, "mixer_out.2": e, "resid_mid_sum": s})
        return told(self.i, x, n, a, y, m, f, y + f)


class ShortPadded(Short):
    """Padded in front by hand, and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Conv1d(D, D, 3, groups=D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.taps(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class CanonPadded(Canon):
    """Neither its pads nor the positions that it sees make an MLP of a convolution, or the heaviest branch."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.one, self.two = ShortPadded(), ShortPadded()


class CanonInside(Canon):
    """Behind the norms: a convolution in the MLP makes no mixer of it."""

    forward = Rung.forward

    def mixed(self, n: Tensor) -> Tensor:
        return self.blend(n + self.one(n))

    def thought(self, m: Tensor) -> Tensor:
        return self.think(m + self.two(m))


class Adapted(Joined):
    """A small MLP in front: the MLP is the large one."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.small = nn.Sequential(nn.Linear(D, 4), nn.GELU(), nn.Linear(4, D))

    def before(self, x: Tensor) -> Tensor:
        s = self.small(x)
        note(self.i, **{"mlp_in.0": x, "mlp_out.0": s})
        return x + s

    def thought(self, m: Tensor) -> Tensor:
        f = self.think(m)
        note(self.i, **{"mlp_out.1": f})
        return f


class AdaptedBetween(Adapted):
    def before(self, x: Tensor) -> Tensor:
        return x

    def between(self, x: Tensor) -> Tensor:
        note(self.i, resid_mid_sum=x)
        return super().before(x)


class AdaptedBeside(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = x + a
        m = self.cool(y)
        e, f = self.small(y), self.thought(m)
        note(self.i, **{"mlp_out.0": e})
        return told(self.i, x, n, a, y, m, f, y + e + f)
