"""Whether prompts of different lengths may share a batch is shown on the model, and a model that errs is found."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hookmap
from hookmap.model import HookedModel

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}


def tiny(kind: str) -> HookedModel:
    """Its weights are drawn wide, so that each position matters."""
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=99, **special, **SIZES[kind])).eval()
    for weights in model.parameters():
        if weights.ndim > 1:
            torch.nn.init.normal_(weights, std=0.3)
    return hookmap.open(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_that_hides_pads_may_be_padded(kind: str) -> None:
    assert tiny(kind).why_no_pads is None


def test_a_model_that_looks_at_pads_is_found() -> None:
    hm = tiny("llama")

    def forget_the_mask(_: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": None}

    hm.root.register_forward_pre_hook(forget_the_mask, with_kwargs=True)
    assert "pads change its logits" in str(hm.why_no_pads)


def test_a_model_that_counts_pads_as_positions_is_found() -> None:
    hm = tiny("gpt2")

    def count_columns(_: Any, args: Any, kwargs: Any) -> Any:
        if "attention_mask" not in kwargs:  # one row alone
            return None
        end, new = kwargs["attention_mask"].shape[1], kwargs["input_ids"].shape[1]
        return args, {**kwargs, "position_ids": torch.arange(end - new, end)[None]}

    hm.root.register_forward_pre_hook(count_columns, with_kwargs=True)
    assert "pads change its logits" in str(hm.why_no_pads)


def test_a_state_is_never_led_through_pads() -> None:
    assert tiny("mamba").why_no_pads == "its mixers are recurrent"
