"""Layers that run several times in one forward pass: the map says so, and no capture gives one run in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from support import plain_hooks
from support.invented import IDS, Ladder, check, read
from support.invented_loops import FedBack, Whole
from support.raises import raises
from torch import Tensor, nn

import hookmap
from hookmap.discovery.discover import discover
from hookmap.discovery.map_of_model import map_of
from hookmap.errors import DiscoveryError, MapMismatchError
from hookmap.loading.narrow import narrow
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import parse
from hookmap.verification.verify import redraw, verify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded")]


class Until(Ladder):
    """The whole stack again, until the stream is large: the number of rounds is the text's."""

    def climb(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = super().climb(x)
            if x.square().mean() > 40:
                break
        return x


class EarlyExit(Ladder):
    """A layer is left out where the stream is small."""

    def climb(self, x: Tensor) -> Tensor:
        for rung in self.rungs:
            if x.square().mean().item() < 1e6:
                x = rung(x)
        return x


def runs(model: nn.Module, layer: int, path: str = "rungs.{i}") -> list[tuple[Tensor, Tensor]]:
    """What enters and leaves a layer, run by run, as plain hooks see it."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(path.replace("{i}", str(layer))).register_forward_hook(
        lambda _, args, out: seen.append((args[0].clone(), out.clone()))
    )
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen


def selected(model: nn.Module, found: ArchitectureMap, point: str, layer: int, run: int = 0) -> Tensor:
    """What the map's selector of one run gives to a plain hook: of the call that it names."""
    (tensor,) = read(model, found.selectors(point, layer, calls=run)).values()
    return tensor


@pytest.mark.parametrize(
    ("kind", "looped", "order"), [(Whole, (0, 1, 2), "3 x (0-2)"), (FedBack, (1, 2), "0, 3 x (1-2), 3-4")]
)
def test_a_map_says_which_layers_run_several_times_and_means_each_run(
    kind: type[Ladder], looped: tuple[int, ...], order: str
) -> None:
    model = kind().eval()
    found = discover(model)
    assert found.runs == order
    for layer in range(found.num_layers):
        seen = runs(model, layer)
        assert found.kind_of(layer).calls == len(seen) == (3 if layer in looped else 1)
        for run, (before, after) in enumerate(seen):
            assert selected(model, found, "resid_pre", layer, run).equal(before)
            assert selected(model, found, "resid_post", layer, run).equal(after)
        assert all(t.call is None for p in found.kind_of(layer).points.values() for t in p.terms)
    result = verify(model, architecture_map=found)
    assert result.passed, [each for each in result.checks if not each.passed]
    assert parse(found.to_json()) == found


@pytest.mark.parametrize(("kind", "looped"), [(Whole, (0, 1, 2)), (FedBack, (1, 2))])
def test_an_opened_model_has_every_run_under_its_number(kind: type[Ladder], looped: tuple[int, ...]) -> None:
    model = kind().eval()
    opened = map_of(model, model, None)
    for layer in range(opened.num_layers):
        found = [selector.call for selector in opened.selectors("resid_mid", layer)]
        assert found == ([0, 1, 2] if layer in looped else [None])
        assert selected(model, opened, "resid_post", layer, -1).equal(runs(model, layer)[-1][1])


def test_a_map_that_says_nothing_of_the_loop_is_refused() -> None:
    model = FedBack().eval()
    found = discover(model)
    silent = found.model_copy(update={"kinds": tuple(kind.model_copy(update={"calls": 1}) for kind in found.kinds)})
    with raises(MapMismatchError, "layers 1–2: the map says they run 1 times, the model runs them 3"):
        map_of(model, model, silent)


@pytest.mark.parametrize("kind", [Until, EarlyExit])
def test_a_depth_that_depends_on_the_text_is_refused(kind: type[Ladder]) -> None:
    with pytest.raises(DiscoveryError, match=r"how often the blocks rungs.\{i\} run depends on the text"):
        discover(kind().eval())


def test_a_number_read_before_the_blocks_or_in_one_is_no_such_thing() -> None:
    class Scaled(Ladder):
        def climb(self, x: Tensor) -> Tensor:
            return super().climb(x * (1.0 if x.abs().max() > 0 else 2.0))

    check(Scaled())


def test_a_layer_that_stands_in_the_list_three_times_runs_once_for_each_of_its_numbers() -> None:
    class Same(Ladder):
        def __init__(self, rounds: int) -> None:
            super().__init__()
            self.rungs, self.rounds = nn.ModuleList([self.rungs[0]] * 3), rounds

        def climb(self, x: Tensor) -> Tensor:
            for _ in range(self.rounds):
                x = super().climb(x)
            return x

    for rounds in (1, 2):
        found = discover(Same(rounds).eval())
        assert {kind.calls for kind in found.kinds} == {rounds}


class Twice(nn.ModuleList):
    """Gives all of its blocks two times over."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return [*found, *found] if isinstance(index, slice) else found


def test_a_capture_of_a_looped_model_gives_each_run_and_the_rest_is_as_it_was() -> None:
    model = plain_hooks.build("llama")
    model.model.layers = Twice(model.model.layers)
    hm = hookmap.open(model)
    run = hm.capture([[5, 6, 7]], ["embed", "q", "logits"], layers=[0], max_new_tokens=0)
    assert run.keys == (("embed", None), ("q", 0, 0), ("q", 0, 1), ("logits", None))
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]]), use_cache=False).logits
    assert torch.allclose(run["logits"], expected, atol=1e-5)


def test_a_map_by_hand_of_a_depth_by_text_is_not_believed_where_a_layer_runs_again() -> None:
    """Discovery refuses it, so a map by hand is taken; that the layer ran twice is seen, also in a harvest."""

    class ByText(nn.ModuleList):
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            return self.rounds(found) if isinstance(index, slice) else found

        def rounds(self, blocks: nn.ModuleList) -> Iterator[nn.Module]:
            yield from blocks
            if asked["again"].item():
                yield from blocks

    asked = {"again": torch.tensor(False)}
    model = plain_hooks.build("llama")
    given = discover(model)
    model.model.layers[0].register_forward_hook(
        lambda _, args, out: asked.update(again=out[0, 0, 0] * 0 + (args[0].shape[1] > 4))
    )
    model.model.layers = ByText(model.model.layers)
    with pytest.raises(DiscoveryError):
        hookmap.open(model)
    hm = hookmap.open(model, map=given)
    with raises(hookmap.CaptureError, "called more than once"):
        hm.capture([[5, 6, 7, 8, 9, 10]], "resid_post", [1], max_new_tokens=0)


@pytest.mark.skipif(not hasattr(transformers, "DoryConfig"), reason="Dory is in transformers from 5.24 on")
def test_dory_runs_its_middle_layers_twice() -> None:
    config = narrow(transformers.DoryConfig(num_hidden_layers=6, n_input_layers=2, n_output_layers=2))
    found = discover(config)
    assert [found.kind_of(layer).calls for layer in range(6)] == [1, 1, 2, 2, 1, 1]
    assert "resid_mid_sum = norm(resid_pre) + mixer_out" in found.kind_of(0).relations
    result = verify(config, architecture_map=found)
    assert result.passed, [each for each in result.checks if not each.passed]
    model = transformers.DoryForCausalLM(config).eval()
    run = hookmap.open(model).capture(IDS.tolist(), "resid_post", max_new_tokens=0)
    for layer in range(6):
        for call, (_, after) in enumerate(runs(model, layer, "model.layers.{i}")):
            assert torch.allclose(run["resid_post", layer, call], after, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "order", "names"),
    [
        ({}, "4 x (0)", ()),
        (
            {"num_hidden_groups": 2, "inner_group_num": 2},
            "2 x (0-1), 2 x (2-3)",
            ("0.albert_layers.0", "0.albert_layers.1", "1.albert_layers.0", "1.albert_layers.1"),
        ),
    ],
)
def test_albert_runs_one_block_in_place_of_many(sizes: dict[str, int], order: str, names: tuple[str, ...]) -> None:
    config = transformers.AlbertConfig(
        vocab_size=97, hidden_size=32, embedding_size=16, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=48, **sizes,
    )  # fmt: skip
    model = transformers.AlbertForMaskedLM(config).eval()
    redraw(model)
    found = discover(model)
    assert (found.runs, found.layer_names, found.between) == (order, names, {})
    result = verify(model, architecture_map=found)
    assert result.passed, [each for each in result.checks if not each.passed]
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    for place, (layer, run) in enumerate(found.order):
        assert selected(model, found, "resid_post", layer, run).equal(states[place + 1])
