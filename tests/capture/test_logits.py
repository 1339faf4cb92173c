"""Logits are as wide as the vocabulary: of those that a capture does not keep none is computed, and none is wrong."""

from typing import Any

import pytest
import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrOCRConfig,
    TrOCRForCausalLM,
)

import hookmap

PROMPTS = [[5, 9, 3, 7, 22, 13], [4, 8, 15, 16], [7, 7, 9, 1], [60, 61, 62, 63, 64, 65, 66, 67]]
TOKENS: dict[str, Any] = {"vocab_size": 100, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
NARROW: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MAMBA = {f"mamba_{name}": size for name, size in {"n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 1}.items()}
KEPT: list[dict[str, Any]] = [
    {},
    {"positions": "last"},
    {"positions": "last_prompt"},
    {"positions": "generated"},
    {"positions": [0, 2]},
    {"positions": "1:3"},
    {"every": 2},
    {"mean": True},
    {"positions": [1, -1], "features": [1, 5]},
]


class Renamed(LlamaForCausalLM):
    """Says `num_logits_to_keep`, which takes a number alone, as models did before 4.50."""

    def forward(self, input_ids: Any = None, num_logits_to_keep: int = 0, **others: Any) -> Any:
        others.pop("logits_to_keep", None)
        return super().forward(input_ids, logits_to_keep=int(num_logits_to_keep), **others)


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "falcon_h1":
        made: Any = FalconH1ForCausalLM(FalconH1Config(**TOKENS, **NARROW, **MAMBA, head_dim=8, mamba_d_ssm=32))
    elif kind == "bamba":
        made = BambaForCausalLM(BambaConfig(**TOKENS, **NARROW, **MAMBA, mamba_expand=1, attn_layer_indices=[1]))
    else:
        made = (Renamed if kind == "renamed" else LlamaForCausalLM)(LlamaConfig(**TOKENS, **NARROW))
    return made.eval()


def expected(made: Any, ids: list[int], positions: Any, features: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = made(torch.tensor([ids])).logits[0]
    found = found.mean(0, keepdim=True) if positions == "mean" else found if positions is None else found[[*positions]]
    return found if features is None else found[:, features]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "falcon_h1", "bamba", "renamed"])
@pytest.mark.parametrize("new", [0, 3])
@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_whatever_is_kept_of_the_logits_is_what_the_model_says(kind: str, new: int, engine: Any) -> None:
    made = model(kind)
    hm = hookmap.open(made)
    for kept in KEPT if engine == "hooks" else KEPT[:4]:
        if kept.get("positions") == "generated" and not new:
            continue
        run = hm.capture(PROMPTS, ["logits", "resid_post"], [1], new, engine=engine, **kept)
        for number, sample in enumerate(run.samples):
            ids = list(sample.token_ids)[: len(sample.token_ids) - bool(new)]
            found = run.read(number, "logits")
            torch.testing.assert_close(
                found, expected(made, ids, sample.positions, kept.get("features")), rtol=1e-4, atol=2e-5
            )


@pytest.mark.parametrize(
    ("kept", "new", "columns"),
    [
        ({"positions": "last"}, 3, [1, 1, 1]),
        ({"positions": "generated"}, 3, [1, 1, 1]),
        ({"positions": [0, 3]}, 2, [3, 1]),
        ({"positions": [0, 3]}, 0, [2]),
        ({}, 0, [6]),
    ],
)
def test_no_other_logits_are_computed(kept: dict[str, Any], new: int, columns: list[int]) -> None:
    made, computed = model("llama"), list[int]()
    hm = hookmap.open(made)
    made.lm_head.register_forward_hook(lambda _, args, output: computed.append(output.shape[1]))
    hm.capture([PROMPTS[0]], "logits", max_new_tokens=new, **kept)
    assert computed == columns


def test_the_logits_before_an_edit_and_after_it() -> None:
    made = model("llama")
    hm = hookmap.open(made)
    edit = {"do": "scale", "point": "logits", "factor": 2.0}
    run = hm.capture([PROMPTS[0]], "logits", max_new_tokens=0, positions=[1, -1], interventions=edit, before=True)
    assert run.before is not None
    same = expected(made, PROMPTS[0], [1, 5], None)
    torch.testing.assert_close(run.read(0, "logits"), 2 * same, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(run.before.read(0, "logits"), same, rtol=1e-4, atol=2e-5)


def test_logits_that_are_kept_of_some_tokens_follow_an_edit_of_the_stream() -> None:
    made = model("llama")
    hm = hookmap.open(made)
    edit = {"do": "scale", "point": "embed", "factor": 2.0}
    run = hm.capture([PROMPTS[0]], "logits", max_new_tokens=0, positions=[1, -1], interventions=edit, before=True)
    assert run.before is not None
    made.model.embed_tokens.weight.data *= 2
    changed = expected(made, PROMPTS[0], [1, 5], None)
    for each in (run, run.before):  # nothing is written at the logits themselves
        torch.testing.assert_close(each.read(0, "logits"), changed, rtol=1e-4, atol=2e-5)


def test_the_estimate_counts_logits_that_a_model_computes_whatever_is_kept() -> None:
    shape = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "vocab_size": 99}
    told = [
        hookmap.open(made).estimate([list(range(40))], "logits", max_new_tokens=0, positions="last")
        for made in (model("llama"), TrOCRForCausalLM(TrOCRConfig(**shape)).eval())
    ]
    assert [each.bytes for each in told] == [100 * 4, 99 * 4]
    assert [each.held(streaming=False) for each in told] == [100 * 4, 40 * 99 * 4]
