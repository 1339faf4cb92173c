"""scan_in, scan_out and mixer_gate: held against plain hooks and the mixers' own modules, token by token too."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from support import plain_hooks
from support.opened import RAGGED
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.model import HookedModel
from hookmap.verification.verify import verify

_COMMON = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_HEADS = {
    **_COMMON, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "head_dim": 8,
}  # fmt: skip
_CONFIGS: dict[str, Callable[[], Any]] = {
    "mamba": lambda: tf.MambaConfig(**_COMMON, state_size=4),
    "mamba2": lambda: tf.Mamba2Config(**_COMMON, num_heads=8, head_dim=8, n_groups=2, state_size=8, chunk_size=16),
    "falcon_h1": lambda: tf.FalconH1Config(
        **_HEADS, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
        mamba_chunk_size=16, mamba_rms_norm=True,
    ),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **_HEADS, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24,
        layer_types=["linear_attention", "full_attention"],
    ),
    "recurrent_gemma": lambda: tf.RecurrentGemmaConfig(
        **{**_HEADS, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16
    ),
}  # fmt: skip
_PLACES = {
    ("mamba2", "scan_out"): ("backbone.layers.0.mixer.norm", 0),
    ("mamba2", "mixer_gate"): ("backbone.layers.0.mixer.norm", 1),
    ("falcon_h1", "scan_out"): ("model.layers.0.mamba.norm", 0),
    ("falcon_h1", "mixer_gate"): ("model.layers.0.mamba.norm", 1),
    ("qwen3_next", "scan_out"): ("model.layers.0.linear_attn.norm", 0),
    ("qwen3_next", "mixer_gate"): ("model.layers.0.linear_attn.norm", 1),
    ("recurrent_gemma", "scan_in"): ("model.layers.0.temporal_block.rg_lru", 0),
}
"""(family, point) -> the module that reads it, and which of its arguments it is"""


@cache
def opened(name: str) -> HookedModel:
    torch.manual_seed(0)
    model = plain_hooks.redrawn(tf.AutoModelForCausalLM.from_config(_CONFIGS[name]()))
    return hookmap.open(model, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(("name", "point"), _PLACES)
def test_they_are_what_the_module_behind_them_reads_in_every_step(name: str, point: str) -> None:
    hm, (path, place) = opened(name), _PLACES[name, point]
    prompt = RAGGED[0]
    hm.capture([prompt], ["resid_post"], [0], max_new_tokens=1)
    seen: list[torch.Tensor] = []
    handle = hm.model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[place].clone()))
    try:
        run = hm.capture([prompt], [point], [0], max_new_tokens=4)
    finally:
        handle.remove()
    found = run.read(0, point, 0)
    rows = [each.reshape(-1, *found.shape[1:]) for each in seen]
    assert [len(each) for each in rows] == [len(prompt), 1, 1, 1]
    assert torch.equal(found, torch.cat(rows))


def test_the_gate_of_a_mixer_without_a_norm_is_half_of_its_projection() -> None:
    hm = opened("mamba")
    run = hm.capture(RAGGED[:1], ["mixer_in", "mixer_gate"], [1], max_new_tokens=4)
    mixer: Any = hm.model.get_submodule("backbone.layers.1.mixer")
    with torch.no_grad():
        expected = mixer.in_proj(run.read(0, "mixer_in", 1)).chunk(2, -1)[1]
    torch.testing.assert_close(run.read(0, "mixer_gate", 1).flatten(1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", _CONFIGS)
def test_they_are_proved(name: str) -> None:
    checks = verify(opened(name).model).checks
    assert "scan" in {check.name for check in checks}
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


def test_a_map_with_gate_and_scan_in_each_others_place_is_refuted() -> None:
    hm = opened("mamba2")
    (kind,) = hm.map.kinds
    swapped = {"scan_out": kind.points["mixer_gate"], "mixer_gate": kind.points["scan_out"]}
    wrong = hm.map.model_copy(update={"kinds": (kind.model_copy(update={"points": {**kind.points, **swapped}}),)})
    assert not verify(hm.model, architecture_map=wrong).passed


@pytest.mark.parametrize(("name", "points"), [("mamba2", ["scan_out", "mixer_gate"]), ("qwen3_next", ["scan_out"])])
def test_writing_them_is_proved_or_refused_with_a_reason(name: str, points: list[str]) -> None:
    hm = opened(name)
    for selector in hm.map.selectors(points, [0]):
        assert hm.proofs.of(selector).reason is None


def test_a_map_with_the_other_half_of_the_projection_for_a_gate_is_refuted() -> None:
    hm = opened("mamba")
    (kind,) = hm.map.kinds
    (term,) = kind.points["mixer_gate"].terms
    assert term.heads is not None and term.heads.start == 64
    other = term.model_copy(update={"heads": term.heads.model_copy(update={"start": 0, "stop": 64})})
    points = {**kind.points, "mixer_gate": kind.points["mixer_gate"].model_copy(update={"terms": (other,)})}
    wrong = hm.map.model_copy(update={"kinds": (kind.model_copy(update={"points": points}),)})
    assert not verify(hm.model, architecture_map=wrong).passed
