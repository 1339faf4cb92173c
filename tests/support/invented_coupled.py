"""Invented blocks of several residual streams: coupled, mixed by fixed weights, or chosen from all before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from support.invented import D, Ladder, Mix, Think, note, through, told
from support.invented_streams import Joined
from torch import Tensor, nn


class Reversible(Joined):
    """Two streams: each branch reads one and adds to the other."""

    def forward(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        n = self.calm(v)
        a = self.blend(n)
        w = u + a
        m = self.cool(w)
        f = self.think(m)
        return w, told(self.i, v, n, a, w, m, f, v + f)


class Both(Ladder):
    """The model around them, which goes on with both."""

    def climb(self, x: Tensor) -> Tensor:
        u = v = x
        for rung in self.rungs:
            u, v = rung(u, v)
        return self.end(u, v)

    def end(self, u: Tensor, v: Tensor) -> Tensor:
        return (u + v) / 2


class First(Both):
    """It goes on with the one that the map does not follow."""

    def end(self, u: Tensor, v: Tensor) -> Tensor:
        return u


class Braided(Joined):
    """Two streams in two tensors, each mixed into the other."""

    def forward(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        note(self.i, resid_pre=u)
        u, v = 0.9 * u + 0.1 * v + self.blend(self.calm(u)), 0.2 * u + 0.8 * v
        u, v = 0.9 * u + 0.1 * v + self.think(self.cool(u)), 0.2 * u + 0.8 * v
        note(self.i, resid_post=u)
        return u, v


class ReadTogether(Joined):
    """Two streams in two tensors, and each branch reads their mean."""

    def forward(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        note(self.i, resid_pre=u)
        u = u + self.blend(self.calm((u + v) / 2))
        v = v + self.think(self.cool((u + v) / 2))
        note(self.i, resid_post=u)
        return u, v


class InHalves(Joined):
    """A reversible block, whose streams are the halves of the features of one tensor."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.calm, self.cool = nn.LayerNorm(D // 2), nn.LayerNorm(D // 2)
        self.blend, self.think = Mix(D // 2), Think(D // 2)

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, -1)
        u = u + self.blend(self.calm(v))
        z = torch.cat([u, v + self.think(self.cool(u))], -1)
        note(self.i, resid_pre=x, resid_post=z)
        return z


class Forgetting(Joined):
    """The stream is multiplied by what is computed from it."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.think(x)) * x + self.blend(self.calm(x))
        note(self.i, resid_pre=x, resid_post=y)
        return y


class Hyper(Joined):
    """Two streams in one tensor, [batch, pos, stream, d], mixed by learned numbers that no token changes."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.read, self.write, self.mix = self.numbers(2, 2), self.numbers(2, 2), self.numbers(2, 2, 2)

    def numbers(self, *shape: int) -> Tensor:
        return nn.Parameter(torch.rand(shape) + 0.3)

    def forward(self, h: Tensor) -> Tensor:
        note(self.i, resid_pre=h)
        n = self.calm(torch.einsum("s,bpsd->bpd", self.read[0], h))
        o = self.blend(n)
        h = torch.einsum("st,bptd->bpsd", self.mix[0], h) + self.write[0][:, None] * o[:, :, None]
        m = self.cool(torch.einsum("s,bpsd->bpd", self.read[1], h))
        g = self.think(m)
        h = torch.einsum("st,bptd->bpsd", self.mix[1], h) + self.write[1][:, None] * g[:, :, None]
        note(self.i, mixer_in=n, mixer_out_raw=o, mlp_in=m, mlp_out_raw=g, resid_post=h)
        return h


class HyperByConstants(Hyper):
    def numbers(self, *shape: int) -> Tensor:
        return torch.rand(shape) + 0.3


class Connection(nn.Module):
    """Says for each token how a branch reads two streams and joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.says = nn.Parameter(torch.randn(8, 2 * D) * D**-0.5)

    def forward(self, h: Tensor) -> tuple[Tensor, ...]:
        read, write, mix = F.linear(F.rms_norm(h.flatten(2), (2 * D,)), self.says).split([2, 2, 4], -1)
        mixed = mix.unflatten(-1, (2, 2)).softmax(-1) @ h
        return (read.sigmoid()[..., None] * h).sum(2), write, mixed


class HyperOfTokens(Joined):
    """Two streams in one tensor. One module makes what a branch reads, and how it joins the streams."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.one, self.two = Connection(), Connection()

    def forward(self, h: Tensor) -> Tensor:
        x, write, mixed = self.one(h)
        n = self.calm(x)
        o = self.blend(n)
        a = write[..., None] * o[:, :, None]
        y = mixed + a
        x, write, mixed = self.two(y)
        m = self.cool(x)
        g = self.think(m)
        f = write[..., None] * g[:, :, None]
        note(self.i, mixer_out_raw=o, mlp_out_raw=g)
        return told(self.i, h, n, a, y, m, f, mixed + f)


class Streams(Ladder):
    """The model around them."""

    def climb(self, x: Tensor) -> Tensor:
        return through(self.rungs, torch.stack([x, 0.5 * x], 2)).sum(2)


class OfAllBefore(Ladder):
    """What enters a block is a sum of what all before gave, with learned weights."""

    def __init__(self) -> None:
        super().__init__(Joined)
        self.shares = nn.Parameter(torch.rand(8, 8) + 0.2)

    def gather(self, i: int, given: list[Tensor]) -> Tensor:
        return sum((share * each for share, each in zip(self.shares[i], given, strict=False)), torch.zeros(()))

    def climb(self, x: Tensor) -> Tensor:
        given = [x]
        for i, rung in enumerate(self.rungs):
            given.append(rung(x))
            x = self.gather(i, given)
        return x


class OfAStack(OfAllBefore):
    def gather(self, i: int, given: list[Tensor]) -> Tensor:
        return torch.einsum("l,lbsd->bsd", self.shares[i, : len(given)], torch.stack(given))


class AttendingToDepth(OfAllBefore):
    """Each position attends to what the blocks before gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(8, D))

    def climb(self, x: Tensor) -> Tensor:
        given = [x]
        for query, rung in zip(self.queries, self.rungs, strict=False):
            stack = torch.stack(given)
            weights = (F.rms_norm(stack, (D,)) @ query).softmax(0)
            given.append(rung((weights.unsqueeze(-1) * stack).sum(0)))
        return given[-1]


# Beside the stream ------------------------------------------------------------------------------------------------


class Values(Joined):
    """An attention's values are handed on beside the stream, and mixed into the next one's."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.blend = MixOfValues()

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        n = self.calm(x)
        a, values = self.blend(n, before)
        y = x + a
        m = self.cool(y)
        f = self.think(m)
        return told(self.i, x, n, a, y, m, f, y + f), values


class MixOfValues(Mix):
    """Attention with other values in its own."""

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = self.split(x)
        v = v if before is None else 0.4 * v + 0.6 * before
        return self.back(self.attend(q, k, v)), v


class ValuesOfFirst(Ladder):
    """The first layer's values go to all."""

    def climb(self, x: Tensor) -> Tensor:
        first = None
        for rung in self.rungs:
            x, values = rung(x, first)
            first = values if first is None else first
        return x


class ValuesOfPrevious(Ladder):
    """Each layer's go to the next."""

    def climb(self, x: Tensor) -> Tensor:
        values = None
        for rung in self.rungs:
            x, values = rung(x, values)
        return x


class Borrowed(Joined):
    """The attention reads keys and values that the layer before made."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.blend = MixOfOthers()

    def forward(self, x: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:  # type: ignore[override]
        a, pair = self.blend(self.calm(x), before)
        return x + a + self.think(self.cool(x + a)), pair


class MixOfOthers(Mix):
    """Attention to other keys than its own, where there are any."""

    def forward(self, x: Tensor, before: Any) -> tuple[Tensor, Any]:  # type: ignore[override]
        q, *own = self.split(x)
        k, v = own if before is None else before
        return self.back(self.attend(q, k, v)), (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
