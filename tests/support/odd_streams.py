"""Models whose stream lies oddly: flat, in a buffer, in copies, of several widths or lengths, changed in between."""

from __future__ import annotations

from typing import Any

import torch
from support.invented import DEPTH, D, Ladder, Mix, Rung, Think, note, through, told
from support.odd_lists import Mute
from torch import Tensor, nn


class Flat(Ladder):
    """The stream is [batch * pos, d]; the attention alone sees sequences."""

    turned = False

    def climb(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        flat = (x.transpose(0, 1) if self.turned else x).reshape(b * s, d)
        for rung in self.rungs:
            flat = rung(flat, b, self.turned)
        return flat.view(s, b, d).transpose(0, 1) if self.turned else flat.view(b, s, d)


class FlatTurned(Flat):
    """The stream is [pos * batch, d]."""

    turned = True


class FlatRung(Rung):
    def forward(self, x: Tensor, b: int, turned: bool) -> Tensor:  # type: ignore[override]
        def fold(t: Tensor) -> Tensor:
            return t.view(-1, b, D).transpose(0, 1) if turned else t.view(b, -1, D)

        def flat(t: Tensor) -> Tensor:
            return (t.transpose(0, 1) if turned else t).reshape(-1, D)

        n = self.calm(x)
        a = flat(self.blend(fold(n)))
        y = x + a
        m = self.cool(y)
        f = self.think(m)
        told(self.i, *map(fold, (x, n, a, y, m, f, y + f)))
        return y + f


class Buffer(Ladder):
    """The stream after each block is written into one tensor, from which the next block reads it."""

    def climb(self, x: Tensor) -> Tensor:
        kept = x.new_zeros(x.shape[0], DEPTH + 1, *x.shape[1:])
        kept[:, 0] = x
        for i, rung in enumerate(self.rungs):
            kept[:, i + 1] = rung(kept[:, i])
        return kept[:, -1]


class Copies(Ladder):
    """Four copies of the stream, along the batch axis."""

    def climb(self, x: Tensor) -> Tensor:
        x = x.repeat(4, 1, 1) * torch.arange(1, 5).repeat_interleave(x.shape[0])[:, None, None]
        return through(self.rungs, x).unflatten(0, (4, -1)).sum(0)


class Hourglass(Ladder):
    """The blocks in the middle are narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(Rung(i, width) for i, width in enumerate((24, 24, 12, 12, 24, 24)))
        self.narrow, self.widen = nn.Linear(24, 12), nn.Linear(12, 24)

    def climb(self, x: Tensor) -> Tensor:
        r = self.rungs
        x = before = r[1](r[0](x))
        x = r[3](r[2](self.narrow(x)))
        return r[5](r[4](before + self.widen(x)))  # type: ignore[no-any-return]


class Shorter(Ladder):
    """The blocks in the middle see half of the positions."""

    def __init__(self) -> None:
        super().__init__(depth=6)
        self.rungs[2], self.rungs[3] = Mute(2), Mute(3)

    def climb(self, x: Tensor) -> Tensor:
        r = self.rungs
        x = before = r[1](r[0](x))
        half = r[3](r[2](x[:, ::2]))
        return r[5](r[4](before + half.repeat_interleave(2, 1)[:, : x.shape[1]]))  # type: ignore[no-any-return]


class Skips(Ladder):
    """Half of the blocks are added what a block before them gave."""

    def __init__(self) -> None:
        super().__init__(depth=6)

    def climb(self, x: Tensor) -> Tensor:
        kept = []
        for i, rung in enumerate(self.rungs):
            x = rung(x if i < 3 else x + 0.5 * kept[5 - i])
            kept.append(x)
        return x


class Interrupted(Ladder):
    """Something is added to the stream before each block but the first."""

    def climb(self, x: Tensor) -> Tensor:
        start = x
        for i, rung in enumerate(self.rungs):
            x = rung(x + start if i else x)
        return x


class Ensemble(Rung):
    """The attention sees two copies of each sequence, one behind the other in the batch."""

    def mixed(self, n: Tensor) -> Tensor:
        noise = torch.linspace(0.5, 1.5, 2).repeat_interleave(n.shape[0])[:, None, None]
        return self.blend(n.repeat(2, 1, 1) * noise).unflatten(0, (2, -1)).mean(0)


class BufferLast(Ladder):
    """The streams are kept side by side in the last axis of one tensor."""

    def climb(self, x: Tensor) -> Tensor:
        kept = x.new_zeros(*x.shape, DEPTH + 1)
        kept[..., 0] = x
        for i, rung in enumerate(self.rungs):
            kept[..., i + 1] = rung(kept[..., i])
        return kept[..., -1]


class History(Ladder):
    """The streams of all blocks are kept, and the last of them is read."""

    def climb(self, x: Tensor) -> Tensor:
        past = x[None]
        for rung in self.rungs:
            past = torch.cat([past, rung(past[-1])[None]])
        return past[-1]


class Given(Rung):
    """The block gives what is to be added, of both branches; the model adds it."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = x + a
        m = self.cool(y)
        f = self.think(m)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f)
        return a + f


class GivenOne(Rung):
    """Of one branch."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a)
        return a


class GivenHalf(Rung):
    """The model adds half of what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        note(self.i, resid_pre=x, mixer_in=x)
        a = self.blend(self.calm(x))
        return a + self.think(self.cool(x + a))


class AddedOutside(Ladder):
    """The model adds what each block gives."""

    def climb(self, x: Tensor) -> Tensor:
        for i, rung in enumerate(self.rungs):
            x = x + rung(x)
            note(i, resid_post=x)
        return x


class AddedOutsideTwice(AddedOutside):
    """The blocks run twice."""

    def climb(self, x: Tensor) -> Tensor:
        return super().climb(super().climb(x))


class HalfAddedOutside(Ladder):
    """It adds a multiple of that."""

    def climb(self, x: Tensor) -> Tensor:
        for i, rung in enumerate(self.rungs):
            half = 0.5 * rung(x)
            x = x + half
            note(i, mixer_out=half, resid_post=x)
        return x


class MoreAddedOutside(Ladder):
    """And what the first block read, too."""

    def climb(self, x: Tensor) -> Tensor:
        start = x
        for rung in self.rungs:
            x = x + rung(x)
            x = x + 0.1 * start
        return x


class Couple(Rung):
    """A reversible block."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a = a + self.blend(self.calm(b))
        return a, b + self.think(self.cool(a))


class OneTensorOfTwo(Ladder):
    """The two streams are joined in one tensor between the blocks."""

    def __init__(self) -> None:
        super().__init__(Couple)

    def climb(self, x: Tensor) -> Tensor:
        both = torch.cat([x, x], -1)
        for rung in self.rungs:
            both = torch.cat(rung(*both.chunk(2, -1)), -1)
        return both[..., :D] + both[..., D:]


class Swapped(Ladder):
    """Two streams change places after each branch; the entries of the list are dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        branches = [Mix(), Think(), Mix(), Think()]
        self.rungs = nn.ModuleList(nn.ModuleDict({"calm": nn.LayerNorm(D), "branch": each}) for each in branches)

    def climb(self, x: Tensor) -> Tensor:
        a = b = x
        for rung in self.rungs:
            a, b = b, a + rung["branch"](rung["calm"](b))  # type: ignore[index]
        return a + b


class StateRung(Rung):
    def forward(self, state: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return {"stream": super().forward(state["stream"]), "depth": state["depth"] + 1}


class InStates(Ladder):
    """The stream is handed on in a dictionary."""

    def climb(self, x: Tensor) -> Tensor:
        return through(self.rungs, {"stream": x, "depth": 0})["stream"]  # type: ignore[arg-type]


class TurnedRung(Rung):
    """It is given [batch, d_model, pos]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.blend(self.calm(x.mT)).mT
        return x + self.think(self.cool(x.mT)).mT  # type: ignore[no-any-return]


class Turned(Ladder):
    """Positions stand behind features, as convolutions read them."""

    def __init__(self) -> None:
        super().__init__(TurnedRung)

    def climb(self, x: Tensor) -> Tensor:
        return super().climb(x.mT).mT
