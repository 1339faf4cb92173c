"""Architectures whose points inside attention and MLPs were once lost, or right and refuted."""

from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hookmap

pytestmark = pytest.mark.slow
TWO: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 99}
FEW: dict[str, Any] = {**TWO, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("name", "fields", "points"),
    [
        # A norm stands behind the activations.
        pytest.param("bitnet", FEW, ["mlp_pre", "mlp_pre_linear"], id="bitnet"),
        # Its first pass puts another module in the place of its attention.
        pytest.param("big_bird", {**TWO, "num_attention_heads": 4, "is_decoder": True}, ["attn_scores"], id="big_bird"),
        # The bias of a key depends on its token.
        pytest.param("doge", FEW, ["attn_scores", "q_rot"], id="doge"),
        # Prompts get positions of their own before the tokens.
        pytest.param(
            "cpmant",
            {"num_hidden_layers": 2, "hidden_size": 64, "dim_ff": 96, "num_attention_heads": 4, "dim_head": 16},
            ["mixer_norm_scale", "mlp_norm_scale"],
            id="cpmant",
        ),
        # A norm stands behind the sum of the experts.
        pytest.param(
            "axk1",
            {
                **FEW,
                "n_routed_experts": 4,
                "n_group": 2,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "first_k_dense_replace": 0,
                "moe_intermediate_size": 32,
                "kv_lora_rank": 16,
                "q_lora_rank": 24,
                "num_key_value_heads": 4,
            },
            ["shared_expert_out", "expert_out"],
            id="axk1",
        ),
        # The activations are computed in float32, whatever the dtype; softmax reads a sink beside the scores.
        pytest.param("gpt_oss", {**FEW, "num_local_experts": 4}, ["pattern"], id="gpt_oss"),
    ],
)
def test_points_are_there_and_verify(name: str, fields: dict[str, Any], points: list[str]) -> None:
    config = CONFIG_MAPPING[name](**fields)
    found = hookmap.discover(config)
    for point in points:
        assert found.unavailable(point, 0) is None, found.unavailable(point, 0)
    result = hookmap.verify(config, architecture_map=found, random_weights=True)
    assert result.passed, [check for check in result.checks if not check.passed]
