"""Invented architectures: norms in every place and form, precision, biases, idle modules, positions and axes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.invented import Behind, D, Ladder, Mix, Rung, check, note, told
from support.invented_streams import Joined
from support.raises import raises
from torch import Tensor, nn

from hookmap.discovery.discover import discover
from hookmap.errors import DiscoveryError
from hookmap.verification.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded")]


# Norms ------------------------------------------------------------------------------------------------------------


class Bare(Rung):
    """RMSNorm written out, in a spelling per subclass; the final norm and the head too."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.calm = self.cool = None  # type: ignore[assignment]
        self.gain = nn.Parameter(torch.rand(D) + 0.5)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain

    def to_mixer(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def to_mlp(self, y: Tensor) -> Tensor:
        return self.norm(y)


class ByPower(Bare):
    def norm(self, x: Tensor) -> Tensor:
        return self.gain * (x * (x * x).mean(-1, keepdim=True).add(1e-6).pow(-0.5))


class ByLength(Bare):
    def norm(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) * self.gain


class ByHand(Bare):
    def norm(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * self.gain + 0.1


class ByFunction(Bare):
    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), self.gain) if self.i else F.rms_norm(x, (D,), self.gain)


class ByTanh(Bare):
    """A normalisation without a statistic (dynamic tanh)."""

    def norm(self, x: Tensor) -> Tensor:
        return self.gain * torch.tanh(0.7 * x) + 0.1


class TiedHead(Ladder):
    def __init__(self, rung: Callable[[int], nn.Module]) -> None:
        super().__init__(rung)
        self.still = self.speak = None  # type: ignore[assignment]

    def finish(self, x: Tensor) -> Tensor:
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        logits = F.linear(n, self.lookup.weight)
        note(None, final_norm=n, logits=logits)
        return logits


@pytest.mark.parametrize("rung", [Bare, ByPower, ByLength, ByHand, ByFunction, ByTanh])
def test_norms_are_functions_and_the_head_is_tied(rung: type[Bare]) -> None:
    found = check(TiedHead(rung), {"final_norm": "no module boundary"})
    assert found.lm_head_path is None
    if rung not in (ByHand, ByTanh):  # a root of a mean of squares: not of centred rows, nor without a statistic
        assert found.kinds[0].norm_placement == "pre"


class After(Rung):
    def forward(self, x: Tensor) -> Tensor:
        a = self.blend(x)
        y = self.calm(1.5 * x + a)
        f = self.think(y)
        return told(self.i, x, x, a, y, y, f, self.cool(y + f))


class Sandwich(Behind):
    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.warm, self.hot = nn.LayerNorm(D), nn.LayerNorm(D)


@pytest.mark.parametrize(("rung", "placement"), [(After, "post"), (Sandwich, "sandwich")])
def test_norms_stand_behind(rung: type[Rung], placement: str) -> None:
    assert check(Ladder(rung)).kinds[0].norm_placement == placement


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * self.gain


def test_a_norm_without_a_statistic_is_what_the_branch_reads_through() -> None:
    class Rung_(Rung):
        def __init__(self, i: int) -> None:
            super().__init__(i)
            self.calm, self.cool = Tanh(), Tanh()  # type: ignore[assignment]

    check(Ladder(Rung_))


# Precision, biases, idle modules ----------------------------------------------------------------------------------


class HalfBranches(Rung):
    def __init__(self, i: int) -> None:
        super().__init__(i)
        for module in (self.calm, self.cool, self.blend, self.think):
            module.to(torch.bfloat16)

    def to_mixer(self, x: Tensor) -> Tensor:
        return self.calm(x.to(torch.bfloat16))

    def to_mlp(self, y: Tensor) -> Tensor:
        return self.cool(y.to(torch.bfloat16))


def test_the_stream_is_in_full_and_the_branches_in_half_precision() -> None:
    check(Ladder(HalfBranches))


class FullSums(Rung):
    def joined(self, x: Tensor, branch: Tensor) -> Tensor:
        return (x.float() + branch.float()).to(x.dtype)


def test_the_stream_is_in_half_and_its_sums_in_full_precision() -> None:
    (kind,) = check(Ladder(FullSums).to(torch.bfloat16)).kinds
    assert kind.relations[:2] == ("resid_mid = resid_pre + mixer_out", "resid_post = resid_mid + mlp_out")


class Biased(Rung):
    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.lift = nn.Parameter(torch.rand(D))


class BiasedBranch(Biased):
    def mixed(self, n: Tensor) -> Tensor:
        return self.blend(n) + self.lift

    def thought(self, m: Tensor) -> Tensor:
        return self.think(m) + self.lift


class BiasedStream(Biased):
    """The bias goes onto the stream: it is no part of what the branch adds, and stays in the middle."""

    def joined(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch + self.lift


@pytest.mark.parametrize("rung", [BiasedBranch, BiasedStream])
def test_biases_are_added_apart(rung: type[Rung]) -> None:
    check(Ladder(rung))


class Idle(Rung):
    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.pause, self.wait = nn.Dropout(0.5), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n = self.pause(self.calm(self.wait(x)))
        a = self.pause(self.wait(self.blend(n)))
        y = self.wait(x + a)
        m = self.cool(y)
        f = self.pause(self.think(self.wait(m)))
        return self.pause(told(self.i, x, n, a, y, m, f, y + f))


def test_dropout_and_identity_modules_change_nothing() -> None:
    model = Ladder(Idle)
    model.train()
    discover(model)
    assert all(module.training for module in model.modules())
    check(model)


class Unpowered(Mix):
    """Its queries, keys and values are computed, and its kernel is missing."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(v).transpose(1, 2).flatten(2)


class WithoutKernel(Rung):
    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.blend = Unpowered()


def test_a_mixer_that_reads_the_stream_and_returns_zeros_is_refused() -> None:
    with raises(DiscoveryError, "Ladder", "layer 0", "Unpowered", "does not depend"):
        discover(Ladder(WithoutKernel).eval())


class ConstantInside(Rung):
    """A constant is added in front of a norm that stands on the stream."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.own, self.warm = nn.Parameter(torch.randn(D)), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        a = self.blend(x)
        y = self.calm(x + a)
        f = self.think(y)
        return told(self.i, x, x, a, y, y, f, self.cool(self.warm(y + self.own) + f))


def test_a_constant_inside_a_norm_makes_no_map_wrong() -> None:
    model = Ladder(ConstantInside)
    found = check(model)
    relation = "resid_post = norm(norm(resid_mid + other) + mlp_out)"
    (kind,) = found.kinds
    assert relation in kind.relations
    lines = tuple(each if each != relation else relation.replace("other", "mlp_out") for each in kind.relations)
    wrong = found.model_copy(update={"kinds": (kind.model_copy(update={"relations": lines}),)})
    assert not verify(model, architecture_map=wrong).passed


# Positions and axes -----------------------------------------------------------------------------------------------


class Turned(Ladder):
    """[pos, batch, d] inside the model."""

    def climb(self, x: Tensor) -> Tensor:
        return super().climb(x.transpose(0, 1)).transpose(0, 1)


class TurnedRung(Rung):
    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n.transpose(0, 1)).transpose(0, 1)
        y = x + a
        m = self.cool(y)
        f = self.think(m)
        told(self.i, *(t.transpose(0, 1) for t in (x, n, a, y, m, f, y + f)))
        return y + f


def test_the_stream_is_turned_inside_the_model() -> None:
    check(Turned(TurnedRung))


class FlatTurned(TurnedRung):
    """Positions before batch, and then one axis: no capture can unflatten [pos * batch, d] as [batch * pos, d]."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        plain = self.think
        self.think = nn.Module()  # type: ignore[assignment]
        self.think.wide, self.think.narrow = plain.wide, plain.narrow
        self.think.forward = lambda m: self.flat(m)  # type: ignore[method-assign,assignment]

    def flat(self, m: Tensor) -> Tensor:
        return self.think.narrow(F.gelu(self.think.wide(m.reshape(-1, D)))).view(m.shape)


def test_positions_before_batch_on_one_axis_are_not_taken_for_batch_before_positions() -> None:
    check(Turned(FlatTurned))


class Placed(Joined):
    """Positions are added to the stream in each block."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.where = nn.Parameter(torch.randn(64, D))

    def before(self, x: Tensor) -> Tensor:
        return x + self.where[: x.shape[1]]


class PlacedBranch(Placed):
    """Positions are added to what the mixer reads, and not to the stream."""

    forward = Rung.forward

    def to_mixer(self, x: Tensor) -> Tensor:
        return self.calm(self.before(x))


@pytest.mark.parametrize("rung", [Placed, PlacedBranch])
def test_positions_are_added_in_each_block(rung: type[Rung]) -> None:
    check(Ladder(rung))
