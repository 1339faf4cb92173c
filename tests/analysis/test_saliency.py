"""Saliency of tokens is what torch.autograd gives by hand, in float64; integrated gradients are complete."""

import logging
from typing import Any

import pytest
import torch
from support.by_edges import wide
from support.opened import RAGGED
from support.raises import raises

import hookmap
from hookmap import metrics

METRIC = metrics.logit_difference(5, 9)


def metric_at(model: Any, embeds: torch.Tensor) -> torch.Tensor:
    logits = model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
    return logits[5] - logits[9]  # type: ignore[no-any-return]


def gradient(model: Any, embeds: torch.Tensor) -> torch.Tensor:
    own = embeds.detach().requires_grad_()
    return torch.autograd.grad(metric_at(model, own), [own])[0][0]


def embedded(model: Any, ids: list[int]) -> torch.Tensor:
    return model.get_input_embeddings()(torch.tensor([ids])).detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_are_those_by_hand(name: str) -> None:
    model, hm = wide(name)
    product = hm.saliency(RAGGED, METRIC, "gradient_x_activation")
    norm = hm.saliency(RAGGED, METRIC, "gradient_norm")
    for number, ids in enumerate(RAGGED):
        embeds = embedded(model, ids)
        own = gradient(model, embeds)
        torch.testing.assert_close(product.scores[number].double(), (own * embeds[0]).sum(-1), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(norm.scores[number].double(), own.norm(dim=-1), rtol=1e-5, atol=1e-7)
    assert product.gap is None and len(product.tokens[0]) == len(RAGGED[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_integrated_gradients_are_the_integral_by_hand_and_complete(name: str) -> None:
    model, hm = wide(name)
    other = [[token + 1 for token in ids] for ids in RAGGED]
    found = hm.saliency(RAGGED, METRIC, baseline=other, steps=24)
    assert found.gap is not None and float(found.gap.max()) < 0.02
    for number, ids in enumerate(RAGGED):
        start, end = embedded(model, other[number]), embedded(model, ids)
        middles = [(n + 0.5) / 60 for n in range(60)]
        mean = torch.stack([gradient(model, start + share * (end - start)) for share in middles]).mean(0)
        expected = ((end - start)[0] * mean).sum(-1)
        assert float((found.scores[number].double() - expected).norm() / expected.norm()) < 0.02
        with torch.no_grad():
            torch.testing.assert_close(found.metric[number].double(), metric_at(model, end), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.baseline[number].double(), metric_at(model, start), rtol=1e-4, atol=1e-4)
    assert "they miss the metric's difference by" in repr(found)


def test_what_is_not_complete_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hookmap"):
        found = wide("llama")[1].saliency(RAGGED, METRIC, baseline=0, steps=2)
    assert found.gap is not None and float(found.gap.max()) > 0.05
    assert "give more steps" in caplog.text


@pytest.mark.slow
def test_any_point_of_one_layer_can_be_asked() -> None:
    hm = wide("llama")[1]
    found = hm.saliency(RAGGED, METRIC, "gradient_x_activation", point="z", layer=1)
    own = hm.gradients(RAGGED, METRIC, "z", [1])
    for number in range(len(RAGGED)):
        expected = (own.read(number, "z", 1) * own.values.read(number, "z", 1)).flatten(1).sum(1)
        torch.testing.assert_close(found.scores[number].double(), expected.double(), rtol=1e-5, atol=1e-7)
    assert found.grid(0).values.shape == (1, 6) and found.as_json()["prompts"][0]["scores"]
    complete = hm.saliency(RAGGED, METRIC, point="resid_post", layer=1, steps=24)
    assert complete.gap is not None and float(complete.gap.max()) < 0.05


def test_what_cannot_be_is_refused() -> None:
    hm = wide("llama")[1]
    with raises(hookmap.SelectionError, "integrated_gradients, gradient_x_activation, gradient_norm"):
        hm.saliency(RAGGED, METRIC, "magic")
    with raises(hookmap.SelectionError, "say which", "layer=8"):
        hm.saliency(RAGGED, METRIC, point="resid_post")
    with raises(hookmap.SelectionError, "one for each"):
        hm.saliency(RAGGED, METRIC, baseline=[[1, 2], [3, 4]])
    with raises(hookmap.SelectionError, "as many tokens"):
        hm.saliency(RAGGED, METRIC, baseline=[1, 2])
    with raises(hookmap.SelectionError, "has none: leave it out"):
        hm.saliency(RAGGED, METRIC, "gradient_norm", baseline=[1, 2])
