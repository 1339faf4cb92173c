"""A term that is multiplied by a parameter of the model: a capture reads it there, and nobody writes the product."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from support.invented_causal import LadderConfig, LadderForCausalLM
from support.raises import raises

import hookmap
from hookmap.errors import CaptureError
from hookmap.maps.parsing import parse

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded")]
PROMPTS = [[5, 17, 3, 44], [9, 40, 31, 8]]


@pytest.mark.parametrize("block", ["Weighted", "Side", "StepOfEach", "InOneOperation", "InterpolatedOfEach"])
@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_a_capture_multiplies_by_the_parameter(block: str, engine: str) -> None:
    model = LadderForCausalLM(LadderConfig(block=block)).eval()
    run = hookmap.open(model).capture(PROMPTS, ["mixer_out", "mlp_out"], "all", max_new_tokens=3, engine=engine)
    for number, tokens in enumerate(run.tokens):
        said = model.says(torch.tensor([tokens[:-1]]))
        for point in ("mixer_out", "mlp_out"):
            for layer in range(model.config.num_hidden_layers):
                found = run.read(number, point, layer)
                assert torch.allclose(found, said[point, layer][0], atol=1e-5), (point, layer)


def test_the_parameter_is_read_when_the_model_runs() -> None:
    model = LadderForCausalLM(LadderConfig(block="Weighted")).eval()
    hm = hookmap.open(model)
    before = hm.capture(PROMPTS[:1], "mixer_out", 0, max_new_tokens=0)["mixer_out", 0]
    with torch.no_grad():
        attrgetter("ladder.rungs.0.rates")(model).mul_(2)
    after = hm.capture(PROMPTS[:1], "mixer_out", 0, max_new_tokens=0)["mixer_out", 0]
    assert torch.equal(after, 2 * before)


def test_the_product_is_not_written() -> None:
    hm = hookmap.open(LadderForCausalLM(LadderConfig(block="Weighted")).eval())
    (added,), (stream,) = hm.map.selectors("mixer_out", 1), hm.map.selectors("resid_mid", 1)
    assert "multiplies it by its parameter ladder.rungs.0.rates" in str(hm.proofs.of(added).reason)
    assert hm.proofs.of(stream).reason is None


def test_a_selector_asks_for_the_parameter() -> None:
    found = hookmap.discover(LadderForCausalLM(LadderConfig(block="Weighted")).eval())
    assert parse(found.to_json()) == found
    (selector,) = found.selectors("mixer_out", 2)
    (term,) = selector.terms
    tensor, weight = torch.ones(1, 4, 24), torch.rand(24)
    assert term.weight == "ladder.rungs.2.rates"
    assert torch.allclose(term.times(tensor, weight), 0.5 * weight * tensor)
    with raises(CaptureError, "ladder.rungs.2.rates is needed"):
        term.times(tensor)
