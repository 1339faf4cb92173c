"""A model whose architecture has no proved map is held against one pass when it is opened."""

import logging
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.raises import raises
from torch import nn
from transformers import LlamaForCausalLM

import hookmap
from hookmap.maps.document import ArchitectureMap
from hookmap.verification.opening import hold


class Unheard(LlamaForCausalLM):
    """An architecture without a shipped map, which discovery reads right."""


def unheard() -> nn.Module:
    torch.manual_seed(1)
    return plain_hooks.redrawn(Unheard(plain_hooks.FAMILIES["llama"].config()))


def wrong(found: ArchitectureMap) -> ArchitectureMap:
    """resid_mid stands where the attention's output is."""
    (kind,) = found.kinds
    points = {**kind.points, "resid_mid": kind.points["attn_out"]}
    return found.model_copy(update={"kinds": (kind.model_copy(update={"points": points}),)})


def test_a_right_map_is_opened_and_the_log_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hookmap"):
        hookmap.open(unheard())
    assert "The map of Unheard passed the cheap checks in" in caplog.text


def test_a_map_that_is_not_true_is_refused_with_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookmap.discovery import map_of_model

    right = map_of_model.discover
    monkeypatch.setattr(map_of_model, "discover", lambda source: wrong(right(source)))
    with raises(hookmap.DiscoveryError, "hookmap misreads Unheard", "sum: resid_mid =", "check=False"):
        hookmap.open(unheard())
    assert hookmap.open(unheard(), check=False).map.num_layers == plain_hooks.LAYERS


class Silent(LlamaForCausalLM):
    """It records no hidden states."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("output_hidden_states", None)
        return super().forward(input_ids, attention_mask, **kwargs)


def test_a_model_that_records_no_hidden_states_is_held_against_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookmap.discovery import map_of_model

    torch.manual_seed(1)
    silent = plain_hooks.redrawn(Silent(plain_hooks.FAMILIES["llama"].config()))
    assert hookmap.open(silent).map.architecture == "Silent"
    assert [c.name for c in hookmap.verify(silent).checks if not c.passed] == ["hidden_states"]
    right = map_of_model.discover
    monkeypatch.setattr(map_of_model, "discover", lambda source: wrong(right(source)))
    with raises(hookmap.DiscoveryError, "hookmap misreads Silent"):
        hookmap.open(silent)


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
