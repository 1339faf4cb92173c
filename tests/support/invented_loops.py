"""Architectures whose blocks run several times in one forward pass, each looped in a way of its own."""

from __future__ import annotations

import torch
from support.invented import DEPTH, D, Ladder, Rung, through
from torch import Tensor, nn


def rungs(start: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(Rung(start + number) for number in range(count))


class Whole(Ladder):
    """The whole stack, three times, joined."""

    def climb(self, x: Tensor) -> Tensor:
        return through([*self.rungs, *self.rungs, *self.rungs], x)


class FedBack(Ladder):
    """The layers 1 and 2, three times; each round is given the normed stream and what came before the loop: Dory."""

    def __init__(self) -> None:
        super().__init__(depth=5)

    def climb(self, x: Tensor) -> Tensor:
        x = self.rungs[0](x)
        start = self.still(x)
        for _ in range(3):
            x = through(self.rungs[1:3], self.still(x) + start)
        return through(self.rungs[3:], x)


class Adapted(Ladder):
    """Prelude, core and coda in lists of their own; an adapter joins the core's state and its input: Huginn."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.prelude, self.core, self.coda = rungs(0, 2), rungs(2, 2), rungs(4, 1)
        self.adapter, self.begin = nn.Linear(2 * D, D), nn.Parameter(torch.randn(D))

    def climb(self, x: Tensor) -> Tensor:
        x = through(self.prelude, x)
        state = self.state(x)
        for _ in range(3):
            state = through(self.core, self.adapter(torch.cat([state, x], -1)))
        return through(self.coda, state)

    def state(self, x: Tensor) -> Tensor:
        return self.begin.expand_as(x)


class RandomStart(Adapted):
    """The core's state begins at random: Huginn's own way."""

    def state(self, x: Tensor) -> Tensor:
        return torch.randn_like(x)


class ThereAndBack(Ladder):
    """Up the blocks, and down again."""

    def climb(self, x: Tensor) -> Tensor:
        return through([*self.rungs, *reversed(self.rungs)], x)


class Deep(Rung):
    """A block that thinks once more in each of its runs."""

    turn = 0

    def thought(self, m: Tensor) -> Tensor:
        for _ in range(self.turn + 1):
            m = self.think(m)
        self.turn = (self.turn + 1) % 3
        return m


class Deepening(Ladder):
    """What one branch calls differs from run to run."""

    def __init__(self) -> None:
        super().__init__(Deep)

    def climb(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = super().climb(x)
        return x


class LowRank(Rung):
    """Each run has small weights of its own beside the MLP and the attention's output projection."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.turn = 0
        for name in ("down", "up"):
            setattr(self, name, nn.ModuleList(nn.Linear(*((D, 2) if name == "down" else (2, D))) for _ in range(6)))

    def beside(self, place: int, x: Tensor) -> Tensor:
        return self.up[place](self.down[place](x))  # type: ignore[index,operator,no-any-return]

    def mixed(self, n: Tensor) -> Tensor:
        z = self.blend.attend(*self.blend.split(n))
        return self.blend.back(z) + self.beside(self.turn, z)  # type: ignore[no-any-return]

    def thought(self, m: Tensor) -> Tensor:
        return self.think(m) + self.beside(3 + self.turn, m)  # type: ignore[no-any-return]


class Adapters(Ladder):
    """Relaxed recursion: the same blocks three times, each time with other low-rank weights."""

    def __init__(self) -> None:
        super().__init__(LowRank)

    def climb(self, x: Tensor) -> Tensor:
        for turn in range(3):
            for rung in self.rungs:
                rung.turn = turn  # type: ignore[assignment]
            x = super().climb(x)
        return x


class Chosen(Ladder):
    """After one round, half of the positions run through the last blocks again: a mixture of recursions."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(D, 1)

    def climb(self, x: Tensor) -> Tensor:
        x = super().climb(x)
        half = x.shape[1] // 2
        places = self.choose(x).topk(half, 1).indices.sort(1).values.expand(-1, -1, D)
        return x.scatter(1, places, through(self.rungs[1:], x.gather(1, places)))


class Stack(nn.Module):
    """A stack of blocks that is a module."""

    def __init__(self, start: int, count: int) -> None:
        super().__init__()
        self.rungs, self.calm = rungs(start, count), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.calm(through(self.rungs, x))


class Nested(Ladder):
    """Cycles of a fast stack in cycles of a slow one, each given both states: HRM."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.fast, self.slow = Stack(0, 2), Stack(2, 2)
        self.begin = nn.Parameter(torch.randn(D))

    def climb(self, x: Tensor) -> Tensor:
        high, low = x, self.begin.expand_as(x)
        for _ in range(2):
            for _ in range(3):
                low = self.fast(low + high)
            high = self.slow(high + low)
        return high


class Universal(Ladder):
    """One block, four times, each time with the embedding of the step added: a universal transformer, ALBERT."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.step = nn.Embedding(4, D)

    def climb(self, x: Tensor) -> Tensor:
        for step in range(4):
            x = self.rungs[0](x + self.step.weight[step])
        return x


class Uneven(Ladder):
    """Three rounds, and a block that is left out of the last."""

    def climb(self, x: Tensor) -> Tensor:
        for number in range(3):
            x = through(self.rungs[: DEPTH - (number == 2)], x)
        return x


class OneNorm(Rung):
    """A block with one norm for both of its branches."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        del self.cool

    def to_mlp(self, y: Tensor) -> Tensor:
        return self.calm(y)


class TwiceInARun(Ladder):
    """Each run of a block calls its norm twice."""

    def __init__(self) -> None:
        super().__init__(OneNorm)

    def climb(self, x: Tensor) -> Tensor:
        start = x
        for _ in range(3):
            x = super().climb(x + 0.5 * start)
        return x


class WithItsStart(Rung):
    """A block whose MLP reads what the model began with, too: in the first round that is the stream itself."""

    def forward(self, x: Tensor, start: Tensor) -> Tensor:  # type: ignore[override]
        self.start = start
        return super().forward(x)

    def to_mlp(self, y: Tensor) -> Tensor:
        return self.cool(y + self.start)


class Reminded(Ladder):
    """Each block of each round is given the embedding beside the stream."""

    def __init__(self) -> None:
        super().__init__(WithItsStart)

    def climb(self, x: Tensor) -> Tensor:
        start = x
        for _ in range(3):
            for rung in self.rungs:
                x = rung(x, start)
        return x


class Halting(Ladder):
    """Each position is kept where it is once it has halted; the number of rounds is fixed: ACT without its exit."""

    def __init__(self) -> None:
        super().__init__()
        self.halt = nn.Linear(D, 1)

    def climb(self, x: Tensor) -> Tensor:
        for _ in range(3):
            new = super().climb(x)
            x = torch.where(self.halt(new) > 0, x, new)
        return x


class HaltingForGood(Halting):
    """Once it has halted, a position is kept in all further rounds; in the first round none has."""

    def climb(self, x: Tensor) -> Tensor:
        done = torch.zeros(*x.shape[:2], 1, dtype=torch.bool, device=x.device)
        for _ in range(3):
            x = torch.where(done, x, Ladder.climb(self, x))
            done = done | (self.halt(x) > 0)
        return x


class Averaged(Ladder):
    """The unembedding reads the mean of all rounds."""

    def climb(self, x: Tensor) -> Tensor:
        rounds = []
        for _ in range(3):
            x = super().climb(x)
            rounds.append(x)
        return torch.stack(rounds).mean(0)


class Cycled(Ladder):
    """Two blocks in a list of four, by turns, and the list twice: their weights are shared under several names."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.rungs = nn.ModuleList([*self.rungs, *self.rungs])

    def climb(self, x: Tensor) -> Tensor:
        for number, rung in enumerate([*self.rungs, *self.rungs]):
            rung.i = number % 4  # type: ignore[assignment]
            x = rung(x)
        return x


class Named(Ladder):
    """The core is called by another name too, which is no list's."""

    def __init__(self) -> None:
        super().__init__()
        self.core = self.rungs[1]

    def climb(self, x: Tensor) -> Tensor:
        x = self.rungs[0](x)
        for _ in range(3):
            x = self.core(x)
        return self.rungs[2](x)  # type: ignore[no-any-return]


class Groups(Ladder):
    """Groups of blocks, each of which runs twice before the next begins: ALBERT with several groups."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.groups = nn.ModuleList(Group(start) for start in (0, 2))

    def climb(self, x: Tensor) -> Tensor:
        for group in self.groups:
            for _ in range(2):
                x = group(x)
        return x


class Group(nn.Module):
    """Two blocks, one behind the other."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.rungs = rungs(start, 2)

    def forward(self, x: Tensor) -> Tensor:
        return through(self.rungs, x)


class ByTheText(Ladder):
    """The number of rounds is read from the token ids, before any block runs."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.lookup(tokens)
        for _ in range(1 + int(tokens.sum() % 3)):
            x = self.climb(x)
        return self.finish(x)


class ByChance(Ladder):
    """The number of rounds is drawn."""

    def climb(self, x: Tensor) -> Tensor:
        for _ in range(int(torch.randint(1, 4, (1,)))):
            x = super().climb(x)
        return x


class UntilSure(Ladder):
    """Rounds until the logits of the last position are sure enough: an early exit."""

    def climb(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = super().climb(x)
            if torch.softmax(self.speak(self.still(x))[:, -1], -1).amax() > 0.9:
                break
        return x
