"""Models whose blocks are modules, in no plain numbered list; each says on the tape which tensors its points are."""

from __future__ import annotations

from typing import Any

from support.invented import DEPTH, D, Ladder, Mix, Rung, Think, V, note, through, told
from support.odd_parts import Normed
from torch import Tensor, nn


class Mute(Rung):
    """A block of which the tape says nothing: the map must not offer it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.blend(self.calm(x))
        return x + self.think(self.cool(x))


class Words(Ladder):
    """The blocks have words as keys."""

    def __init__(self, rungs: dict[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.rungs = nn.ModuleDict(rungs or {name: Rung(i) for i, name in enumerate(("dawn", "noon", "dusk"))})

    def climb(self, x: Tensor) -> Tensor:
        return through(self.rungs.values(), x)


class NoList(Ladder):
    """The model around blocks that are attributes of it."""

    def __init__(self) -> None:
        super().__init__()
        del self.rungs


class Attributes(NoList):
    """The blocks are attributes of the model, of two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.lowest, self.middle, self.highest = Rung(0), InPlace(1), Rung(2)

    def climb(self, x: Tensor) -> Tensor:
        return self.highest(self.middle(self.lowest(x)))


class Backwards(NoList):
    """They are defined in another order than that of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.mid, self.low = Rung(2), Rung(1), Rung(0)

    def climb(self, x: Tensor) -> Tensor:
        return self.top(self.mid(self.low(x)))


class OneBlock(NoList):
    """One module, called three times: its path has no number."""

    def __init__(self) -> None:
        super().__init__()
        self.rung = Rung(0)

    def climb(self, x: Tensor) -> Tensor:
        return through([self.rung] * 3, x)


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


class Towers(Ladder):
    """A longer tower feeds an output of its own, and no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.ModuleList(Rung(99) for _ in range(DEPTH + 2))
        self.judge = nn.Linear(D, 1)

    def forward(self, tokens: Tensor) -> Any:
        x = self.enter(tokens)
        return {"value": self.judge(through(self.aside, x)), "logits": self.finish(self.climb(x))}


class Ahead(Ladder):
    """The last block in the list predicts a token further: it reaches no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.rungs.append(Mute(DEPTH))

    def climb(self, x: Tensor) -> Tensor:
        return through(self.rungs[:-1], x)

    def forward(self, tokens: Tensor) -> Any:
        x = self.climb(self.enter(tokens))
        return {"ahead": self.speak(self.rungs[-1](x)), "logits": self.finish(x)}


class Spare(Ladder):
    """The last two blocks of the list are never called."""

    def __init__(self) -> None:
        super().__init__(depth=DEPTH + 2)

    def climb(self, x: Tensor) -> Tensor:
        return through(self.rungs[:DEPTH], x)


class Prelude(Ladder):
    """The first block stands outside the list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Mute(0)

    def climb(self, x: Tensor) -> Tensor:
        return super().climb(self.first(x))


class Gaps(Words):
    """The blocks have numbers with gaps between them."""

    def __init__(self) -> None:
        super().__init__({str(3 * i + 1): Rung(i) for i in range(DEPTH)})


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


class Residual(nn.Module):
    """What any branch gives, added to what it is given."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.branch = Normed(core)

    def forward(self, x: Tensor) -> Tensor:
        self.branch.added = self.branch(x)
        return x + self.branch.added


class OfResiduals(nn.Module):
    """A block of two modules of one class, each of which adds to the stream."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.look, self.think, self.i = Residual(Mix()), Residual(Think()), i

    def forward(self, x: Tensor) -> Tensor:
        y = self.look(x)
        z = self.think(y)
        a, f = self.look.branch, self.think.branch
        return told(self.i, x, a.read, a.added, y, f.read, f.added, z)


class SequenceOfResiduals(OfResiduals):
    """The two are numbered."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.both = nn.Sequential(self.look, self.think)
        del self.look, self.think

    def forward(self, x: Tensor) -> Tensor:
        z = self.both(x)
        a, f = (each.branch for each in self.both)
        return told(self.i, x, a.read, a.added, x + a.added, f.read, f.added, z)


class TwoOfResiduals(NoList):
    """Two blocks are attributes, and so are their branches."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = OfResiduals(0), OfResiduals(1)

    def climb(self, x: Tensor) -> Tensor:
        return self.high(self.low(x))


class Stages(Ladder):
    """Two stages under words, of three blocks each."""

    def __init__(self) -> None:
        super().__init__()
        stages = {
            name: nn.Sequential(*(Rung(first + i) for i in range(3))) for name, first in (("low", 0), ("high", 3))
        }
        self.rungs = nn.ModuleDict(stages)

    def climb(self, x: Tensor) -> Tensor:
        return self.rungs["high"](self.rungs["low"](x))


class Downwards(Ladder):
    """The list is run from its end."""

    def climb(self, x: Tensor) -> Tensor:
        return through(reversed(self.rungs), x)


class Beside(Ladder):
    """A second tower reads the same embedding, and its logits are added."""

    def __init__(self) -> None:
        super().__init__()
        self.aside, self.hint = nn.ModuleList(Mute(i) for i in range(2)), nn.Linear(D, V)

    def forward(self, tokens: Tensor) -> Any:
        x = self.enter(tokens)
        n = self.still(self.climb(x))
        logits = self.speak(n) + self.hint(through(self.aside, x))
        note(None, final_norm=n, logits=logits)
        return logits


class SharedWords(Words):
    """One block has two names."""

    def __init__(self) -> None:
        rung = Mute(0)
        super().__init__({"one": rung, "two": rung, "three": Mute(2)})
