"""Gradients are what torch.autograd gives by hand: zeros added to the point by a plain hook, on a copy in float64."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from support.opened import EACH_FAMILY, RAGGED, opened
from support.plain_hooks import FAMILIES, Place

from hookmap import metrics

RIGHT, WRONG = 5, 9


@cache
def wide(name: str) -> Any:
    model = copy.deepcopy(opened(name).model).double().requires_grad_(False)
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._experts_implementation = "eager"  # the others have no float64
    return model


def added(model: Any, point: str, place: Place, layer: int, zeros: torch.Tensor) -> Any:
    """A plain hook that adds `zeros` to the point, where it is written: in place where it is the stream in a block."""
    module = model.get_submodule(place.module.replace("{i}", str(layer)))
    share = zeros / place.scale

    def on_input(_: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0] if args else kwargs["hidden_states"]
        if point == "resid_mid":
            tensor += share
            return None
        new = tensor + share
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def on_output(_: Any, args: Any, output: Any) -> Any:
        return (output[0] + share, *output[1:]) if isinstance(output, tuple) else output + share

    if place.side == "input":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


def by_hand(
    name: str, point: str, layer: int, ids: list[int], metric: Callable[[torch.Tensor], torch.Tensor], model: Any = None
) -> torch.Tensor:
    """[pos, d], float64, of one text alone. A sum is changed where its last term is added."""
    family, model = FAMILIES[name], wide(name) if model is None else model
    zeros = torch.zeros(1, len(ids), 32, dtype=torch.float64, requires_grad=True)
    handle = added(model, point, family.points[point][-1], layer, zeros)
    try:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        handle.remove()
    [found] = torch.autograd.grad(metric(logits), [zeros])
    return found[0]


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[-1, RIGHT] - logits[-1, WRONG]


def near(found: torch.Tensor, expected: torch.Tensor, what: Any = "") -> None:
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < 1e-5, (what, error)


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_gradients_at_every_point_are_those_of_autograd_by_hand(name: str) -> None:
    hm, family = opened(name), FAMILIES[name]
    wanted = [parameter.requires_grad for parameter in hm.model.parameters()]
    found = hm.gradients(RAGGED, metrics.logit_difference(RIGHT, WRONG), list(family.points))
    values = hm.capture(RAGGED, list(family.points), max_new_tokens=0)
    assert found.keys == values.keys
    for key in found.keys:
        for number, ids in enumerate(RAGGED):
            near(found.read(number, *key), by_hand(name, *key, ids, difference), (key, number))
            torch.testing.assert_close(found.values.read(number, *key), values.read(number, *key))
    for number, ids in enumerate(RAGGED):
        expected = difference(wide(name)(torch.tensor([ids]), use_cache=False).logits[0].double())
        torch.testing.assert_close(found.metric[number].double(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert [parameter.requires_grad for parameter in hm.model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in hm.model.parameters())
