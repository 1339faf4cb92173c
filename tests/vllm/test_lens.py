"""Lenses of captures on vLLM are those of the model that transformers runs."""

from pathlib import Path
from typing import Any

import torch
from support.on_vllm import prompts

import hookmap


def test_a_lens_is_that_of_the_hooks_engine(on_vllm: Any, checkpoint: Path) -> None:
    own, ids = hookmap.open(checkpoint, dtype="float32", check=False), prompts(1, 9)[0]
    for point in ("resid_post", "mlp_out"):
        found, expected = on_vllm.lens([ids], point), own.lens([ids], point)
        assert found.layers == expected.layers and found.predicted
        assert torch.equal(found.top_ids, expected.top_ids)
        torch.testing.assert_close(found.top_probabilities, expected.top_probabilities, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.kl, expected.kl, rtol=1e-3, atol=1e-5)
    run = on_vllm.capture([ids], "resid_post", max_new_tokens=4)
    assert on_vllm.lens(run, layers=[-1]).top_ids[0, -1, 0] == run.tokens[0][-1]


def test_directions_are_those_of_the_hooks_engine(on_vllm: Any, checkpoint: Path) -> None:
    own, ids = hookmap.open(checkpoint, dtype="float32", check=False), prompts(4, 9)
    found, expected = (each.steering_vector(ids[:2], ids[2:], layers=[1]) for each in (on_vllm, own))
    torch.testing.assert_close(found.directions[1], expected.directions[1], rtol=1e-3, atol=1e-4)
