"""Invented architectures: what goes into a block and comes out, lists and sharing, what stands around the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from support.invented import DEPTH, D, Ladder, Rung, V, check, note, through
from support.raises import raises
from torch import Tensor, nn

from hookmap.discovery.discover import discover

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.slow
def test_the_plain_ladder_is_read() -> None:
    found = check(Ladder())
    assert (found.layers_path, found.num_layers) == ("rungs.{i}", DEPTH)
    assert found.kinds[0].mixer.type == "attention" and found.kinds[0].norm_placement == "pre"
    assert (found.kinds[0].mixer.modules, found.kinds[0].mlp.modules) == (("rungs.{i}.blend",), ("rungs.{i}.think",))
    assert "it is resid_mid" in found.unavailable("resid_mid_sum", 0)


def test_a_tape_that_differs_fails_the_check() -> None:
    """The check itself can fail."""

    class Liar(Rung):
        def forward(self, x: Tensor) -> Tensor:
            note(self.i, resid_mid=x)
            return super().forward(x)

    with raises(AssertionError, "resid_mid[1] is another tensor"):
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
        self.first = torch.tanh(x) if first is None else first
        return self.first, super().forward(x)

    def mixed(self, n: Tensor) -> Tensor:
        return self.blend(n) + self.first


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


# Lists and sharing ------------------------------------------------------------------------------------------------


class Staged(Ladder):
    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(nn.ModuleList(Rung(2 * a + b) for b in range(2)) for a in range(2))

    def climb(self, x: Tensor) -> Tensor:
        for stage in self.rungs:
            x = through(stage, x)  # type: ignore[arg-type]
        return x


class Stage(nn.Module):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Rung(first + b) for b in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return through(self.steps, x)


class StagedModules(Ladder):
    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleList(Stage(3 * a) for a in range(2))


class TwoTowers(Ladder):
    def __init__(self) -> None:
        super().__init__(lambda i: Rung(i + 2))
        self.early = nn.ModuleList(Rung(i) for i in range(2))

    def climb(self, x: Tensor) -> Tensor:
        return super().climb(through(self.early, x))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Staged, ("0.0", "0.1", "1.0", "1.1")),
        (StagedModules, tuple(f"{a}.steps.{b}" for a in range(2) for b in range(3))),
        (TwoTowers, ("early.0", "early.1", "rungs.0", "rungs.1", "rungs.2")),
    ],
)
def test_a_stream_through_several_lists_is_numbered_list_by_list(model: type[Ladder], names: tuple[str, ...]) -> None:
    assert check(model()).layer_names == names


def test_one_block_is_called_three_times() -> None:
    """Which of the calls is layer 1 is nothing that a path can say."""

    class Again(Ladder):
        def __init__(self) -> None:
            super().__init__(depth=1)

        def climb(self, x: Tensor) -> Tensor:
            return through([self.rungs[0]] * 3, x)

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

    found = check(Shared())
    why = "only rungs.{i}.think has it, which serves several layers: no path says whose call it is"
    assert found.unavailable("mlp_out_raw", 1) == why
    assert "serves several layers" in (found.unavailable("mlp_post", 1) or "")


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


class Gathering(Ladder):
    """The last norm reads a mixture of the stream and what entered the blocks, with weights of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(D, D)

    def forward(self, tokens: Tensor) -> Any:
        start = self.enter(tokens)
        x = self.climb(start)
        n = self.still(torch.tanh(self.choose(x)) * start)
        logits = self.speak(n)
        note(None, logits=logits)
        return logits


def test_a_last_norm_of_something_else_than_the_stream_is_said_to_be_one() -> None:
    check(Gathering(), {"final_norm": "the last norm, still, does not read the stream as the last block leaves it"})
