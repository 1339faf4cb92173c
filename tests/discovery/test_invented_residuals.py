"""Invented architectures: residuals that are scaled, gated, written in place, or added by a module itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.invented import D, Ladder, Mix, Rung, V, check, listening, note, told
from support.raises import raises
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hookmap.discovery.discover import discover
from hookmap.errors import DiscoveryError
from hookmap.verification.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded")]


# Residuals --------------------------------------------------------------------------------------------------------


class Weighed(Rung):
    keep, add = 1.0, 0.3

    def mixed(self, n: Tensor) -> Tensor:
        return self.add * self.blend(n)

    def thought(self, m: Tensor) -> Tensor:
        return self.add * self.think(m)

    def joined(self, x: Tensor, branch: Tensor) -> Tensor:
        return (x if self.keep == 1.0 else self.keep * x) + branch


class Fading(Weighed):
    keep = 0.7


class Divided(Weighed):
    """0.7 x + 0.3 f, with the constants in other hands: division and alpha."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = torch.add(x / 2, a, alpha=0.3)
        m = self.cool(y)
        f = self.think(m)
        return told(self.i, x, n, 0.3 * a, y, m, -2 * f, torch.sub(y * 0.7, f, alpha=2.0))


@pytest.mark.parametrize("rung", [Weighed, Fading, Divided])
def test_residuals_are_scaled(rung: type[Rung]) -> None:
    check(Ladder(rung))


class Gated(Rung):
    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.vector, self.number = nn.Parameter(torch.rand(D)), nn.Parameter(torch.rand(()))
        self.door = nn.Linear(D, D)

    def gate(self, n: Tensor, branch: Tensor) -> Tensor:
        raise NotImplementedError

    def mixed(self, n: Tensor) -> Tensor:
        return self.gate(n, self.blend(n))

    def thought(self, m: Tensor) -> Tensor:
        return self.gate(m, self.think(m))


class ByVector(Gated):
    def gate(self, n: Tensor, branch: Tensor) -> Tensor:
        return self.vector * branch


class ByNumber(Gated):
    def gate(self, n: Tensor, branch: Tensor) -> Tensor:
        return self.number * branch


class ByInput(Gated):
    def gate(self, n: Tensor, branch: Tensor) -> Tensor:
        return torch.sigmoid(self.door(n)) * branch


@pytest.mark.parametrize("rung", [ByVector, ByNumber, ByInput])
def test_residuals_are_gated(rung: type[Rung]) -> None:
    check(Ladder(rung))


class Highway(Gated):
    """g f(x) + (1 - g) x: no addition to the stream."""

    def forward(self, x: Tensor) -> Tensor:
        g = torch.sigmoid(self.door(x))
        y = g * self.blend(self.calm(x)) + (1 - g) * x
        note(self.i, resid_pre=x, resid_post=y)
        return y


def test_a_highway_has_no_residual_addition() -> None:
    check(Ladder(Highway), {"mixer_out": "no residual addition", "resid_mid": "no residual addition"})


class Fused(Rung):
    """Residuals in one operation with something else."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = torch.addcmul(x, a, torch.full((D,), 0.5), value=1.0)
        m = self.cool(y)
        f = self.think(m)
        return told(self.i, x, n, 0.5 * a, y, m, 0.25 * f, torch.lerp(y, f, 0.25))


def test_residuals_are_one_operation_with_something_else() -> None:
    found = check(Ladder(Fused))
    assert "resid_post = 0.75 * resid_mid + mlp_out" in found.kinds[0].relations


class InPlace(Rung):
    def forward(self, x: Tensor) -> Tensor:
        note(self.i, resid_pre=x)
        n = self.calm(x)
        a = self.blend(n)
        note(self.i, mixer_in=n, mixer_out=a)
        x += a
        note(self.i, resid_mid=x)
        m = self.cool(x)
        f = self.think(m)
        note(self.i, mlp_in=m, mlp_out=f)
        x.add_(f)
        note(self.i, resid_post=x)
        return x


class IntoBranch(Rung):
    """The stream is added into the branch's own memory."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a)
        a += x
        note(self.i, resid_mid=a)
        m = self.cool(a)
        f = self.think(m)
        note(self.i, mlp_in=m, mlp_out=f)
        f.add_(a)
        note(self.i, resid_post=f)
        return f


@pytest.mark.parametrize("rung", [InPlace, IntoBranch])
def test_residuals_are_added_in_place(rung: type[Rung]) -> None:
    check(Ladder(rung))


class AddsItself(nn.Module):
    def __init__(self, inner: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x)) + x


class Swallowed(Rung):
    """Its modules add the residual themselves, as a functional one too: `x + sub(x)` with a residual inside `sub`."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.blend = AddsItself(Mix(), nn.LayerNorm(D))  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y = self.blend(x)
        m = self.cool(y)
        f = self.think(m)
        n = self.blend.norm(x)
        return told(self.i, x, n, self.blend.inner(n), y, m, f, y + f) if listening() else y + f


class Doubled(Rung):
    """Branches that hold a residual of their own: what is added is the whole of the branch."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.calm(x)
        a = a + self.blend(a)
        y = a + x
        m = y
        f = m + self.think(m)
        return told(self.i, x, self.calm(x), a, y, m, f, f + y)


def test_a_module_adds_the_residual_itself() -> None:
    class Once(Swallowed):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    check(Ladder(Once))


def test_a_branch_with_a_residual_of_its_own_is_added_whole() -> None:
    # mixer_in is computed again for the tape, so the norm runs twice there; the map is made without the tape.
    check(Ladder(Doubled))


class Deferred(Rung):
    """(branch, residual) cross the blocks apart and are added by the next one: no tensor is the stream."""

    def forward(self, f: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = f + x
        n = self.calm(x)
        a = self.blend(n)
        y = x + a
        m = self.cool(y)
        note(self.i, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m)
        f = self.think(m)
        note(self.i, mlp_out=f)
        return f, y


class Pair(Ladder):
    def climb(self, x: Tensor) -> Tensor:
        f = torch.zeros_like(x)
        for rung in self.rungs:
            f, x = rung(f, x)
        return f + x


def test_a_stream_that_crosses_the_blocks_in_two_tensors_is_refused() -> None:
    with raises(DiscoveryError, "two tensors"):
        discover(Pair(Deferred).eval())


# As transformers would have them ----------------------------------------------------------------------------------


class OddConfig(PretrainedConfig):
    model_type = "invented_odd"

    def __init__(self, breadth: int = 24, storeys: int = 3, **kwargs: Any) -> None:
        self.breadth, self.storeys = breadth, storeys
        super().__init__(**kwargs)


class OddForCausalLM(PreTrainedModel):
    """Two residual constants, a dictionary between blocks, logits with a cap."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(V, config.breadth)
        self.storeys = nn.ModuleList(Fading(i) for i in range(config.storeys))
        self.end = nn.LayerNorm(config.breadth)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False, **kwargs: Any) -> CausalLMOutputWithPast:
        x = self.words(input_ids)
        note(None, embed=x)
        x, states = 5.0 * x, []
        for storey in self.storeys:
            states.append(x)
            x = storey(x)
        n = self.end(x)
        logits = torch.tanh(F.linear(n, self.words.weight) / 30) * 30
        note(None, final_norm=n, logits=logits)
        return CausalLMOutputWithPast(logits=logits, hidden_states=(*states, n) if output_hidden_states else None)


def test_a_pretrained_model_of_an_unknown_kind() -> None:
    model = OddForCausalLM(OddConfig()).float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    found = check(model)
    assert found.architecture == "OddForCausalLM" and found.d_model == 24
    names = {check.name for check in verify(model).checks}
    assert "hidden_states" in names
