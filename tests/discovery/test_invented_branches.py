"""Invented architectures: the branches of a block, their order, their parts, and every way to mix positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.invented import D, Ladder, Rung, Think, check, note, told
from torch import Tensor, nn

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded")]


# Branches ---------------------------------------------------------------------------------------------------------


class OneSum(Rung):
    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a, f = self.blend(n), self.think(n)
        z = x + (a + f)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, mlp_in=n, mlp_out=f, resid_post=z)
        return z


class TwoSums(Rung):
    def forward(self, x: Tensor) -> Tensor:
        n, m = self.calm(x), self.cool(x)
        f, a = self.think(m), self.blend(n)
        z = x + f
        z = z + a
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, mlp_in=m, mlp_out=f, resid_post=z)
        return z


@pytest.mark.parametrize("rung", [OneSum, TwoSums])
def test_branches_are_parallel(rung: type[Rung]) -> None:
    check(Ladder(rung), {"resid_mid": "in parallel"})


class MlpFirst(Rung):
    def forward(self, x: Tensor) -> Tensor:
        m = self.cool(x)
        f = self.think(m)
        y = x + f
        n = self.calm(y)
        a = self.blend(n)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, mlp_in=m, mlp_out=f, resid_post=y + a)
        return y + a


def test_the_mlp_comes_first() -> None:
    found = check(Ladder(MlpFirst), {"resid_mid": "before the mixer"})
    assert found.kinds[0].branch_order != "parallel"


class Macaron(Rung):
    """Half an MLP, the mixer, the other half."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.warm, self.first = nn.LayerNorm(D), Think()

    def forward(self, x: Tensor) -> Tensor:
        m = self.warm(x)
        f = 0.5 * self.first(m)
        w = x + f
        n = self.calm(w)
        a = self.blend(n)
        y = w + a
        z = y + 0.5 * self.think(self.cool(y))
        note(self.i, resid_pre=x, mlp_in=m, mlp_out=f, mixer_in=n, mixer_out=a, resid_mid=y, resid_post=z)
        return z


def test_a_macaron_has_its_middle_after_the_mixer() -> None:
    found = check(Ladder(Macaron))
    assert "mlp_out.1" in found.kinds[0].points


class Chained(Rung):
    """The MLP reads what the attention gives, and not the stream."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        f = self.think(self.cool(a))
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_post=x + a + f, **{"mixer_out.1": f})
        return x + a + f


class ChainedSum(Chained):
    """Both are added at once."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        both = a + self.think(self.cool(a))
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=both, resid_post=x + both)
        return x + both


class OtherSum(Chained):
    """It reads the stream with twice the attention's output."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        f = self.think(self.cool(x + 2 * a))
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_post=x + a + f, **{"mixer_out.1": f})
        return x + a + f


class OwnSum(Rung):
    """The stream with the attention's output is computed a second time, for the MLP."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = x + a
        m = self.cool(x + a)
        f = self.think(m)
        return told(self.i, x, n, a, y, m, f, x + a + f)


class AtOnce(Rung):
    """Both branches are added at once; the MLP reads the stream with the attention's output."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = x + a
        m = self.cool(y)
        f = self.think(m)
        return told(self.i, x, n, a, y, m, f, x + (f + a))


@pytest.mark.parametrize("rung", [OwnSum, AtOnce])
def test_the_stream_with_the_mixers_output_is_the_middle_however_it_is_summed(rung: type[Rung]) -> None:
    found = check(Ladder(rung))
    assert found.kinds[0].branch_order == "sequential"


@pytest.mark.parametrize("rung", [Chained, ChainedSum, OtherSum])
def test_an_mlp_of_the_mixers_output_is_said_to_be_one(rung: type[Rung]) -> None:
    where = "in a sum of its own, which is no" if rung is OtherSum else "alone, and no stream with it"
    reason = f"the MLP reads the mixer's output {where}"
    found = check(Ladder(rung), dict.fromkeys(("mlp_in", "mlp_out", "resid_mid"), reason))
    if rung is Chained:
        assert found.unavailable("q.1", 0) == "this branch reads the output of another, whose attention it is: use q"
        assert "attn_out.1" not in found.kinds[0].points


class Chosen(Rung):
    """The MLP is of the positions that a router chooses."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.score = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = x + a
        weights, places = self.score(y).topk(y.shape[1] // 2, dim=1)
        places = places.expand(-1, -1, D)
        f = torch.zeros_like(y).scatter(1, places, self.think(self.cool(y.gather(1, places))) * weights.sigmoid())
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_post=y + f)
        return y + f


def test_an_mlp_of_chosen_positions_is_said_to_be_one() -> None:
    reason = r"a top-k chooses the positions that mixer_out\.1 is of"
    check(Ladder(Chosen), dict.fromkeys(("mlp_in", "mlp_out", "resid_mid"), reason))


class Flat(Rung):
    def thought(self, m: Tensor) -> Tensor:
        return self.think(m.view(-1, D)).view(m.shape)


class Sliced(Rung):
    """A memory saver: the positions in two pieces."""

    def thought(self, m: Tensor) -> Tensor:
        return torch.cat([self.think(m[:, :4]), self.think(m[:, 4:])], 1)


class Split(Rung):
    def thought(self, m: Tensor) -> Tensor:
        return torch.cat([self.think(part) for part in m.split(3, 1)], dim=-2)


class Looped(Rung):
    """Position by position."""

    def thought(self, m: Tensor) -> Tensor:
        return torch.stack([self.think(m[:, t]) for t in range(m.shape[1])], 1)


class Filled(Rung):
    """Pieces written into an empty tensor."""

    def thought(self, m: Tensor) -> Tensor:
        out = torch.empty_like(m)
        for start in range(0, m.shape[1], 3):
            out[:, start : start + 3] = self.think(m[:, start : start + 3])
        return out


class Experts(Rung):
    """A mixture in a python loop; as many experts as the usual number of tokens in discovery's pass."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.choose, self.minds = nn.Linear(D, 7), nn.ModuleList(Think() for _ in range(7))

    def thought(self, m: Tensor) -> Tensor:
        flat = m.reshape(-1, D)
        weights, chosen = torch.topk(torch.softmax(self.choose(flat), -1), 2)
        out = torch.zeros_like(flat)
        for number, mind in enumerate(self.minds):
            token, slot = torch.where(chosen == number)
            out.index_add_(0, token, mind(flat[token]) * weights[token, slot, None])
        return out.view(m.shape)


class Convolved(Rung):
    """Products as convolutions of one position, features before positions."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.up, self.down = nn.Conv1d(D, 2 * D, 1), nn.Conv1d(2 * D, D, 1)

    def thought(self, m: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(m.transpose(1, 2)))).transpose(1, 2)


@pytest.mark.parametrize("rung", [Flat, Sliced, Split, Looped, Filled, Experts, Convolved])
def test_an_mlp_in_pieces_is_no_mixer(rung: type[Rung]) -> None:
    check(Ladder(rung))


@pytest.mark.parametrize("rung", [Sliced, Split, Looped])
def test_an_mlp_in_pieces_is_no_mixer_where_nothing_mixes(rung: type[Rung]) -> None:
    class Alone(rung):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Tensor:
            m = self.cool(x)
            f = self.thought(m)
            note(self.i, resid_pre=x, mlp_in=m, mlp_out=f, resid_post=x + f)
            return x + f

    found = check(Ladder(Alone), dict.fromkeys(("mixer_in", "mixer_out", "resid_mid"), "this block has no mixer"))
    assert found.kinds[0].branch_order == "mlp_only"


class Chain(Rung):
    """An MLP with more steps than the model has blocks."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.think = nn.Sequential(  # type: ignore[assignment]
            nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.GELU(), nn.Identity(), nn.Linear(D, D), nn.Dropout(0.1)
        )


def test_the_steps_of_an_mlp_are_not_the_blocks() -> None:
    found = check(Ladder(Chain))
    assert found.layers_path == "rungs.{i}"
    assert found.unavailable("mlp_pre", 0).startswith("what the activation function reads is no linear function")


class Shift(Rung):
    """RWKV's way: what stands before is mixed in, in the second branch too."""

    spelling = "pad"

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.ratio = nn.Parameter(torch.rand(D))

    def before(self, m: Tensor) -> Tensor:
        if self.spelling == "pad":
            return F.pad(m, (0, 0, 1, -1))
        if self.spelling == "cat":
            return torch.cat([torch.zeros_like(m[:, :1]), m[:, :-1]], 1)
        if self.spelling == "write":
            out = torch.zeros_like(m)
            out[:, 1:] = m[:, :-1]
            return out
        return torch.roll(m, 1, 1)

    def thought(self, m: Tensor) -> Tensor:
        return self.think(m * self.ratio + self.before(m) * (1 - self.ratio))


class ShiftAlone(Shift):
    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.thought(n)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_post=x + a)
        return x + a


@pytest.mark.parametrize("spelling", ["pad", "cat", "roll", "write"])
def test_a_token_shift_is_in_the_mlp_beside_a_mixer_and_else_a_mixer(spelling: str) -> None:
    check(Ladder(type("Shift_", (Shift,), {"spelling": spelling})))
    check(Ladder(type("Alone", (ShiftAlone,), {"spelling": spelling})), {"mlp_out": "no MLP", "resid_mid": "no MLP"})


class Alone(Rung):
    """One branch, which mixes positions in a way per case."""

    way: Callable[[Alone, Tensor], Tensor]

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.lstm, self.weight = nn.LSTM(D, D, batch_first=True), nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.think(type(self).way(self, n))
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_post=x + a)
        return x + a

    def by_weights(self, n: Tensor) -> Tensor:
        length = n.shape[1]
        return (n.transpose(1, 2) @ self.weight[:length, :length].triu()).transpose(1, 2)


_WAYS: dict[str, Callable[[Alone, Tensor], Tensor]] = {
    "lstm": lambda block, n: block.lstm(n)[0],
    "weights over positions": Alone.by_weights,
    "fourier": lambda _, n: torch.fft.fft(torch.fft.fft(n, dim=-1), dim=1).real * 0.1,
    "running mean": lambda _, n: n.cumsum(1) / torch.arange(1, n.shape[1] + 1)[:, None],
    "running maximum": lambda _, n: n + torch.cummax(n, 1)[0],
    "maximum": lambda _, n: n + n.max(1, keepdim=True)[0],
    "softmax": lambda _, n: n * torch.softmax(n, 1),
    "statistics": lambda _, n: (n - n.mean(1, keepdim=True)) / (n.std(1, keepdim=True) + 0.1),
    "constant index": lambda _, n: n[:, (torch.arange(n.shape[1]) - 1).clamp_min(0)] + n,
    "turned round": lambda _, n: torch.index_select(n, 1, torch.arange(n.shape[1]).flip(0)),
    "the first position": lambda _, n: n[:, :1] + n,
    "the first position, repeated": lambda _, n: n * n[:, :1].expand(-1, n.shape[1], -1),
    "the first of a span": lambda _, n: torch.where(torch.arange(n.shape[1])[:, None] > 3, n, n[:, :1]),
    "pooling": lambda _, n: F.avg_pool1d(F.pad(n.transpose(1, 2), (2, 0)), 3, 1).transpose(1, 2),
    "pooling in place": lambda _, n: F.max_pool1d(n.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "resampling": lambda _, n: F.interpolate(n[:, ::2].transpose(1, 2), n.shape[1]).transpose(1, 2),
    "shift of all": lambda _, n: torch.roll(n, n.shape[2]).view(n.shape) + n,
    "triangular": lambda _, n: torch.einsum("ts,bsd->btd", torch.ones(n.shape[1], n.shape[1]).tril(), n) * 0.2,
    "solving": lambda _, n: torch.linalg.solve_triangular(torch.eye(n.shape[1]).cumsum(0), n, upper=False),
    "sorting": lambda _, n: n.sort(1)[0],
    "median": lambda _, n: n - n.median(1, keepdim=True)[0],
    "group norm": lambda _, n: n + F.group_norm(n.transpose(1, 2), 2).transpose(1, 2),
    "norm over all": lambda _, n: n + F.layer_norm(n, n.shape[1:]),
    "writing elsewhere": lambda _, n: torch.zeros_like(n).index_copy(1, torch.arange(n.shape[1]).flip(0), n),
    "windows": lambda _, n: F.pad(n, (0, 0, 2, 0)).unfold(1, 3, 1).amax(-1),
    "logarithms": lambda _, n: n.logcumsumexp(1),
    "one step": lambda _, n: torch.lerp(n, F.pad(n, (0, 0, 1, -1)), 0.5).cumsum(1) * 0.3,
    "differences": lambda _, n: F.pad(n[:, 1:] - n[:, :-1], (0, 0, 1, 0)),
}


@pytest.mark.parametrize("way", _WAYS)
def test_every_way_to_mix_positions_is_a_mixer(way: str) -> None:
    rung = type("Alone_", (Alone,), {"way": _WAYS[way]})
    found = check(Ladder(rung), {"mlp_out": "no MLP", "resid_mid": "no MLP"})
    assert not {"scan_in", "scan_out"} & found.kinds[0].points.keys()


class Scan(Rung):
    """The output projection reads what mixes the positions, which a module of its own gives."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.along, self.back = Way(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        s = self.along(n)
        a = self.back(s)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_post=x + a)
        return x + a


class Way(nn.Module):
    way: Callable[[None, Tensor], Tensor]

    def forward(self, n: Tensor) -> Tensor:
        return type(self).way(None, n)


_STATES = {"running maximum", "logarithms", "one step"}
_NO_STATES = {"fourier", "maximum", "softmax", "statistics", "turned round", "pooling in place", "sorting", "median"}


@pytest.mark.parametrize("way", sorted(_STATES | _NO_STATES))
def test_a_scan_is_what_carries_a_state_along_the_text(way: str) -> None:
    class Own(Scan):
        def __init__(self, i: int) -> None:
            super().__init__(i)
            self.along = type("Way_", (Way,), {"way": _WAYS[way]})()

    found = check(Ladder(Own), {"mlp_out": "no MLP", "resid_mid": "no MLP"})
    if way in _STATES:
        (term,) = found.kinds[0].points["scan_out"].terms
        assert term.text() in ("rungs.{i}.along.output", "rungs.{i}.back.input[0]")
    else:
        assert found.unavailable("scan_out", 0) == "no operation of this mixer is seen to carry a state along the text"


class Recurrent(Rung):
    """A state that a python loop carries from position to position."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        wide, state, states = self.think(n), torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = 0.5 * state + wide[:, t]
            states.append(state)
        a = torch.stack(states, 1)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_post=x + a)
        return x + a


def test_a_state_in_a_python_loop_mixes_positions() -> None:
    found = check(Ladder(Recurrent), {"mlp_out": "no MLP", "resid_mid": "no MLP"})
    assert found.kinds[0].mixer.type == "recurrent"
    assert "scan is not in what the last projection reads" in (found.unavailable("scan_out", 0) or "")


class GatedByTheStream(Rung):
    """A gate of the bare stream multiplies what a branch makes of its norm."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.sluice, self.weir = nn.Linear(D, D), nn.Linear(D, D)

    def gates(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(self.sluice(x)), torch.tanh(self.weir(y))

    def forward(self, x: Tensor) -> Tensor:
        bare = self.blend(self.calm(x))
        a = self.gates(x, x)[0] * bare
        y = x + a
        raw = self.think(self.cool(y))
        f = raw * self.gates(y, y)[1]
        note(self.i, resid_pre=x, mixer_out_raw=bare, mixer_out=a, resid_mid=y, resid_post=y + f)
        note(self.i, mlp_out_raw=raw, mlp_out=f)
        return y + f


class GatedAsItIs(GatedByTheStream):
    """The gate is no more than a product: it does less than the branch."""

    def gates(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.sluice(x), self.weir(y)


@pytest.mark.parametrize("rung", [GatedByTheStream, GatedAsItIs])
def test_what_reads_the_stream_and_a_norm_of_it_has_no_one_input(rung: type[Rung]) -> None:
    why = "part of it reads the stream itself"
    found = check(Ladder(rung), {"mixer_in": why, "mlp_in": why})
    (post,) = found.kinds[0].points["mlp_post"].terms
    assert post.text() == "rungs.{i}.think.narrow.input[0]"
