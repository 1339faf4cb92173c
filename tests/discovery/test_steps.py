"""The steps of discovery, each alone on a few lines of a model: a failure here says which step is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.raises import raises
from torch import Tensor, nn

from hookmap.discovery.block import Block
from hookmap.discovery.dataflow import record
from hookmap.discovery.layer_choice import find_layers
from hookmap.discovery.layer_list import LayerList, chain, numbered_modules
from hookmap.discovery.linear_steps import has_weights, linear_path, norm_input, norm_source, steps
from hookmap.discovery.locate import Locator
from hookmap.discovery.mixing import is_shift, mixing
from hookmap.discovery.values import Values
from hookmap.errors import DiscoveryError

SEQ, D = 5, 8
Forward = Callable[..., Tensor]


class Written(nn.Module):
    """A module whose forward method is given, with the modules that it uses."""

    def __init__(self, forward: Forward, **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.function(self, input_ids)


def read(module: nn.Module) -> Values:
    """The values of one run on a tensor [1, pos, d]."""
    return Values(record(module, {"input_ids": torch.randn(1, SEQ, D)}))


def ends(values: Values) -> tuple[int, int]:
    """The values that enter and leave the module."""
    root = values.flow.calls[0]
    return values.value(root.entered["input_ids"]), values.value(root.outputs[None])


def kinds(values: Values) -> list[str]:
    """The kinds of the linear steps from what enters the module to what leaves it."""
    return [step.kind for step in linear_path(values, values.flow.calls[0], *ends(values))]


# Values ---------------------------------------------------------------------------------------------------------------


def test_a_tensor_in_another_shape_is_the_same_value() -> None:
    start, end = ends(read(Written(lambda self, x: x.reshape(SEQ, D)[None].contiguous())))
    assert start == end


def test_a_tensor_with_its_axes_turned_is_another_value() -> None:
    start, end = ends(read(Written(lambda self, x: x.transpose(1, 2))))
    assert start != end


def test_a_view_of_memory_that_was_written_to_is_a_new_value() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = x * 2
        view = y.view(SEQ, D)
        y += 1
        return view

    values = read(Written(forward))
    assert values.producers[ends(values)[1]].name == "add"


def test_what_is_made_of_weights_alone_is_constant() -> None:
    values = read(Written(lambda self, x: x + (self.part.weight * 2).sum(0), part=nn.Linear(D, D)))
    (step,) = (step for step in steps(values, ends(values)[1]) if step.kind in ("add", "gate"))
    assert step.source == ends(values)[0]
    double = next(op for op in values.flow.operations if op.name == "mul")
    assert values.is_constant(values.value(double.outputs[0]))
    assert not values.is_constant(step.source)


# Linear steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: x * 3, [("scale", 3.0, 1.0)]),
        (lambda self, x: x / 4, [("scale", 0.25, 1.0)]),
        (lambda self, x: x + self.part(x), [("add", 1.0, 1.0)]),
        (lambda self, x: x - self.part(x), [("add", -1.0, 1.0)]),
        (lambda self, x: self.part(x) - x, [("add", 1.0, -1.0)]),
        (lambda self, x: torch.add(x, self.part(x), alpha=0.5), [("add", 0.5, 1.0)]),
        (lambda self, x: x * self.part.bias, [("gate", None, 1.0)]),
        (lambda self, x: x.double(), [("cast", 1.0, 1.0)]),
        (lambda self, x: x * self.part(x), []),
    ],
)
def test_a_step_has_its_kind_and_its_factors(forward: Forward, expected: list[tuple[Any, ...]]) -> None:
    values = read(Written(forward, part=nn.Linear(D, D)))
    path = linear_path(values, values.flow.calls[0], *ends(values))
    assert [(step.kind, step.factor, step.source_factor) for step in path] == expected


def test_a_path_goes_around_norms() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.norm(x) + (x * 2 + self.part(x))  # type: ignore[no-any-return]

    assert kinds(read(Written(forward, part=nn.Linear(D, D), norm=nn.LayerNorm(D)))) == ["scale", "add", "add"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda self, x: self.part.bias * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda self, x: x / x.norm(dim=-1, keepdim=True),
        lambda self, x: nn.functional.layer_norm(x, (D,)),
        lambda self, x: self.norm(x),
    ],
)
def test_a_norm_is_told_by_what_it_computes(forward: Forward) -> None:
    values = read(Written(forward, part=nn.Linear(D, D), norm=nn.LayerNorm(D)))
    assert norm_source(values, ends(values)[1]) == ends(values)[0]


@pytest.mark.parametrize(
    "forward",
    [lambda self, x: x * torch.rsqrt(self.part(x).pow(2).mean(-1, keepdim=True)), lambda self, x: x.softmax(-1)],
)
def test_what_only_looks_like_a_norm_is_none(forward: Forward) -> None:
    values = read(Written(forward, part=nn.Linear(D, D)))
    assert norm_source(values, ends(values)[1]) is None


class HandsOn(nn.LayerNorm):
    """A norm that hands a second tensor on as it is, as vLLM's of Cohere does."""

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), other


def test_what_a_norm_hands_on_is_no_norm_of_anything() -> None:
    values = read(Written(lambda self, x: torch.cat(self.norm(x * 2, x * 3)), norm=HandsOn(D)))
    (norm,) = (call for call in values.flow.calls if call.path == "norm")
    normed, handed_on = (values.value(norm.outputs[place]) for place in (0, 1))
    assert norm_source(values, normed) == values.value(norm.entered[0])
    assert norm_source(values, handed_on) is None


def test_modules_with_weights_are_told_from_norms() -> None:
    values = read(Written(lambda self, x: self.part(self.norm(x)), part=nn.Linear(D, D), norm=nn.LayerNorm(D)))
    calls = {call.path: call for call in values.flow.calls}
    assert norm_input(values, calls["norm"]) == ends(values)[0]
    assert norm_input(values, calls["part"]) is None
    assert [has_weights(values, calls[name]) for name in ("part", "norm")] == [True, False]


# Mixing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x.cumsum(1),
        lambda self, x: x.flip(1),
        lambda self, x: x - x.mean(1, keepdim=True),
        lambda self, x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
        lambda self, x: self.wide(x.transpose(1, 2)),
        lambda self, x: torch.cat([x[:, 2:], x[:, :2]], 1),
        lambda self, x: x[:, torch.tensor([1, 0, 3, 2, 4])],
        lambda self, x: x[:, 1:2] + x,
    ],
)
def test_operations_that_mix_positions_are_found(forward: Forward) -> None:
    values = read(Written(forward, wide=nn.Conv1d(D, D, 3, padding=1)))
    assert mixing(values, values.flow.operations, SEQ)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.part(x).softmax(-1) * x.mean(-1, keepdim=True),
        lambda self, x: self.narrow(x.transpose(1, 2)).transpose(1, 2),
        lambda self, x: torch.cat([x[:, :2], x[:, 2:]], 1),
        lambda self, x: x[0][torch.arange(SEQ)[:, None].expand(-1, 2).reshape(-1)].view(1, SEQ, 2, D).sum(2),
        lambda self, x: torch.stack([2 * each for each in x.unbind(1)], 1),
        lambda self, x: torch.cat([x[..., D // 2 :], x[..., : D // 2]], -1),
        lambda self, x: x.cumsum(-1),
    ],
)
def test_operations_on_each_position_alone_mix_none(forward: Forward) -> None:
    values = read(Written(forward, part=nn.Linear(D, D), narrow=nn.Conv1d(D, D, 1)))
    assert mixing(values, values.flow.operations, SEQ) == []


def test_a_token_shift_is_told_from_other_mixing() -> None:
    shifted = read(Written(lambda self, x: nn.functional.pad(x, (0, 0, 1, -1)) + x))
    assert [is_shift(op) for op in mixing(shifted, shifted.flow.operations, SEQ)] == [True]
    summed = read(Written(lambda self, x: x.cumsum(1)))
    assert [is_shift(op) for op in mixing(summed, summed.flow.operations, SEQ)] == [False]


# The list of blocks ---------------------------------------------------------------------------------------------------


def look(self: Any, x: Tensor) -> Tensor:
    """Attention without a projection: mixes positions."""
    return self.out((x @ x.transpose(1, 2)).softmax(-1) @ x)  # type: ignore[no-any-return]


def new_block(forward: Forward | None = None, **parts: nn.Module) -> Written:
    """x + look(norm(x)), then + mlp(norm(x))."""

    def usual(self: Any, x: Tensor) -> Tensor:
        x = x + self.look(self.norm(x))
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, D))

    parts = {"norm": nn.LayerNorm(D), "look": Written(look, out=nn.Linear(D, D)), "mlp": mlp(), **parts}
    return Written(forward or usual, **parts)


def in_turn(self: Any, x: Tensor) -> Tensor:
    for block in self.blocks:
        x = block(x)
    return self.head(x)  # type: ignore[no-any-return]


def model_of(*blocks: nn.Module, forward: Forward = in_turn) -> Written:
    return Written(forward, blocks=nn.ModuleList(blocks), head=nn.Linear(D, D))


def layers_of(values: Values) -> LayerList:
    return find_layers(values, SEQ)


def test_modules_that_differ_in_a_number_are_one_group() -> None:
    values = read(model_of(*(new_block() for _ in range(3))))
    groups = {group.path: group.order for group in numbered_modules(values)}
    assert groups["blocks.{i}"] == [(0, 0), (1, 0), (2, 0)]
    assert groups["blocks.1.mlp.{i}"] == [(0, 0), (1, 0), (2, 0)]
    assert len(groups) == 4


def test_the_stream_leaves_a_block_and_enters_the_next() -> None:
    layers = layers_of(read(model_of(*(new_block() for _ in range(3)))))
    assert (layers.path, layers.length, layers.width, layers.contiguous) == ("blocks.{i}", 3, D, True)
    assert [layers.streams[n, 0][1] for n in (0, 1)] == [layers.streams[n, 0][0] for n in (1, 2)]
    assert layers.order == [(0, 0), (1, 0), (2, 0)]


def test_a_chain_is_linked_where_the_model_adds_between_blocks() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x = block(x) + first
        return self.head(x)  # type: ignore[no-any-return]

    values = read(model_of(*(new_block() for _ in range(3)), forward=forward))
    (blocks,) = (group for group in numbered_modules(values) if group.path == "blocks.{i}")
    assert chain(values, blocks, SEQ) is None
    linked = chain(values, blocks, SEQ, linked=True)
    assert linked is not None
    assert not linked.contiguous


def test_of_two_tensors_that_cross_the_blocks_the_stream_is_the_one_that_is_added_to() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(D, D)

        def forward(self, other: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            made = self.part(x)
            return made, x + made

    def forward(self: Any, x: Tensor) -> Tensor:
        other = torch.zeros_like(x)
        for block in self.blocks:
            other, x = block(other, x)
        return self.head(x)  # type: ignore[no-any-return]

    values = read(model_of(Pair(), Pair(), Pair(), forward=forward))
    layers = layers_of(values)
    stream = [values.value(layers.calls[n, 0].outputs[1]) for n in range(3)]
    assert [layers.streams[n, 0][1] for n in range(3)] == stream


def test_a_block_that_runs_again_is_counted() -> None:
    def twice(self: Any, x: Tensor) -> Tensor:
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]

    layers = layers_of(read(model_of(new_block(), new_block(), forward=twice)))
    assert layers.order == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [layers.streams[run][1] for run in layers.order[:-1]] == [layers.streams[run][0] for run in layers.order[1:]]


def test_a_model_without_blocks_is_refused() -> None:
    values = read(Written(lambda self, x: self.part(x), part=nn.Linear(D, D)))
    with raises(DiscoveryError, "no blocks were found"):
        find_layers(values, SEQ)


def test_two_lists_that_one_stream_goes_through_are_numbered_as_one() -> None:
    def stack() -> nn.Module:
        return model_of(new_block(), new_block(), forward=lambda s, x: s.blocks[1](s.blocks[0](x)))

    layers = layers_of(read(Written(lambda self, x: self.second(self.first(x)), first=stack(), second=stack())))
    assert (layers.path, layers.length) == ("{i}", 4)
    assert layers.names == ("first.blocks.0", "first.blocks.1", "second.blocks.0", "second.blocks.1")
    assert [layers.streams[run][1] for run in layers.order[:-1]] == [layers.streams[run][0] for run in layers.order[1:]]


# One block ------------------------------------------------------------------------------------------------------------


def block_of(block: nn.Module) -> Block:
    """The middle one of three such blocks."""
    values = read(model_of(new_block(), block, new_block()))
    return Block(values, layers_of(values), 1)


def named(block: Block, name: str, side: str = "outputs") -> int:
    """The value that leaves, or enters, a module of the block."""
    (call,) = (call for call in block.values.flow.calls if call.path == f"blocks.1.{name}")
    (tensor,) = getattr(call, side).values()
    return block.values.value(tensor)


def test_a_block_is_two_additions_a_mixer_and_an_mlp() -> None:
    block = block_of(new_block())
    assert [step.kind for step in block.path] == ["add", "add"]
    assert block.states == [block.entry, block.path[0].result, block.exit]
    assert [(branch.role, branch.parts) for branch in block.branches] == [
        ("mixer", [named(block, "look")]),
        ("mlp", [named(block, "mlp")]),
    ]
    assert [branch.reads for branch in block.branches] == [{block.entry}, {block.states[1]}]


def test_a_sum_of_two_modules_is_two_branches() -> None:
    block = block_of(new_block(lambda self, x: x + (self.look(self.norm(x)) + self.mlp(x))))
    assert [(branch.role, branch.step) for branch in block.branches] == [("mixer", 0), ("mlp", 0)]
    assert [branch.reads for branch in block.branches] == [{block.entry}] * 2


def test_what_reads_nothing_of_the_stream_is_neither_mixer_nor_mlp() -> None:
    block = block_of(new_block(lambda self, x: x + self.look(x) + self.norm.bias.expand(x.shape)))
    assert [branch.role for branch in block.branches] == ["mixer", "other"]


def test_a_token_shift_is_the_mlp_next_to_a_mixer_that_mixes_more() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.look(x)
        return x + self.mlp(nn.functional.pad(x, (0, 0, 1, -1)) + x)  # type: ignore[no-any-return]

    assert [branch.role for branch in block_of(new_block(forward)).branches] == ["mixer", "mlp"]


def test_the_raw_output_of_a_branch_stands_before_its_norm_and_its_factor() -> None:
    block = block_of(new_block(lambda self, x: x + self.post(self.look(x)) * 0.5, post=nn.LayerNorm(D)))
    (branch,) = block.branches
    (part,) = branch.parts
    assert [step.kind for step in block.tails[part]] == ["scale", "norm"]
    assert block.raw(part) == named(block, "look")


# Locations ------------------------------------------------------------------------------------------------------------


def located(block: Block, value: int, prefer: str = "output") -> list[tuple[str, str, float]] | None:
    locator = Locator(block.values, block.call, SEQ, {"blocks.1": "blocks.{i}"})
    found = locator.locate(value, prefer)
    return None if found is None else [(term.module, term.side, term.scale) for term in found.terms]


def test_a_value_is_located_at_the_module_that_gives_or_takes_it() -> None:
    block = block_of(new_block())
    assert located(block, named(block, "look")) == [("blocks.{i}.look", "output", 1.0)]
    assert located(block, block.entry, "input") == [("blocks.{i}", "input", 1.0)]
    assert located(block, block.exit) == [("blocks.{i}", "output", 1.0)]
    assert located(block, block.states[1]) == [("blocks.{i}.norm", "input", 1.0)]


def test_a_value_without_a_boundary_is_located_as_the_sum_that_it_is() -> None:
    block = block_of(new_block(lambda self, x: x + self.look(x) + self.mlp(x)))
    expected = [("blocks.{i}", "input", 1.0), ("blocks.{i}.look", "output", 1.0)]
    assert located(block, block.states[1]) == expected


def test_a_value_without_a_boundary_is_located_as_a_multiple() -> None:
    block = block_of(new_block(lambda self, x: x + 0.5 * self.look(x)))
    assert located(block, block.branches[0].parts[0]) == [("blocks.{i}.look", "output", 0.5)]


def test_a_value_that_nothing_exposes_is_not_located() -> None:
    block = block_of(new_block(lambda self, x: x + self.look(x) * self.mlp(x)))
    assert located(block, block.branches[0].parts[0]) is None
