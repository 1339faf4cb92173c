"""Made-up models whose blocks stand in unusual lists, or read more than the stream: mapped rightly, or refused.

The maps are held against hooks on the models' own modules, and verification against maps that are wrong on purpose.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.invented import D, Ladder, Mix, Rung, V, read, through
from torch import Tensor, nn

from hookmap.discovery.discover import discover
from hookmap.errors import DiscoveryError
from hookmap.maps.document import ArchitectureMap
from hookmap.verification.verify import Verification, redraw, verify

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 17, 3, 44, 9]])


class Stepped(Rung):
    """The steps of its MLP are in a list."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.think = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))  # type: ignore[assignment]


def rungs(count: int, kind: type[Rung] = Rung) -> nn.ModuleList:
    return nn.ModuleList(kind(i) for i in range(count))


class Floor(nn.Module):
    """A list of blocks of its own."""

    def __init__(self, height: int, end: nn.Module | None = None) -> None:
        super().__init__()
        self.rungs, self.end = rungs(height), end or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(through(self.rungs, x))


class Around(Floor):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Tower(Ladder):
    def __init__(self, body: nn.ModuleList) -> None:
        super().__init__()
        del self.rungs
        self.body = body

    def climb(self, x: Tensor) -> Tensor:
        return through(self.body, x)


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
        named = {"a": Rung(0), "b": Rung(1)}
        return Tower(nn.ModuleList(named[name] for name in order))

    tower = _made(make)
    found = discover(tower)
    assert found.num_layers == len(order)
    assert not _failed(verify(tower, architecture_map=found))
    entered: list[Tensor] = []
    for rung in {id(each): each for each in tower.body}.values():
        rung.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    seen = {selector.layer: tensor for (selector, _), tensor in read(tower, found.selectors("resid_pre"), IDS).items()}
    assert all(torch.equal(seen[layer], entered[layer]) for layer in range(len(order)))


class Loop(Tower):
    """Two lists that feed each other, in two rounds, by way of attention."""

    def __init__(self) -> None:
        super().__init__(rungs(3))
        self.high, self.mix = Floor(3), Mix()

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

    kind: type[Rung] = Stepped

    def __init__(self) -> None:
        super().__init__(rungs(3, self.kind))
        self.chooser, self.notes = rungs(5, self.kind), nn.ModuleList(Mix() for _ in range(3))

    def climb(self, x: Tensor) -> Tensor:
        chosen = (through(self.chooser, x).argmax(-1, keepdim=True) % 2).bool()
        for note, rung in zip(self.notes, self.body, strict=True):
            x = rung(x + torch.where(chosen, note(x), 0.5 * note(x)))
        return x


class InterruptedOfClasses(Interrupted):
    """Without a numbered list inside the blocks."""

    kind = Rung


@pytest.mark.parametrize("model", [Interrupted, InterruptedOfClasses])
def test_a_stream_that_is_added_to_between_blocks_is_mapped_and_said(model: type[Interrupted]) -> None:
    tower = _made(model)
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


class Weighing(Rung):
    """Its attention reads a norm of a sum of what earlier blocks gave, with weights of its own: Inkling 2's way."""

    def __init__(self, i: int) -> None:
        super().__init__(i)
        self.weigh = nn.Linear(D, 1)

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:  # type: ignore[override]
        every = torch.cat([earlier, x.unsqueeze(2)], 2)
        x = x + self.blend(self.calm((self.weigh(every).softmax(2) * every).sum(2)))
        return x + self.think(self.cool(x))


class Weighed(Tower):
    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Weighing(i) for i in range(3)))

    def climb(self, x: Tensor) -> Tensor:
        earlier = x.unsqueeze(2)
        for block in self.body:
            x = block(x, earlier)
            earlier = torch.cat([earlier, x.unsqueeze(2)], 2)
        return x


def test_what_the_mixer_reads_is_behind_the_weighing_and_not_the_stream() -> None:
    tower = _made(Weighed)
    found = discover(tower)
    entered: list[Tensor] = []
    tower.body[1].blend.register_forward_pre_hook(lambda _, args: entered.append(args[0]))  # type: ignore[union-attr]
    (seen,) = read(tower, found.selectors("mixer_in", 1), IDS).values()
    assert torch.equal(seen, entered[0])
    assert not _failed(verify(tower, architecture_map=found))


@pytest.mark.parametrize(("point", "told"), [("mixer_in", "determines"), ("mlp_in", "in front of a norm")])
def test_a_map_that_gives_the_stream_for_the_weighed_sum_fails(point: str, told: str) -> None:
    tower = _made(Weighed)
    place = {"mixer_in": ("body.{i}", 0), "mlp_in": ("body.{i}.cool", 0)}[point]
    wrong = _moved(discover(tower), point, module=place[0], side="input", index=place[1])
    failed = _failed(verify(tower, architecture_map=wrong))
    assert any(line.startswith("reads") and told in line for line in failed), failed


class Labelled(Rung):
    """Its MLP is gated by an embedding of the block's own: Gemma 4's way."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.blend(self.calm(x))
        return x + self.think.narrow(self.think.wide(self.cool(x)).sigmoid() * label)


class Labels(Tower):
    def __init__(self) -> None:
        super().__init__(nn.ModuleList(Labelled(i) for i in range(3)))
        self.labels = nn.Embedding(V, 3 * 2 * D)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.enter(tokens)
        for block, label in zip(self.body, self.labels(tokens).chunk(3, -1), strict=True):
            x = block(x, label)
        return self.finish(x)


def test_what_a_branch_reads_beside_the_stream_is_in_the_map() -> None:
    tower = _made(Labels)
    found = discover(tower)
    (beside,) = found.kinds[0].points["mlp_in"].beside
    assert (beside.module, beside.side, beside.index) == ("body.{i}", "input", 1)
    assert not found.kinds[0].points["mixer_in"].beside
    assert not _failed(verify(tower, architecture_map=found))
    silent = _moved(found, "mlp_in")
    assert any("mlp_in determines" in line for line in _failed(verify(tower, architecture_map=silent)))
