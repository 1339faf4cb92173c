"""attn_result and the latent queries and keys: held against the model's own weights and plain hooks."""

from typing import Any

import pytest
import torch
from support import experts_by_hand, plain_hooks
from support.opened import EACH_STRUCTURE, RAGGED, opened
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.errors import CaptureError, InterventionError
from hookmap.verification.verify import verify


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_with_a_bias_the_heads_results_sum_to_what_attention_gives(name: str) -> None:
    hm = opened(name)
    for kind in hm.map.kinds:
        if "attn_result" not in kind.points:
            continue
        layer = kind.layers[0]
        run = hm.capture(RAGGED, ["attn_result", "attn_out_raw"], [layer], max_new_tokens=3)
        rest = [run.read(n, "attn_out_raw", layer) - run.read(n, "attn_result", layer).sum(1) for n in range(3)]
        bias = rest[0][0]
        assert all((each - bias).abs().max() < 1e-4 for each in rest)


def test_each_is_one_heads_part_of_the_output_projection() -> None:
    hm = opened("llama")
    run = hm.capture(RAGGED, ["z", "attn_result"], [1], max_new_tokens=3)
    weight: Any = hm.model.get_submodule("model.layers.1.self_attn.o_proj").weight
    for row in range(len(RAGGED)):
        z, result = run.read(row, "z", 1), run.read(row, "attn_result", 1)
        for head in range(4):
            expected = z[:, head] @ weight[:, 8 * head : 8 * head + 8].T
            torch.testing.assert_close(result[:, head], expected.detach(), rtol=1e-4, atol=1e-5)


def test_results_are_named_as_in_transformerlens_and_are_not_written() -> None:
    hm = opened("llama")
    run = hm.capture(RAGGED, ["blocks.1.attn.hook_result"], max_new_tokens=1)
    assert run.read(0, "attn_result", 1).shape[1:] == (4, 32)
    edits = [{"do": "ablate", "point": "attn_result", "layers": [1]}]
    with pytest.raises(InterventionError, match="write z"):
        hm.capture(RAGGED, ["resid_post"], [1], max_new_tokens=1, interventions=edits)


def test_results_of_a_layer_with_an_adapter_of_later_are_refused() -> None:
    hm = hookmap.open(plain_hooks.build("llama"), tokenizer=tiny_tokenizer())
    attention: Any = hm.model.get_submodule("model.layers.1.self_attn")

    class Adapted(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.extra = inner, torch.nn.Linear(32, 32, bias=False)

        @property
        def weight(self) -> torch.Tensor:
            return self.base_layer.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.extra(x)

    attention.o_proj = Adapted(attention.o_proj)
    with pytest.raises(CaptureError, match="adapter"):
        hm.capture(RAGGED, ["attn_result"], [1], max_new_tokens=1)


def test_latents_are_what_the_projections_to_the_heads_read_while_generating() -> None:
    hm = hookmap.open(experts_by_hand.build("deepseek_v3"), tokenizer=tiny_tokenizer())
    run = hm.capture(RAGGED, ["q_latent", "k_latent", "q", "v", "attn_in"], [1], max_new_tokens=4)
    own: Any = hm.model.get_submodule("model.layers.1.self_attn")
    for row in range(len(RAGGED)):
        x, q, k = (run.read(row, name, 1) for name in ("attn_in", "q_latent", "k_latent"))
        with torch.no_grad():
            torch.testing.assert_close(q, own.q_a_layernorm(own.q_a_proj(x)), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(k, own.kv_a_layernorm(own.kv_a_proj_with_mqa(x)[:, :20]), rtol=1e-4, atol=1e-5)
            heads = own.kv_b_proj(k).unflatten(-1, (4, 16))
        torch.testing.assert_close(run.read(row, "v", 1), heads[..., 8:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_they_are_proved(name: str) -> None:
    checks = verify(experts_by_hand.build(name)).checks
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert {"results", "experts"} <= {check.name for check in checks}
    assert ("latents" in {check.name for check in checks}) == (name == "deepseek_v3")


@pytest.mark.slow
def test_writing_latents_and_shared_experts_is_proved() -> None:
    hm = hookmap.open(experts_by_hand.build("deepseek_v3"), tokenizer=tiny_tokenizer())
    for selector in hm.map.selectors(["q_latent", "k_latent", "shared_expert_out"], [1]):
        assert hm.proofs.of(selector).reason is None
