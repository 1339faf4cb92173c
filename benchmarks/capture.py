"""What a capture costs over plain `generate`, and over plain PyTorch hooks: `python benchmarks/capture.py`.

A 28-layer Qwen3 of width 256 with random weights, greedy, all in one process; the ways take turns, and each figure is
the median over the rounds of its time divided by plain `generate`'s in the same round.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import describe
from torch import nn

import hookmap

PROMPT, NEW, ROUNDS = list(range(5, 37)), 64, 15
FEW = {"points": ["resid_pre", "resid_mid"], "layers": [8, 12, 16]}
ALL = {"points": ["resid_pre", "resid_mid"], "layers": "all"}


def build() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=28, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def plain(model: nn.Module) -> None:
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0)


def hooks(model: nn.Module, layers: list[int]) -> None:
    """What a person writes by hand: input hooks that copy, nothing more."""
    kept: list[torch.Tensor] = []
    handles = []
    for layer in layers:
        block = model.get_submodule(f"model.layers.{layer}")
        for module in (block, block.post_attention_layernorm):
            handles.append(module.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone())))
    plain(model)
    for handle in handles:
        handle.remove()
    assert len(kept) == NEW * len(layers) * 2


def main() -> None:
    torch.set_num_threads(1)
    model, bare = build(), build()  # nnsight wraps the first one; the second stays as transformers made it
    hm = hookmap.open(model)
    folder = Path(tempfile.mkdtemp())
    count = iter(range(10**6))

    def capture(store: bool, **what: Any) -> None:
        hm.capture([PROMPT], max_new_tokens=NEW, store=folder / str(next(count)) if store else None, **what)

    ways: dict[str, Callable[[], None]] = {
        "plain generate": lambda: plain(bare),
        "plain hooks, 3 layers x 2 points": lambda: hooks(bare, [8, 12, 16]),
        "hookmap, 3 layers x 2 points, in memory": lambda: capture(False, **FEW),
        "hookmap, 3 layers x 2 points, to disk": lambda: capture(True, **FEW),
        "plain hooks, all layers x 2 points": lambda: hooks(bare, list(range(28))),
        "hookmap, all layers x 2 points, in memory": lambda: capture(False, **ALL),
        "hookmap, all layers x 2 points, to disk": lambda: capture(True, **ALL),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, run in ways.items():
            begun = time.process_time()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - begun)
    print(describe(), end="\n\n")
    print(f"{NEW} new tokens after {len(PROMPT)}; processor time, median of {ROUNDS} interleaved rounds\n")
    print("| way | over plain generate | ms per token |")
    print("|---|---|---|")
    base = seconds["plain generate"]
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        print(f"| {name} | {ratio:.2f} | {statistics.median(found) / NEW * 1e3:.2f} |")


if __name__ == "__main__":
    main()
