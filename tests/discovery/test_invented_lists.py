"""Made-up models whose blocks stand in unusual lists, or read more than the stream: mapped rightly, or refused.

The maps are held against hooks on the models' own modules, and verification against maps that are wrong on purpose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookmap.discovery.discover import discover
from hookmap.errors import DiscoveryError
from hookmap.maps.document import ArchitectureMap
from hookmap.verification.verify import Verification, redraw, verify

pytestmark = pytest.mark.slow

D, V = 24, 50


class Glance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask, self.key, self.say, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        ahead = torch.full((x.shape[1], x.shape[1]), -1e9, device=x.device).triu(1)
        weights = (self.ask(x) @ self.key(x).transpose(1, 2) / 5 + ahead).softmax(-1)
        return self.out(weights @ self.say(x))  # type: ignore[no-any-return]


class Rung(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calm, self.glance, self.cool = nn.LayerNorm(D), Glance(), nn.LayerNorm(D)
        self.think = nn.Sequential(nn.Linear(D, 40), nn.GELU(), nn.Linear(40, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.glance(self.calm(x))
        return x + self.think(self.cool(x))  # type: ignore[no-any-return]


class Floor(nn.Module):
    """A list of blocks of its own."""

    def __init__(self, height: int, end: nn.Module | None = None) -> None:
        super().__init__()
        self.rungs, self.end = nn.ModuleList(Rung() for _ in range(height)), end

    def forward(self, x: Tensor) -> Tensor:
        for rung in self.rungs:
            x = rung(x)
        return x if self.end is None else self.end(x)  # type: ignore[no-any-return]


class Around(Floor):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Tower(nn.Module):
    def __init__(self, body: nn.ModuleList) -> None:
        super().__init__()
        self.words, self.body, self.last, self.head = nn.Embedding(V, D), body, nn.LayerNorm(D), nn.Linear(D, V)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Tensor:
        return self.head(self.last(self.climb(self.words(input_ids))))  # type: ignore[no-any-return]

    def climb(self, x: Tensor) -> Tensor:
        for each in self.body:
            x = each(x)
        return x


def _made(make: Callable[[], Tower]) -> Tower:
    torch.manual_seed(0)
    tower = make().eval()
    redraw(tower)
    return tower


def _failed(result: Verification) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in result.checks if not check.passed]


def _moved(found: ArchitectureMap, point: str, **term: object) -> ArchitectureMap:
    """The map with one point elsewhere, and nothing said to be read beside it."""
    document = found.model_dump()
    for kind in document["kinds"]:
        if point in kind["points"]:
            kind["points"][point]["terms"][0].update(term)
            kind["points"][point].pop("beside", None)
    return ArchitectureMap.model_validate(document)


# Lists -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "between"),
    [
        (lambda: [Floor(3), Floor(3)], {}),
        (lambda: [Floor(2), Floor(5)], {}),
        (lambda: [Floor(5, nn.Linear(D, D)), Floor(2)], {"4 -> 5": "body.0.end(resid_post[4])"}),
        (
            lambda: [Floor(3, nn.Linear(D, D)), Floor(3, nn.Linear(D, D))],
            {"2 -> 3": "body.0.end(resid_post[2])"},
        ),
        (lambda: [Floor(2), Floor(2), Floor(2)], {}),
    ],
)
def test_nested_lists_are_numbered_as_one(body: Callable[[], list[Floor]], between: dict[str, str]) -> None:
    tower = _made(lambda: Tower(nn.ModuleList(body())))
    found = discover(tower)
    blocks = [(f"body.{a}.rungs.{b}", block) for a, f in enumerate(tower.body) for b, block in enumerate(f.rungs)]  # type: ignore[union-attr,arg-type]
    assert [found.at_layer(found.layers_path, layer) for layer in range(found.num_layers)] == [p for p, _ in blocks]
    assert (found.runs, found.between) == ("", between)
    assert not _failed(verify(tower, architecture_map=found))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda: [Around(3), Around(3), Around(3), Around(3)], "holds a list of blocks"),
        (lambda: [Around(5), Around(5)], "several lists"),
    ],
)
def test_nested_lists_are_refused(body: Callable[[], list[nn.Module]], reason: str) -> None:
    with pytest.raises(DiscoveryError, match=reason):
        discover(_made(lambda: Tower(nn.ModuleList(body()))))


def test_a_list_inside_one_module_is_read() -> None:
    tower = _made(lambda: Tower(nn.ModuleList([Floor(4)])))
    found = discover(tower)
    assert (found.layers_path, found.num_layers) == ("body.0.rungs.{i}", 4)
    assert not _failed(verify(tower, architecture_map=found))


@pytest.mark.parametrize("order", ["aaa", "abab", "aba"])
def test_a_block_that_stands_in_the_list_several_times_is_a_layer_each_time(order: str) -> None:
    def make() -> Tower:
        rungs = {"a": Rung(), "b": Rung()}
        return Tower(nn.ModuleList(rungs[name] for name in order))

    tower = _made(make)
    found = discover(tower)
    assert found.num_layers == len(order)
    assert not _failed(verify(tower, architecture_map=found))
    entered: list[Tensor] = []
    for rung in {id(each): each for each in tower.body}.values():
        rung.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    read: dict[int | None, Tensor] = {}
    for selector in found.selectors("resid_pre"):
        (term,), calls = selector.terms, itertools.count()

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, s: Any = selector, n: Any = calls) -> None:
            if next(n) == (s.terms[0].call or 0):
                read[s.layer] = s.resolve(args, kwargs, output)

        tower.get_submodule(term.module).register_forward_hook(hook, with_kwargs=True)
    tower(torch.tensor([[5, 17, 3, 44, 9]]))
    assert all(torch.equal(read[layer], entered[layer]) for layer in range(len(order)))


class Loop(Tower):
    """Two lists that feed each other, in two rounds, by way of attention."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Rung() for _ in range(3)))
        self.high, self.mix = Floor(3), Glance()

    def climb(self, x: Tensor) -> Tensor:
        above = x
        for _ in range(2):
            below = super().climb(x + self.mix(above))
            above = self.high(self.mix(below))
        return above


def test_a_map_says_which_list_it_does_not_cover() -> None:
    found = discover(_made(Loop))
    covered, (left_out,) = found.layers_path, found.left_out
    assert {covered, left_out} == {"body.{i}", "high.rungs.{i}"}


class Interrupted(Tower):
    """Something is added to the stream between the blocks: BLT's way. Another list only chooses what."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Rung() for _ in range(3)))
        self.chooser, self.notes = nn.ModuleList(Rung() for _ in range(5)), nn.ModuleList(Glance() for _ in range(3))

    def climb(self, x: Tensor) -> Tensor:
        y = x
        for rung in self.chooser:
            y = rung(y)
        chosen = (y.argmax(-1, keepdim=True) % 2).bool()
        for note, rung in zip(self.notes, self.body, strict=True):
            x = rung(x + torch.where(chosen, note(x), 0.5 * note(x)))
        return x


def test_a_stream_that_is_added_to_between_blocks_is_mapped_and_said() -> None:
    tower = _made(Interrupted)
    found = discover(tower)
    assert (found.layers_path, found.joined) == ("body.{i}", False)
    result = verify(tower, architecture_map=found)
    assert not _failed(result)
    assert any(check.name == "hand-over" and "adds to the stream between" in check.detail for check in result.checks)
    assert (
        "hand-over"
        in _failed(verify(tower, architecture_map=found.model_copy(update={"joined": True, "between": {}})))[0]
    )


# More than the stream ------------------------------------------------------------------------------------------------


class Blending(nn.Module):
    """Its attention reads a norm of a blend of what earlier blocks gave: Inkling 2's way."""

    def __init__(self) -> None:
        super().__init__()
        self.blend, self.calm, self.glance = nn.Linear(D, 1), nn.LayerNorm(D), Glance()
        self.cool, self.think = nn.LayerNorm(D), nn.Sequential(nn.Linear(D, 40), nn.GELU(), nn.Linear(40, D))

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        every = torch.cat([earlier, x.unsqueeze(2)], 2)
        blended = (self.blend(every).softmax(2) * every).sum(2)
        x = x + self.glance(self.calm(blended))
        return x + self.think(self.cool(x))  # type: ignore[no-any-return]


class Blended(Tower):
    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Blending() for _ in range(3)))

    def climb(self, x: Tensor) -> Tensor:
        earlier = x.unsqueeze(2)
        for block in self.body:
            x = block(x, earlier)
            earlier = torch.cat([earlier, x.unsqueeze(2)], 2)
        return x


def test_what_the_mixer_reads_is_behind_the_blend_and_not_the_stream() -> None:
    tower = _made(Blended)
    found = discover(tower)
    ids = torch.tensor([[5, 17, 3, 44, 9]])
    read: dict[str, Tensor] = {}
    (selector,) = found.selectors("mixer_in", 1)
    (term,) = selector.terms
    tower.body[1].glance.register_forward_pre_hook(lambda _, args: read.update(theirs=args[0]))  # type: ignore[union-attr]
    tower.get_submodule(term.module).register_forward_hook(
        lambda _, args, kwargs, out: read.update(ours=term.resolve(args, kwargs, out)), with_kwargs=True
    )
    tower(ids)
    assert torch.equal(read["ours"], read["theirs"])
    assert not _failed(verify(tower, architecture_map=found))


@pytest.mark.parametrize(("point", "told"), [("mixer_in", "determines"), ("mlp_in", "in front of a norm")])
def test_a_map_that_gives_the_stream_for_the_blend_fails(point: str, told: str) -> None:
    tower = _made(Blended)
    place = {"mixer_in": ("body.{i}", 0), "mlp_in": ("body.{i}.cool", 0)}[point]
    wrong = _moved(discover(tower), point, module=place[0], side="input", index=place[1])
    failed = _failed(verify(tower, architecture_map=wrong))
    assert any(line.startswith("reads") and told in line for line in failed), failed


class Labelled(nn.Module):
    """Its MLP is gated by an embedding of the block's own: Gemma 4's way."""

    def __init__(self) -> None:
        super().__init__()
        self.calm, self.glance, self.cool = nn.LayerNorm(D), Glance(), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 40), nn.Linear(40, D)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = x + self.glance(self.calm(x))
        return x + self.down(self.up(self.cool(x)).sigmoid() * label)  # type: ignore[no-any-return]


class Labels(Tower):
    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Labelled() for _ in range(3)))
        self.labels = nn.Embedding(V, 3 * 40)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Tensor:
        x, labels = self.words(input_ids), self.labels(input_ids).chunk(3, -1)
        for block, label in zip(self.body, labels, strict=True):
            x = block(x, label)
        return self.head(self.last(x))  # type: ignore[no-any-return]


def test_what_a_branch_reads_beside_the_stream_is_in_the_map() -> None:
    tower = _made(Labels)
    found = discover(tower)
    (beside,) = found.kinds[0].points["mlp_in"].beside
    assert (beside.module, beside.side, beside.index) == ("body.{i}", "input", 1)
    assert not found.kinds[0].points["mixer_in"].beside
    assert not _failed(verify(tower, architecture_map=found))
    silent = _moved(found, "mlp_in")
    assert any("mlp_in determines" in line for line in _failed(verify(tower, architecture_map=silent)))
