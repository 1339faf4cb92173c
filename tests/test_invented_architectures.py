"""Architectures that nobody published, with unfamiliar names: discovery is right about them, or says why it cannot be.

Every model writes its own tensors on a tape while it runs; what the map's selectors give to plain PyTorch hooks must
be those tensors, and a point that the tape has and the map has not must be refused with the reason that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hookmap.discovery import discover
from hookmap.errors import DiscoveryError
from hookmap.verification import verify

D, V, DEPTH = 24, 50, 3
IDS = torch.tensor([[5, 17, 3, 44, 9, 40, 31, 8], [11, 2, 41, 6, 30, 4, 23, 49]])
CORE = (
    "embed", "resid_pre", "mixer_in", "mixer_out", "resid_mid", "mlp_in", "mlp_out", "resid_post", "final_norm",
    "logits",
)  # fmt: skip
_tape: dict[tuple[str, int | None], Tensor] | None = None


def note(layer: int | None, **tensors: Tensor) -> None:
    """What a model says of itself, while somebody listens."""
    if _tape is not None:
        _tape.update({(name, layer): tensor.detach().clone() for name, tensor in tensors.items()})


def check(model: nn.Module, missing: dict[str, str] | None = None) -> Any:
    """The map says what the tape says; it lacks exactly the points of `missing`, each for a reason that matches."""
    global _tape
    missing = missing or {}
    model.eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = discover(model)
    parts: dict[Any, Tensor] = {}
    handles = []
    for selector in found.selectors():
        for number, term in enumerate(selector.terms):
            calls = [0]

            def hook(_: Any, args: Any, kwargs: Any, output: Any, key: Any = (selector, number, calls)) -> None:
                selector, number, calls = key
                term, calls[0] = selector.terms[number], calls[0] + 1
                if term.call in (None, calls[0] - 1):
                    tensor = term.resolve(args, kwargs, output).detach().clone()
                    parts[selector, number] = term.arrange(tensor, *IDS.shape)

            handles.append(model.get_submodule(term.module).register_forward_hook(hook, with_kwargs=True))
    _tape = {}
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    expected, _tape = _tape, None
    selected = {
        (s.point, s.layer): sum(parts[s, n] * t.scale for n, t in enumerate(s.terms)) for s in found.selectors()
    }
    wrong = []
    for point in CORE:
        for layer in [None] if point in ("embed", "final_norm", "logits") else range(found.num_layers):
            reason = found.unavailable(point, layer)
            if (point, layer) in selected:
                if (point, layer) not in expected:
                    wrong.append(f"{point}[{layer}] is offered, but is no such thing")
                elif not torch.allclose(selected[point, layer].float(), expected[point, layer].float(), atol=1e-5):
                    wrong.append(f"{point}[{layer}] is another tensor")
            elif (point, layer) in expected and point not in missing:
                wrong.append(f"{point}[{layer}] is refused: {reason}")
            if point in missing and not re.search(missing[point], reason or "(it is there)"):
                wrong.append(f"{point}[{layer}] is refused because {reason!r}, expected {missing[point]!r}")
    assert not wrong, "\n".join(wrong)
    result = verify(model)
    assert result.passed, [check for check in result.checks if not check.passed]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return found


class Mix(nn.Module):
    """Attention under no known name."""

    def __init__(self, width: int = D, heads: int = 2) -> None:
        super().__init__()
        self.three, self.back, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.three(x).chunk(3, -1))
        scores = q @ k.transpose(2, 3) * k.shape[-1] ** -0.5
        mask = torch.full((s, s), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        return self.back((torch.softmax(scores + mask, -1) @ v).transpose(1, 2).reshape(b, s, d))


class Think(nn.Module):
    """A multilayer perceptron under no known name."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(x)))


class Rung(nn.Module):
    """A pre-norm block; subclasses say how it runs."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.i = i
        self.calm, self.cool = nn.LayerNorm(D), nn.LayerNorm(D)
        self.blend, self.think = Mix(), Think()

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = x + a
        m = self.cool(y)
        f = self.think(m)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


class Ladder(nn.Module):
    """The model around the blocks."""

    def __init__(self, rung: Callable[[int], nn.Module] = Rung, depth: int = DEPTH) -> None:
        super().__init__()
        self.lookup = nn.Embedding(V, D)
        self.rungs = nn.ModuleList(rung(i) for i in range(depth))
        self.still, self.speak = nn.LayerNorm(D), nn.Linear(D, V)

    def climb(self, x: Tensor) -> Tensor:
        for rung in self.rungs:
            x = rung(x)
        return x

    def finish(self, x: Tensor) -> Tensor:
        n = self.still(x)
        logits = self.speak(n)
        note(None, final_norm=n, logits=logits)
        return logits

    def forward(self, tokens: Tensor) -> Any:
        x = self.lookup(tokens)
        note(None, embed=x)
        return self.finish(self.climb(x))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def test_the_plain_ladder_is_read() -> None:
    found = check(Ladder())
    assert (found.layers_path, found.num_layers) == ("rungs.{i}", DEPTH)
    assert found.kinds[0].mixer.type == "attention" and found.kinds[0].norm_placement == "pre"


def test_a_tape_that_differs_fails_the_check() -> None:
    """The check itself can fail."""

    class Liar(Rung):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            note(self.i, resid_mid=out)
            return out

    with pytest.raises(AssertionError, match=r"resid_mid\[1\] is another tensor"):
        check(Ladder(Liar))


# Arguments and outputs --------------------------------------------------------------------------------------------


class SecondArgument(Rung):
    """(cache, stream) in, (cache, stream) out; the cache has the stream's shape and goes along the blocks."""

    def forward(self, cache: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(x)
        return (torch.tanh(x) if cache is None else torch.sin(cache)), out


class TwoLanes(Ladder):
    def climb(self, x: Tensor) -> Tensor:
        cache = torch.cos(x)
        for rung in self.rungs:
            cache, x = rung(cache, x)
        return x


def test_the_stream_is_the_second_argument_beside_a_tensor_of_its_shape() -> None:
    check(TwoLanes(SecondArgument))


class FirstValue(Rung):
    """The first block makes a tensor of the stream's shape that all others are handed, unchanged."""

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        first = torch.tanh(x) if first is None else first
        n = self.calm(x)
        a = self.blend(n) + first
        y = x + a
        m = self.cool(y)
        f = self.think(m)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return first, y + f


class HandedOn(Ladder):
    def climb(self, x: Tensor) -> Tensor:
        first = None
        for rung in self.rungs:
            first, x = rung(x, first)
        return x


def test_a_value_of_the_first_block_that_all_are_handed_is_not_the_stream() -> None:
    # Layer 0 makes it of the stream itself, past the norm: what its mixer reads is not one tensor.
    found = discover(HandedOn(FirstValue).eval())
    assert [str(s.terms[0]) for s in found.selectors("resid_pre")] == [f"rungs.{i}.input[0]" for i in range(DEPTH)]
    assert [str(s.terms[0]) for s in found.selectors("resid_post")] == [f"rungs.{i}.output[1]" for i in range(DEPTH)]


@dataclass
class Parcel:
    note_of_it: str
    flux: Tensor


class Ticket(NamedTuple):
    number: int
    flux: Tensor


class Wrapped(Rung):
    def forward(self, x: Tensor) -> Parcel:  # type: ignore[override]
        return Parcel("…", super().forward(x))


class Named(Rung):
    def forward(self, x: Tensor) -> Ticket:  # type: ignore[override]
        return Ticket(7, super().forward(x))


class Unwrapping(Ladder):
    def climb(self, x: Tensor) -> Tensor:
        for rung in self.rungs:
            x = rung(x=x).flux
        return x


@pytest.mark.parametrize("rung", [Wrapped, Named])
def test_a_block_returns_a_dataclass_or_a_named_tuple(rung: type[Rung]) -> None:
    check(Unwrapping(rung))


# Residuals --------------------------------------------------------------------------------------------------------


class Weighed(Rung):
    keep, add = 1.0, 0.3

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.add * self.blend(n)
        y = (x if self.keep == 1.0 else self.keep * x) + a
        m = self.cool(y)
        f = self.add * self.think(m)
        z = (y if self.keep == 1.0 else self.keep * y) + f
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=z)
        return z


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
        z = torch.sub(y * 0.7, f, alpha=2.0)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=0.3 * a, resid_mid=y, mlp_in=m, mlp_out=-2 * f, resid_post=z)
        return z


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

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.gate(n, self.blend(n))
        y = x + a
        m = self.cool(y)
        f = self.gate(m, self.think(m))
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


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
        z = torch.lerp(y, f, 0.25)
        note(self.i, resid_pre=x, mixer_in=n, resid_mid=y, mlp_in=m, resid_post=z)
        return z


def test_residuals_that_are_one_operation_with_another_are_refused() -> None:
    reason = "no residual addition"
    check(Ladder(Fused), dict.fromkeys(("mixer_in", "mixer_out", "resid_mid", "mlp_in", "mlp_out"), reason))


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
        note(
            self.i, resid_pre=x, mixer_in=n, mixer_out=self.blend.inner(n), resid_mid=y, mlp_in=m, mlp_out=f,
            resid_post=y + f,
        ) if _tape is not None else None  # fmt: skip
        return y + f


class Doubled(Rung):
    """Branches that hold a residual of their own: what is added is the whole of the branch."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.calm(x)
        a = a + self.blend(a)
        y = a + x
        m = y
        f = m + self.think(m)
        z = f + y
        note(self.i, resid_pre=x, mixer_in=self.calm(x), mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=z)
        return z


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
    with pytest.raises(DiscoveryError, match="two tensors"):
        discover(Pair(Deferred).eval())


# Norms ------------------------------------------------------------------------------------------------------------


class Bare(Rung):
    """RMSNorm written out, in a spelling per subclass; the final norm and the head too."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.calm = self.cool = None  # type: ignore[assignment]
        self.gain = nn.Parameter(torch.rand(D) + 0.5)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        a = self.blend(n)
        y = x + a
        m = self.norm(y)
        f = self.think(m)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


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


class After(Rung):
    def forward(self, x: Tensor) -> Tensor:
        a = self.blend(x)
        y = self.calm(1.5 * x + a)
        f = self.think(y)
        z = self.cool(y + f)
        note(self.i, resid_pre=x, mixer_in=x, mixer_out=a, resid_mid=y, mlp_in=y, mlp_out=f, resid_post=z)
        return z


class Sandwich(Rung):
    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.warm, self.hot = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.warm(self.blend(n))
        y = x + a
        m = self.cool(y)
        f = self.hot(self.think(m))
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


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


class Mlp(Rung):
    """A pre-norm block whose MLP is written in `run`."""

    def run(self, m: Tensor) -> Tensor:
        return self.think(m)

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = x + a
        m = self.cool(y)
        f = self.run(m)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


class Flat(Mlp):
    def run(self, m: Tensor) -> Tensor:
        return self.think(m.view(-1, D)).view(m.shape)


class Sliced(Mlp):
    """A memory saver: the positions in two pieces."""

    def run(self, m: Tensor) -> Tensor:
        return torch.cat([self.think(m[:, :4]), self.think(m[:, 4:])], 1)


class Split(Mlp):
    def run(self, m: Tensor) -> Tensor:
        return torch.cat([self.think(part) for part in m.split(3, 1)], dim=-2)


class Looped(Mlp):
    """Position by position."""

    def run(self, m: Tensor) -> Tensor:
        return torch.stack([self.think(m[:, t]) for t in range(m.shape[1])], 1)


class Filled(Mlp):
    """Pieces written into an empty tensor."""

    def run(self, m: Tensor) -> Tensor:
        out = torch.empty_like(m)
        for start in range(0, m.shape[1], 3):
            out[:, start : start + 3] = self.think(m[:, start : start + 3])
        return out


class Experts(Mlp):
    """A mixture in a python loop; as many experts as the usual number of tokens in discovery's pass."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.choose, self.minds = nn.Linear(D, 7), nn.ModuleList(Think() for _ in range(7))

    def run(self, m: Tensor) -> Tensor:
        flat = m.reshape(-1, D)
        weights, chosen = torch.topk(torch.softmax(self.choose(flat), -1), 2)
        out = torch.zeros_like(flat)
        for number, mind in enumerate(self.minds):
            token, slot = torch.where(chosen == number)
            out.index_add_(0, token, mind(flat[token]) * weights[token, slot, None])
        return out.view(m.shape)


class Convolved(Mlp):
    """Products as convolutions of one position, features before positions."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.up, self.down = nn.Conv1d(D, 2 * D, 1), nn.Conv1d(2 * D, D, 1)

    def run(self, m: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(m.transpose(1, 2)))).transpose(1, 2)


@pytest.mark.parametrize("rung", [Flat, Sliced, Split, Looped, Filled, Experts, Convolved])
def test_an_mlp_in_pieces_is_no_mixer(rung: type[Rung]) -> None:
    check(Ladder(rung))


class Chain(Rung):
    """An MLP with more steps than the model has blocks."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.think = nn.Sequential(  # type: ignore[assignment]
            nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.GELU(), nn.Identity(), nn.Linear(D, D), nn.Dropout(0.1)
        )


def test_the_steps_of_an_mlp_are_not_the_blocks() -> None:
    assert check(Ladder(Chain)).layers_path == "rungs.{i}"


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

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = x + a
        m = self.cool(y)
        f = self.think(m * self.ratio + self.before(m) * (1 - self.ratio))
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


class ShiftAlone(Shift):
    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.think(n * self.ratio + self.before(n) * (1 - self.ratio))
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
    "differences": lambda _, n: F.pad(n[:, 1:] - n[:, :-1], (0, 0, 1, 0)),
}


@pytest.mark.parametrize("way", _WAYS)
def test_every_way_to_mix_positions_is_a_mixer(way: str) -> None:
    rung = type("Alone_", (Alone,), {"way": _WAYS[way]})
    check(Ladder(rung), {"mlp_out": "no MLP", "resid_mid": "no MLP"})


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


# Precision, biases, idle modules ----------------------------------------------------------------------------------


class HalfBranches(Rung):
    def __init__(self, i: int) -> None:
        super().__init__(i)
        for module in (self.calm, self.cool, self.blend, self.think):
            module.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x.to(torch.bfloat16))
        a = self.blend(n)
        y = x + a.float()
        m = self.cool(y.to(torch.bfloat16))
        f = self.think(m)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


def test_the_stream_is_in_full_and_the_branches_in_half_precision() -> None:
    check(Ladder(HalfBranches))


class Biased(Rung):
    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.lift = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n) + self.lift
        y = x + a
        m = self.cool(y)
        f = self.think(m) + self.lift
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


class BiasedStream(Biased):
    """The bias goes onto the stream: it is no part of what the branch adds, and stays in the middle."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x)
        a = self.blend(n)
        y = x + a + self.lift
        m = self.cool(y)
        f = self.think(m)
        z = y + f + self.lift
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=z)
        return z


@pytest.mark.parametrize("rung", [Biased, BiasedStream])
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
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return self.pause(y + f)


def test_dropout_and_identity_modules_change_nothing() -> None:
    model = Ladder(Idle)
    model.train()
    discover(model)
    assert all(module.training for module in model.modules())
    check(model)


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
        names = ("resid_pre", "mixer_in", "mixer_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
        tensors = (t.transpose(0, 1) for t in (x, n, a, y, m, f, y + f))
        note(self.i, **dict(zip(names, tensors, strict=True)))
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


class Placed(Rung):
    """Positions are added to the stream in each block."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.where = nn.Parameter(torch.randn(64, D))

    def forward(self, x: Tensor) -> Tensor:
        note(self.i, resid_pre=x)
        x = x + self.where[: x.shape[1]]
        n = self.calm(x)
        a = self.blend(n)
        y = x + a
        m = self.cool(y)
        f = self.think(m)
        note(self.i, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


class PlacedBranch(Placed):
    """Positions are added to what the mixer reads, and not to the stream."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.calm(x + self.where[: x.shape[1]])
        a = self.blend(n)
        y = x + a
        m = self.cool(y)
        f = self.think(m)
        note(self.i, resid_pre=x, mixer_in=n, mixer_out=a, resid_mid=y, mlp_in=m, mlp_out=f, resid_post=y + f)
        return y + f


@pytest.mark.parametrize("rung", [Placed, PlacedBranch])
def test_positions_are_added_in_each_block(rung: type[Rung]) -> None:
    check(Ladder(rung))


# Lists and sharing ------------------------------------------------------------------------------------------------


class Staged(Ladder):
    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(nn.ModuleList(Rung(2 * a + b) for b in range(2)) for a in range(2))

    def climb(self, x: Tensor) -> Tensor:
        for stage in self.rungs:
            for rung in stage:  # type: ignore[attr-defined]
                x = rung(x)
        return x


class Stage(nn.Module):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Rung(first + b) for b in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class StagedModules(Ladder):
    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(Stage(3 * a) for a in range(2))


class TwoTowers(Ladder):
    def __init__(self) -> None:
        super().__init__()
        self.early = nn.ModuleList(Rung(i) for i in range(2))

    def climb(self, x: Tensor) -> Tensor:
        for rung in self.early:
            x = rung(x)
        return super().climb(x)


@pytest.mark.parametrize("model", [Staged, StagedModules, TwoTowers])
def test_a_stream_through_several_lists_is_not_read_as_one_of_them(model: type[Ladder]) -> None:
    with pytest.raises(DiscoveryError, match=r"several lists.*rungs"):
        discover(model().eval())


def test_one_block_is_called_three_times() -> None:
    """Which of the calls is layer 1 is nothing that a path can say."""

    class Again(Ladder):
        def __init__(self) -> None:
            super().__init__(depth=1)

        def climb(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.rungs[0](x)
            return x

    model = Again().eval()
    found = discover(model)
    for selector in found.selectors():
        assert selector.layer is None or all(term.call is not None for term in selector.terms), str(selector)


def test_one_block_stands_in_the_list_three_times() -> None:
    class Same(Ladder):
        def __init__(self) -> None:
            super().__init__()
            self.rungs = nn.ModuleList([self.rungs[0]] * 3)

    found = discover(Same().eval())
    assert all(term.call is not None for s in found.selectors() if s.layer is not None for term in s.terms)


def test_one_mlp_serves_all_blocks() -> None:
    class Shared(Ladder):
        def __init__(self) -> None:
            super().__init__()
            for rung in self.rungs:
                rung.think = self.rungs[0].think  # type: ignore[union-attr,assignment]

    check(Shared())


# Around the blocks ------------------------------------------------------------------------------------------------


class TwoTables(Ladder):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Embedding(V, D)

    def forward(self, tokens: Tensor) -> Any:
        return self.finish(self.climb(self.lookup(tokens) + self.other(tokens)))


def test_two_tables_of_embeddings_are_not_one() -> None:
    found = check(TwoTables(), {"embed": "several tables.*lookup, other"})
    assert found.unavailable("embed") is not None


class HiddenFirst(Ladder):
    """(states, logits) out."""

    def finish(self, x: Tensor) -> Any:
        return x, super().finish(x)


class OddlyNamed(Ladder):
    def finish(self, x: Tensor) -> Any:
        return {"state": x, "scores": super().finish(x)}


class NoHead(Ladder):
    def finish(self, x: Tensor) -> Tensor:
        n = self.still(x)
        note(None, final_norm=n)
        return n


@pytest.mark.parametrize(("model", "missing"), [(HiddenFirst, {}), (OddlyNamed, {}), (NoHead, {"logits": "logits"})])
def test_the_logits_are_told_from_states(model: type[Ladder], missing: dict[str, str]) -> None:
    check(model(), missing)


class LastOnly(Ladder):
    def finish(self, x: Tensor) -> Tensor:
        note(None, final_norm=self.still(x))
        return self.speak(self.still(x)[:, -1])


class Watched(Ladder):
    """A second head with a norm of its own, before the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.watch, self.value = nn.LayerNorm(D), nn.Linear(D, 1)

    def finish(self, x: Tensor) -> Any:
        value = self.value(self.watch(x))
        return super().finish(x), value


def test_logits_of_the_last_position_only() -> None:
    model = LastOnly().eval()
    found = discover(model)
    assert "position" in (found.unavailable("logits") or "")


def test_the_norm_of_a_second_head_is_not_the_final_norm() -> None:
    assert check(Watched()).final_norm_path == "still"


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
    assert found.architecture == "OddForCausalLM" and found.config["breadth"] == 24
    names = {check.name for check in verify(model).checks}
    assert "hidden_states" in names
