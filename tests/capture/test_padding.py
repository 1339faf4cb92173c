"""Whether prompts of different lengths may share a batch is shown on the model, and a model that errs is found."""

import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hookmap
from hookmap.loading.configs import build
from hookmap.loading.float64 import in_float64
from hookmap.loading.narrow import narrow
from hookmap.model import HookedModel
from hookmap.verification.verify import redraw

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "roformer": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "is_decoder": True,
    },
    "cpmant": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48,
        "prompt_types": 4, "prompt_length": 4, "segment_types": 4,
    },
    "mixtral": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "num_local_experts": 4,
    },
}  # fmt: skip
PROMPTS = [[5, 9, 3], [7, 22, 13, 41, 5, 60, 2, 33, 8, 71], [17, 4]]


def tiny(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> HookedModel:
    """Its weights are drawn wide, so that each position matters."""
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=99, **{**special, **SIZES[kind], **settings})
    model = AutoModelForCausalLM.from_config(config).eval()
    for weights in model.parameters():
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=0.3)
    return hookmap.open(model.to(dtype))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_hides_pads_may_be_padded(kind: str, dtype: torch.dtype) -> None:
    hm = tiny(kind, dtype)
    assert hm.why_no_pads is None
    assert hm.pads.why_not(harvest=True) is None


def test_a_model_that_hides_pads_in_eager_attention_may_be_padded() -> None:
    pads = tiny("llama", torch.bfloat16).pads
    assert [pads.why_not(harvest=harvest, pattern=True) for harvest in (False, True)] == [None, None]


@pytest.mark.slow
def test_a_model_that_looks_at_pads_is_found() -> None:
    hm = tiny("llama")

    def forget_the_mask(_: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": None}

    hm.root.register_forward_pre_hook(forget_the_mask, with_kwargs=True)
    assert "pads change its rows" in str(hm.why_no_pads)
    assert hm.pads.why_not(harvest=True) is None  # nothing looks behind itself


def test_a_model_that_counts_pads_as_positions_is_found() -> None:
    hm = tiny("gpt2")

    def count_columns(_: Any, args: Any, kwargs: Any) -> Any:
        if "attention_mask" not in kwargs:  # one row alone
            return None
        end, new = kwargs["attention_mask"].shape[1], kwargs["input_ids"].shape[1]
        return args, {**kwargs, "position_ids": torch.arange(end - new, end)[None]}

    hm.root.register_forward_pre_hook(count_columns, with_kwargs=True)
    assert "pads change its rows" in str(hm.why_no_pads)


@pytest.mark.slow
def test_a_small_fault_is_found_below_the_rounding_of_a_narrow_dtype() -> None:
    hm = tiny("llama", torch.bfloat16)

    def see_a_little(module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None or bool(mask.all()):
            return None
        embeds = hm.root.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embeds * (1 + 1e-3)}

    hm.root.register_forward_pre_hook(see_a_little, with_kwargs=True)
    assert "computed in float64" in str(hm.why_no_pads)


@pytest.mark.parametrize(("kind", "new"), [("roformer", 3), ("cpmant", 0)])
def test_where_pads_change_rows_a_prompt_has_the_rows_that_it_has_alone(
    kind: str, new: int, caplog: pytest.LogCaptureFixture
) -> None:
    hm = tiny(kind)
    with caplog.at_level(logging.WARNING, "hookmap"):
        run = hm.capture(PROMPTS, ["resid_post", "logits"], max_new_tokens=new)
    assert "run in batches of their own: pads change its rows" in caplog.text
    for number, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            expected = hm.model.generate(ids, max_new_tokens=new) if new else ids  # type: ignore[operator]
            logits = hm.model(expected[:, : len(prompt) + max(0, new - 1)]).logits[0]
        assert run.tokens[number] == tuple(expected[0].tolist())
        torch.testing.assert_close(run.read(number, "logits"), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("new", [0, 3])
def test_attention_that_chooses_keys_runs_lengths_apart(new: int) -> None:
    """Of equal scores it takes those that stand first, and pads move them: DeepSeek-V3.2's, with few layers."""
    config = narrow(AutoConfig.for_model("deepseek_v32", num_hidden_layers=4))
    model = build(config, "cpu", torch.float32)
    redraw(model)
    hm = hookmap.open(model)
    assert "chooses among the keys" in str(hm.pads.why_not(harvest=not new))
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, hm.vocabulary - 8, (length,), generator=draw).tolist() for length in (2, 9, 70)]
    generation = {"min_new_tokens": new} if new else {}
    run = hm.capture(prompts, "resid_post", max_new_tokens=new, **generation)
    for number, prompt in enumerate(prompts):
        alone = hm.capture([prompt], "resid_post", max_new_tokens=new, **generation)
        assert run.tokens[number] == alone.tokens[0]
        assert torch.equal(run.read(number, "resid_post", 3), alone.read(0, "resid_post", 3))


@pytest.mark.slow
def test_the_estimate_counts_the_batches_that_run() -> None:
    apart, together = (tiny(kind).estimate(PROMPTS, "resid_post", max_new_tokens=2) for kind in ("roformer", "llama"))
    assert (apart.forward_passes, together.forward_passes) == (6, 2)


def test_prompts_of_one_length_are_not_held_up_by_a_proof() -> None:
    hm = tiny("llama")
    seen: list[int] = []
    hm.root.register_forward_pre_hook(lambda *_: seen.append(1))
    hm.capture([[5, 9, 3], [7, 22, 13]], "resid_post", max_new_tokens=0)
    hm.capture(PROMPTS, "resid_post", max_new_tokens=0, batch_size=1)
    assert len(seen) == 1 + len(PROMPTS)


@pytest.mark.slow
def test_the_proof_leaves_the_model_and_the_generators_as_they_were() -> None:
    hm = tiny("llama", torch.bfloat16, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
               max_position_embeddings=64)  # fmt: skip
    before = {name: value.clone() for name, value in hm.root.state_dict().items()}
    buffers = {name: (value, value.clone()) for name, value in hm.root.named_buffers()}
    draws, training = torch.get_rng_state(), hm.root.train().training
    assert hm.why_no_pads is None
    assert torch.equal(torch.get_rng_state(), draws)
    assert hm.root.training == training
    assert all(torch.equal(value, before[name]) for name, value in hm.root.state_dict().items())
    for name, value in hm.root.named_buffers():
        assert value is buffers[name][0]
        assert torch.equal(value, buffers[name][1])


def test_a_long_prompt_that_changes_a_whole_batch_has_it_alone(caplog: pytest.LogCaptureFixture) -> None:
    """LongRoPE takes other frequencies for every row, once one of them is beyond the original length."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 8, "factor": 4.0, **factors}
    hm = tiny("llama", rope_parameters=rope, max_position_embeddings=256)
    with caplog.at_level(logging.WARNING, "hookmap"):
        run = hm.capture(PROMPTS, "resid_post", max_new_tokens=0)
    assert "beyond 8 tokens" in caplog.text
    with torch.no_grad():
        alone = hm.model(torch.tensor([PROMPTS[0]]), output_hidden_states=True)
    torch.testing.assert_close(run.read(0, "resid_post", 0), alone.hidden_states[1][0], rtol=1e-5, atol=1e-5)


def test_a_model_in_float64_is_the_model() -> None:
    hm = tiny("llama", torch.bfloat16)
    ids = torch.tensor([PROMPTS[1]])
    with in_float64(hm.root):
        found = hm.root.model(ids).last_hidden_state  # type: ignore[union-attr, operator]
    assert found.dtype == torch.float64
    assert hm.root.dtype == torch.bfloat16
    wide = hm.root.model.to(torch.float64)  # type: ignore[union-attr, operator]
    with torch.no_grad():
        torch.testing.assert_close(found, wide(ids).last_hidden_state, rtol=1e-5, atol=1e-5)
