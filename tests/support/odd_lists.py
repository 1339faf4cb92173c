"""Models whose blocks are no plain numbered list of modules; each says on the tape which tensors its points are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from support.invented import DEPTH, D, Ladder, Mix, Rung, Think, V, note
from torch import Tensor, nn


class Mute(Rung):
    """A block of which the tape says nothing: the map must not offer it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.blend(self.calm(x))
        return x + self.think(self.cool(x))


class Words(Ladder):
    """The blocks have words as keys."""

    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleDict({name: Rung(i) for i, name in enumerate(("dawn", "noon", "dusk"))})

    def climb(self, x: Tensor) -> Tensor:
        for rung in self.rungs.values():
            x = rung(x)
        return x


class Attributes(Ladder):
    """The blocks are attributes of the model, of two classes."""

    def __init__(self) -> None:
        super().__init__()
        del self.rungs
        self.lowest, self.middle, self.highest = Rung(0), InPlace(1), Rung(2)

    def climb(self, x: Tensor) -> Tensor:
        return self.highest(self.middle(self.lowest(x)))


class Backwards(Ladder):
    """The blocks are attributes, defined in another order than that of their calls."""

    def __init__(self) -> None:
        super().__init__()
        del self.rungs
        self.top, self.mid, self.low = Rung(2), Rung(1), Rung(0)

    def climb(self, x: Tensor) -> Tensor:
        return self.top(self.mid(self.low(x)))


class OneBlock(Ladder):
    """One module, called three times: its path has no number."""

    def __init__(self) -> None:
        super().__init__()
        del self.rungs
        self.rung = Rung(0)

    def climb(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.rung(x)
        return x


class InPlace(Rung):
    """The stream is written to in place."""

    def forward(self, x: Tensor) -> Tensor:
        note(self.i, resid_pre=x)
        n = self.calm(x)
        a = self.blend(n)
        x += a
        note(self.i, mixer_in=n, mixer_out=a, resid_mid=x)
        m = self.cool(x)
        f = self.think(m)
        x += f
        note(self.i, mlp_in=m, mlp_out=f, resid_post=x)
        return x


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
        note(i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f

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
            note(i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
            x = y + f
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
            note(i, resid_pre=x, mixer_in=blend.read, mixer_out=a, resid_mid=y, mlp_in=think.read, mlp_out=f)
            note(i, resid_post=y + f)
            x = y + f
        return x

    def finish(self, x: Tensor) -> Tensor:
        self.still = self.trunk[-1]
        try:
            return super().finish(x)
        finally:
            self.still = None


class Trunk(nn.Module):
    """Embedding, blocks, final norm and head are one list."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Embedding(V, D), *(Rung(i) for i in range(DEPTH)), nn.LayerNorm(D), nn.Linear(D, V)
        )

    def forward(self, tokens: Tensor) -> Any:
        x = tokens
        for number, each in enumerate(self.trunk):
            x = each(x)
            if number == 0:
                note(None, embed=x)
            elif number == DEPTH + 1:
                note(None, final_norm=x)
        note(None, logits=x)
        return x


class Flat(Ladder):
    """The stream is [batch * pos, d]; the attention alone sees sequences."""

    turned = False

    def __init__(self) -> None:
        super().__init__(FlatRung)

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
        said = {"resid_pre": x, "mixer_in": n, "mixer_out": a, "resid_mid": y, "mlp_in": m, "mlp_out": f}
        note(self.i, **{name: fold(t) for name, t in (said | {"resid_post": y + f}).items()})
        return y + f


class Buffer(Ladder):
    """The stream after each block is written into one tensor, from which the next block reads it."""

    def climb(self, x: Tensor) -> Tensor:
        kept = x.new_zeros(x.shape[0], DEPTH + 1, *x.shape[1:])
        kept[:, 0] = x
        for i, rung in enumerate(self.rungs):
            kept[:, i + 1] = rung(kept[:, i])
        return kept[:, -1]


class Towers(Ladder):
    """A longer tower feeds an output of its own, and no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.ModuleList(Rung(99) for _ in range(DEPTH + 2))
        self.judge = nn.Linear(D, 1)

    def forward(self, tokens: Tensor) -> Any:
        x = self.lookup(tokens)
        note(None, embed=x)
        y = x
        for rung in self.aside:
            y = rung(y)
        return {"value": self.judge(y), "logits": self.finish(self.climb(x))}


class Ahead(Ladder):
    """The last block in the list predicts a token further: it reaches no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.rungs.append(Mute(DEPTH))

    def climb(self, x: Tensor) -> Tensor:
        for rung in self.rungs[:-1]:  # type: ignore[union-attr]
            x = rung(x)
        return x

    def forward(self, tokens: Tensor) -> Any:
        x = self.lookup(tokens)
        note(None, embed=x)
        x = self.climb(x)
        return {"ahead": self.speak(self.rungs[-1](x)), "logits": self.finish(x)}


class Copies(Ladder):
    """Four copies of the stream, along the batch axis."""

    def climb(self, x: Tensor) -> Tensor:
        x = x.repeat(4, 1, 1) * torch.arange(1, 5).repeat_interleave(x.shape[0])[:, None, None]
        for rung in self.rungs:
            x = rung(x)
        return x.unflatten(0, (4, -1)).sum(0)


class Spare(Ladder):
    """The last two blocks of the list are never called."""

    def __init__(self) -> None:
        super().__init__(depth=DEPTH + 2)

    def climb(self, x: Tensor) -> Tensor:
        for rung in self.rungs[:DEPTH]:  # type: ignore[union-attr]
            x = rung(x)
        return x


class Wide(nn.Module):
    """A pre-norm block of any width."""

    def __init__(self, i: int, width: int) -> None:
        super().__init__()
        self.i = i
        self.calm, self.cool = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blend, self.think = Mix(width), Think(width)

    forward = Rung.forward


class Hourglass(Ladder):
    """The blocks in the middle are narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(Wide(i, width) for i, width in enumerate((24, 24, 12, 12, 24, 24)))
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


class Prelude(Ladder):
    """The first block stands outside the list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Mute(0)

    def climb(self, x: Tensor) -> Tensor:
        return super().climb(self.first(x))


class Gaps(Ladder):
    """The blocks have numbers with gaps between them."""

    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleDict({str(3 * i + 1): Rung(i) for i in range(DEPTH)})

    def climb(self, x: Tensor) -> Tensor:
        for rung in self.rungs.values():
            x = rung(x)
        return x


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


class Ensemble(Rung):
    """The attention sees two copies of each sequence, one behind the other in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        noise = torch.linspace(0.5, 1.5, 2).repeat_interleave(x.shape[0])[:, None, None]
        a = self.blend(n.repeat(2, 1, 1) * noise).unflatten(0, (2, -1)).mean(0)
        y = x + a
        m = self.cool(y)
        f = self.think(m)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


class Ensembles(Ladder):
    def __init__(self) -> None:
        super().__init__(Ensemble)


class Parts(nn.Module):
    """Embedding, blocks, final norm and head are the values of one ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        blocks = {f"block_{name}": Rung(i) for i, name in enumerate("abc")}
        self.parts = nn.ModuleDict(
            {"words": nn.Embedding(V, D), **blocks, "last": nn.LayerNorm(D), "head": nn.Linear(D, V)}
        )

    def forward(self, tokens: Tensor) -> Any:
        x = tokens
        for name, part in self.parts.items():
            x = part(x)
            if not name.startswith("block"):
                note(None, **{{"words": "embed", "last": "final_norm", "head": "logits"}[name]: x})
        return x


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


class StateRung(Rung):
    def forward(self, state: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        return {"stream": super().forward(state["stream"]), "depth": state["depth"] + 1}


class InStates(Ladder):
    """The stream is handed on in a dictionary."""

    def __init__(self) -> None:
        super().__init__(StateRung)

    def climb(self, x: Tensor) -> Tensor:
        state = {"stream": x, "depth": 0}
        for rung in self.rungs:
            state = rung(state)
        return state["stream"]


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
            note(i, resid_pre=x, mixer_in=blend.read, mixer_out=a, resid_mid=y, mlp_in=think.read, mlp_out=f)
            x = f + y
            note(i, resid_post=x)
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
