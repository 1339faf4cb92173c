"""The models that the benchmarks run: Qwen3 shapes, random weights. Imports no hookmap: peers' environments lack it."""

from typing import Any

import torch
import transformers
from torch import nn

PROMPT = list(range(5, 37))
LAYERS = 28
FEW, ALL = [8, 12, 16], list(range(LAYERS))
SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    },
    "full": {  # Qwen3-0.6B's own
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
}  # fmt: skip


def build(
    shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu", attention: str | None = None
) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **SHAPES[shape], num_hidden_layers=LAYERS, eos_token_id=None, pad_token_id=0, bos_token_id=1
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(device, dtype).eval()


def plain(model: nn.Module, new: int, batch: int = 1) -> None:
    """Plain `generate`, greedy."""
    ids = torch.tensor([PROMPT] * batch, device=next(model.parameters()).device)
    with torch.no_grad():
        model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
