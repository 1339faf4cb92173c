"""A tiny Llama that vLLM's CPU kernels take, and what plain PyTorch hooks see of it. Uses nothing of hookmap."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.tiny_tokenizer import tiny_tokenizer

SIZES = {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 96,
}  # fmt: skip
"""heads of 32, the smallest that vLLM has kernels for"""
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 96, "block_size": 32}
SCARCE: dict[str, Any] = {
    "max_num_batched_tokens": 24, "max_num_seqs": 8, "num_gpu_blocks_override": 10, "enable_prefix_caching": True,
    "long_prefill_token_threshold": 13,
}  # fmt: skip
"""prompts are read in pieces, and the cache is too small for eight requests of 40 tokens: some are preempted"""
TWO_PROCESSES = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two workers of vLLM need two GPUs")
POINTS = ("resid_pre", "resid_mid", "resid_post", "mixer_out", "mlp_out")
LAYERS = plain_hooks.LAYERS
FAMILY = plain_hooks.FAMILIES["llama"]


def save(folder: Path) -> Path:
    """The model's checkpoint, with its tokenizer."""
    model = plain_hooks.build("llama", **SIZES)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@dataclass
class Plain:
    """transformers' own model, and its answers."""

    model: Any

    @classmethod
    def of(cls, folder: Path) -> "Plain":
        """The model of a checkpoint."""
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())

    def generated(self, ids: list[int], new: int, **settings: Any) -> tuple[int, ...]:
        """The prompt's tokens and those that greedy decoding adds."""
        settings = {"do_sample": False, **settings}
        made = self.model.generate(torch.tensor([ids]), max_new_tokens=new, pad_token_id=0, **settings)
        return tuple(made[0].tolist())

    def rows(self, tokens: tuple[int, ...]) -> dict[tuple[str, int], torch.Tensor]:
        """(point, layer) -> rows of these tokens, [pos, d], in one pass without a cache."""
        places = {
            (p.module.replace("{i}", str(i)), p.side)
            for ps in FAMILY.points.values()
            for p in ps
            for i in range(LAYERS)
        }
        with plain_hooks.watching(self.model, {place: place for place in places}) as seen:
            self.model(torch.tensor([list(tokens)]), use_cache=False)
        held = plain_hooks.Reference(torch.tensor([]), {place: rows[0] for place, rows in seen.items()}, 1)
        return {(point, i): held.point(FAMILY, point, i)[0] for point in FAMILY.points for i in range(LAYERS)}


def prompts(count: int, length: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Token ids, always the same ones; the first `shared` tokens are those of all prompts."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(3, plain_hooks.VOCABULARY, (shared,), generator=draw).tolist()
    rest = torch.randint(3, plain_hooks.VOCABULARY, (count, length - shared), generator=draw).tolist()
    return [[*first, *own] for own in rest]


def held_against(plain: Plain, run: Any, points: Any = POINTS, tolerance: float = 1e-5) -> None:
    """Every row of a capture of all positions is the one that plain hooks see for the same tokens."""
    for sample in run.samples:
        expected = plain.rows(sample.token_ids[: sample.rows])
        assert sample.rows == len(sample.token_ids) - (len(sample.token_ids) > sample.prompt_tokens)
        for point in points:
            for layer in range(LAYERS):
                found = run.read(sample.sample, point, layer)
                wanted = expected[point, layer]
                assert found.shape == wanted.shape
                off = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
                assert float(off.max()) < tolerance, (sample.sample, point, layer, int(off.argmax()), float(off.max()))
