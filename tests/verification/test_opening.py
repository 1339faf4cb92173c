"""A model whose architecture has no proved map is held against one pass when it is opened."""

import logging
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.raises import raises
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import hookmap
from hookmap.verification.opening import hold


class Unheard(LlamaForCausalLM):
    """An architecture without a shipped map, which discovery reads right."""


def unheard() -> nn.Module:
    torch.manual_seed(1)
    return plain_hooks.redrawn(Unheard(plain_hooks.FAMILIES["llama"].config()))


class OfOneRow(LlamaDecoderLayer):
    """A block that adds something of its own where there are several rows: discovery's pass, of one, shows nothing."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        left: torch.Tensor = super().forward(hidden_states, *args, **kwargs)
        return left if len(left) == 1 else 1.5 * left


def misread(model: Any) -> nn.Module:
    """The same model, of such blocks."""
    for layer in model.model.layers:
        layer.__class__ = OfOneRow
    return model  # type: ignore[no-any-return]


def test_a_right_map_is_opened_and_the_log_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hookmap"):
        hookmap.open(unheard())
    assert "The map of Unheard passed the cheap checks in" in caplog.text


@pytest.mark.slow
def test_a_model_that_discovery_misreads_is_refused_with_what_fails() -> None:
    with raises(hookmap.DiscoveryError, "hookmap misreads Unheard", "sum: resid_post =", "check=False"):
        hookmap.open(misread(unheard()))
    assert hookmap.open(misread(unheard()), check=False).map.num_layers == plain_hooks.LAYERS


class Silent(LlamaForCausalLM):
    """It records no hidden states."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("output_hidden_states", None)
        return super().forward(input_ids, attention_mask, **kwargs)


@pytest.mark.slow
def test_a_model_that_records_no_hidden_states_is_held_against_the_rest() -> None:
    torch.manual_seed(1)
    silent = plain_hooks.redrawn(Silent(plain_hooks.FAMILIES["llama"].config()))
    assert hookmap.open(silent).map.architecture == "Silent"
    assert [c.name for c in hookmap.verify(silent).checks if not c.passed] == ["hidden_states"]
    with raises(hookmap.DiscoveryError, "hookmap misreads Silent"):
        hookmap.open(misread(silent))


@pytest.mark.parametrize("place", [{"module": "model.layers.{i}.nowhere"}, {"index": 7}])
def test_a_map_that_names_what_is_not_there_is_refused(place: dict[str, object]) -> None:
    model = unheard()
    (kind,) = (found := hookmap.discover(model)).kinds
    right = kind.points["mixer_out"]
    term = right.terms[0].model_copy(update=place)
    points = {**kind.points, "mixer_out": right.model_copy(update={"terms": (term,)})}
    moved = found.model_copy(update={"kinds": (kind.model_copy(update={"points": points}),)})
    with raises(hookmap.MapMismatchError, "not true of this Unheard"):
        hold(moved, model, given=True)


@pytest.mark.slow
def test_nothing_of_the_model_is_changed() -> None:
    model = unheard().to(torch.bfloat16).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    hookmap.open(model)
    assert model.training
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_an_architecture_with_a_proved_map_is_not_run(caplog: pytest.LogCaptureFixture) -> None:
    model = plain_hooks.build("llama")
    with caplog.at_level(logging.INFO, logger="hookmap"):
        hookmap.open(model)
    assert "cheap checks" not in caplog.text
