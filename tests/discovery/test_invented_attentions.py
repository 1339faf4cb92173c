"""Invented architectures: attentions whose queries, keys, values or heads' outputs stand nowhere: none is guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.invented import Behind, D, Ladder, Mix, Rung, Think, check, read
from support.invented_streams import Short
from torch import Tensor, nn

from hookmap.discovery.discover import discover

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded")]


class Apart(Mix):
    """Queries, keys and values by three modules."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.short = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), Short()

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(2, 3), -1) @ v

    def end(self, z: Tensor) -> Tensor:
        return self.back(z.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.attend(*(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.parts(x))))


class Fused(Apart):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class ShortKeys(Apart):
    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.short(self.k(x)), self.v(x)


class MadeQueries(Apart):
    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x @ (x.transpose(1, 2) @ x).softmax(-1), self.k(x), self.v(x)


class Double(Apart):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, v) + super().attend(k, q, v)


class NoWayOut(Apart):
    def end(self, z: Tensor) -> Tensor:
        return z.transpose(1, 2).flatten(2)


class TwoWaysOut(Apart):
    def end(self, z: Tensor) -> Tensor:
        return super().end(z) + self.three(z.transpose(1, 2).flatten(2))[..., :D]


class BraidedOut(Apart):
    def end(self, z: Tensor) -> Tensor:
        return self.back(z.permute(0, 2, 3, 1).flatten(2))


class OneTensor(Mix):
    """Keys and values are one tensor, sized by position; the size is taken off behind the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.weigh = nn.Linear(D, D), nn.Linear(D, D // 2), nn.Softmax(-1)
        self.sizes = nn.Parameter(torch.rand(16, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        q, sizes = self.q(x).unflatten(-1, (2, -1)).transpose(1, 2), self.sizes[:count]
        kv = self.kv(x)[:, None] * sizes
        mask = torch.full((count, count), float("-inf"), dtype=x.dtype).triu(1)
        z = self.weigh(q @ kv.transpose(2, 3) + mask) @ kv
        return self.back((z / sizes).transpose(1, 2).flatten(2))


def ladder(mix: Callable[[], nn.Module]) -> Ladder:
    class Own(Rung):
        def __init__(self, i: int) -> None:
            super().__init__(i)
            self.blend = mix()

    return Ladder(Own)


@pytest.mark.parametrize(
    ("mix", "missing"),
    [
        (Apart, {}),
        (Fused, {"pattern": "one fused operation computes the attention"}),
        (ShortKeys, {"k": "a convolution over positions stands between"}),
        (MadeQueries, {"q": "computed from products of activations"}),
        (Double, dict.fromkeys("qkvz", "this block's mixer has 2 attentions")),
        (NoWayOut, {"z": "no one projection reads the heads' outputs"}),
        (TwoWaysOut, {"z": "no one projection reads the heads' outputs"}),
        (BraidedOut, {"z": "does not read the heads side by side"}),
    ],
)
def test_what_stands_nowhere_is_refused_and_the_rest_is_read(mix: Callable[[], Any], missing: dict[str, str]) -> None:
    model = ladder(mix).eval()
    found = discover(model)
    block: Any = model.rungs[1].blend
    entered: list[Tensor] = []
    block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    selectors = [s for point in "qkvz" if point not in missing for s in found.selectors(point, 1)]
    seen = {selector.point: tensor for (selector, _), tensor in read(model, selectors).items()}
    with torch.no_grad():
        by_hand = dict(zip("qkv", (p.unflatten(-1, (2, -1)) for p in block.parts(entered[0])), strict=True))
        by_hand["z"] = block.attend(*(by_hand[name].transpose(1, 2) for name in "qkv")).transpose(1, 2)
    assert seen.keys() == set("qkvz") - missing.keys()
    for name in seen:
        torch.testing.assert_close(seen[name], by_hand[name], atol=1e-5, rtol=1e-5)
    for name, reason in missing.items():
        assert reason in (found.unavailable(name, 1) or "(it is there)")


def test_keys_and_values_of_one_tensor_decide_the_pattern_by_right() -> None:
    (kind,) = check(ladder(OneTensor)).kinds
    assert kind.points["k"].terms == kind.points["v"].terms and "pattern" in kind.points
    assert "z = pattern @ v" not in kind.relations


class Convolved(Behind):
    """What both branches add went through a short convolution: the second is an MLP none the less."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.warm, self.hot = Short(), Short()


def test_a_short_convolution_behind_a_branch_makes_no_mixer_of_it() -> None:
    (kind,) = check(Ladder(Convolved)).kinds
    assert kind.branch_order == "sequential"
    raw = [kind.points[f"{branch}_out_raw"].terms[0].module for branch in ("mixer", "mlp")]
    assert raw == ["rungs.{i}.blend", "rungs.{i}.think"]


class Twofold(Rung):
    """An MLP of two modules side by side."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.beside = Think()

    def thought(self, m: Tensor) -> Tensor:
        return self.think(m) + self.beside(m)


def test_the_hidden_activations_of_two_modules_are_not_those_of_the_first() -> None:
    found = check(Ladder(Twofold))
    assert "a sum of several modules" in found.unavailable("mlp_post", 0)
