"""What a capture costs over plain `generate` and over the bare forward pass, beside its peers, in one run.

    python benchmarks/capture.py narrow      a 28-layer Qwen3 of width 256
    python benchmarks/capture.py full        Qwen3-0.6B's own shape: 28 layers of width 1024, 151,936 tokens

Random weights, greedy, one process; the ways take turns, and each figure is the median over the rounds of its time
divided by plain `generate`'s in the same round. Peers that are not installed are left out.
"""

import argparse
import importlib.util
import itertools
import shutil
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

PROMPT = list(range(5, 37))
SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    },
    "full": {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
}  # fmt: skip
LAYERS = 28
POINTS = ["resid_pre", "resid_mid"]
FEW, ALL = [8, 12, 16], list(range(LAYERS))


def build(shape: str, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **SHAPES[shape], num_hidden_layers=LAYERS, eos_token_id=None, pad_token_id=0, bos_token_id=1
    )
    return transformers.AutoModelForCausalLM.from_config(config).to(device, dtype).eval()


def timed(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    # One thread computes; the writer's thread counts too.
    return time.process_time()


class Bench:
    """One model for the untouched ways, one for nnsight, which wraps it."""

    def __init__(self, shape: str, dtype: torch.dtype, device: str, new: int, batch: int) -> None:
        self.device, self.new, self.batch = device, new, batch
        self.bare = build(shape, dtype, device)
        self.hm = hookmap.open(self.bare)
        self.wrapped = build(shape, dtype, device)
        self.hm_wrapped = hookmap.open(self.wrapped)
        self.prompts = [PROMPT] * batch
        self.folder = Path(tempfile.mkdtemp())
        self.numbers = itertools.count()
        self._tree: Any = None

    def plain(self, model: nn.Module | None = None) -> None:
        ids = torch.tensor(self.prompts, device=self.device)
        with torch.no_grad():
            (model or self.bare).generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.new, do_sample=False, pad_token_id=0
            )

    def hooks(self, layers: list[int]) -> None:
        """What a person writes by hand: input hooks that copy, nothing more."""
        kept: list[torch.Tensor] = []
        handles = []
        for layer in layers:
            block = self.bare.get_submodule(f"model.layers.{layer}")
            for module in (block, block.post_attention_layernorm):
                handles.append(module.register_forward_pre_hook(lambda _, args: kept.append(args[0].to("cpu").clone())))
        self.plain()
        for handle in handles:
            handle.remove()
        assert len(kept) == self.new * len(layers) * 2

    def hookmap(self, layers: list[int], engine: str, disk: bool) -> None:
        hm = self.hm if engine == "hooks" else self.hm_wrapped
        store = self.folder / str(next(self.numbers)) if disk else None
        hm.capture(
            self.prompts, POINTS, layers, self.new, engine=engine, store=store, batch_size=self.batch  # type: ignore[arg-type]
        )  # fmt: skip
        if store:
            shutil.rmtree(store)

    @property
    def tree(self) -> Any:
        """nnsight's own, over the wrapped model."""
        if self._tree is None:
            import nnsight

            self._tree = nnsight.NNsight(self.wrapped)
        return self._tree

    def _generate(self, _: Any) -> Any:
        self.plain(self.wrapped)

    def nnsight_empty(self) -> None:
        with self.tree.trace(None, fn=self._generate):
            pass

    def nnsight_cache(self, layers: list[int]) -> None:
        paths = [f"model.layers.{layer}" for layer in layers]
        paths += [f"{path}.post_attention_layernorm" for path in paths]
        with self.tree.trace(None, fn=self._generate) as tracer:
            cache = tracer.cache(modules=paths, include_output=False, include_inputs=True).save()
        assert cache is not None

    def nnsight_iter(self, layers: list[int]) -> None:
        import nnsight

        model, tree = self.wrapped, self.tree
        with tree.trace(None, fn=self._generate) as tracer:
            rows = nnsight.save([])
            for _step in tracer.iter[:]:
                for layer in layers:
                    rows.append(tree.model.layers[layer].input.clone())
                    rows.append(tree.model.layers[layer].post_attention_layernorm.input.clone())
        assert len(rows) == self.new * len(layers) * 2, (len(rows), type(model))


def ways(bench: Bench) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {"plain generate": bench.plain}
    for label, layers in (("3 layers x 2 points", FEW), ("all layers x 2 points", ALL)):
        found[f"plain hooks, {label}"] = lambda layers=layers: bench.hooks(layers)  # type: ignore[misc]
        for engine in ("hooks", "nnsight"):
            for disk in (False, True):
                name = f"hookmap, {engine} engine, {label}, {'to disk' if disk else 'in memory'}"
                found[name] = lambda e=engine, d=disk, ls=layers: bench.hookmap(ls, e, d)  # type: ignore[misc]
        found[f"nnsight cache, {label}"] = lambda layers=layers: bench.nnsight_cache(layers)  # type: ignore[misc]
        found[f"nnsight iter, {label}"] = lambda layers=layers: bench.nnsight_iter(layers)  # type: ignore[misc]
    found["nnsight, empty trace"] = bench.nnsight_empty
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, nargs="?", default="narrow")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="ways whose name contains this")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = torch.bfloat16 if given.device.startswith("cuda") else torch.float32
    bench = Bench(given.shape, dtype, given.device, given.new, given.batch)
    chosen = {n: run for n, run in ways(bench).items() if n == "plain generate" or given.only in n}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(given.rounds + 1):
        for name, run in chosen.items():
            begun = timed(given.device)
            run()
            if number:  # the first round warms up
                seconds[name].append(timed(given.device) - begun)
    print(describe(), end="\n\n")
    print(f"{given.shape}, batch {given.batch}, {given.new} new tokens after {len(PROMPT)}; {given.rounds} rounds\n")
    print("| way | over plain generate | ms per token |\n|---|---|---|")
    base = seconds["plain generate"]
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        print(f"| {name} | {ratio:.2f} | {statistics.median(found) / given.new * 1e3:.2f} |")


if __name__ == "__main__":
    assert importlib.util.find_spec("nnsight")
    main()
