"""What a capture costs over plain `generate` and over the bare forward pass, beside its peers, in one run.

    python benchmarks/capture.py narrow      a 28-layer Qwen3 of width 256
    python benchmarks/capture.py full        Qwen3-0.6B's own shape: 28 layers of width 1024, 151,936 tokens

Random weights, greedy, one process; the ways take turns, and each figure is the median over the rounds of its time
divided by plain `generate`'s in the same round. Peers that need other packages run in environments of their own, in the
same rounds, over a plain `generate` there: --peer nnterp=/path/to/python, also transformer_lens and interp_engine
"""

import argparse
import itertools
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe
from narrow import ALL, FEW, PROMPT, SHAPES, build, plain
from torch import nn

import hookmap

POINTS = ["resid_pre", "resid_mid"]


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
        plain(model or self.bare, self.new, self.batch)

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

    def tidy(self) -> None:
        """Remove what was captured; not timed."""
        for store in self.folder.iterdir():
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


class Peer:
    """A peer's process, which runs a way when it is told to."""

    def __init__(self, name: str, python: str, shape: str, new: int, *attention: str) -> None:
        script = Path(__file__).parent / "peer.py"
        command = [python, str(script), name, shape, str(new), *attention]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while self._read().strip() != "ready":  # it may print a word of its own first
            pass

    def run(self, way: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(way + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a peer ended with {self._process.wait()}")
        return line


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
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = torch.bfloat16 if given.device.startswith("cuda") else torch.float32
    bench = Bench(given.shape, dtype, given.device, given.new, given.batch)
    chosen = {n: run for n, run in ways(bench).items() if n == "plain generate" or given.only in n}
    peers = {name: Peer(name, python, given.shape, given.new) for name, python in (p.split("=") for p in given.peer)}
    labels = {"few": "3 layers x 2 points", "all": "all layers x 2 points"}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    ratios: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(given.rounds + 1):
        for name, run in chosen.items():
            begun = timed(given.device)
            run()
            seconds[name].append(timed(given.device) - begun)
            bench.tidy()
            ratios[name].append(seconds[name][-1] / seconds["plain generate"][-1])
        for name, peer in peers.items():
            base = peer.run("plain")
            for way, label in labels.items():
                key = f"{name}, {label}, in memory"
                seconds.setdefault(key, []).append(peer.run(way))
                ratios.setdefault(key, []).append(seconds[key][-1] / base)
        if not number:  # the first round warms up
            for figures in (*seconds.values(), *ratios.values()):
                figures.clear()
    print(describe(), end="\n\n")
    print(f"{given.shape}, batch {given.batch}, {given.new} new tokens after {len(PROMPT)}; {given.rounds} rounds\n")
    print("| way | over plain generate | ms per token |\n|---|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {statistics.median(ratios[name]):.2f} | {statistics.median(found) / given.new * 1e3:.2f} |")


if __name__ == "__main__":
    main()
