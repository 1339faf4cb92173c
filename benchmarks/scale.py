"""What captures cost on paper, from the shipped maps: `python benchmarks/scale.py`. docs/scale.md has the assumptions.

Bytes per token come out of the function by which `hookmap capture` tells its size before it begins; the tokens per
second are bounds, from a GPU's data sheet. `--commits FOLDER` measures how often a disk takes a group of samples.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from machine import describe

import hookmap
from hookmap.activations import Sample
from hookmap.capture.estimate import estimate
from hookmap.maps.document import ArchitectureMap
from hookmap.stores.durable_files import AppendedFile
from hookmap.stores.shard import ShardInfo
from hookmap.stores.table import SAMPLES, SHARDS, Committed, Entry, Span, encode_group, encode_shards, scan

BF16 = 2
"""bytes of one number"""
FLOPS, BANDWIDTH = 989e12, 3.35e12
"""of one H100 SXM: bf16 operations per second, without sparsity, and bytes of its memory per second"""
USED = 0.4
"""of both, by a well-fed model"""
BATCH = 32
"""samples that generate together on one copy of the model"""


@dataclass(frozen=True)
class Model:
    """One model of the tables."""

    name: str
    parameters: float
    active: float
    """parameters that one token meets"""
    weights: float
    """bytes of one"""
    d_mlp: int

    @property
    def reads(self) -> float:
        """Tokens per second and GPU of a harvest, at most: two operations for each parameter that a token meets."""
        return USED * FLOPS / (2 * self.active)

    @property
    def generates(self) -> float:
        """Tokens per second and GPU in batches, at most: each step reads all weights once."""
        return BATCH * USED * BANDWIDTH / (self.parameters * self.weights)


MODELS = {
    "Qwen/Qwen3-0.6B": Model("Qwen3-0.6B", 0.6e9, 0.6e9, BF16, 3072),
    "Qwen/Qwen3-8B": Model("Qwen3-8B", 8.2e9, 8.2e9, BF16, 12288),
    "Qwen/Qwen3-32B": Model("Qwen3-32B", 32.8e9, 32.8e9, BF16, 25600),
    "meta-llama/Llama-3.1-70B": Model("Llama-3.1-70B", 70.6e9, 70.6e9, BF16, 28672),
    "deepseek-ai/DeepSeek-V3": Model("DeepSeek-V3", 671e9, 37e9, 1, 18432),
}
POINTS = ["resid_pre", "resid_mid"]


def map_of(name: str) -> ArchitectureMap:
    """The shipped map, or for the one model that has none a map discovered from its sizes."""
    if name != "Qwen/Qwen3-32B":
        return hookmap.load_map(name)
    from transformers import Qwen3Config

    sizes = {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}
    config = Qwen3Config(**sizes, num_key_value_heads=8, head_dim=128, vocab_size=151936)
    config.architectures = ["Qwen3ForCausalLM"]
    return hookmap.discover(config)


def bytes_per_token(m: ArchitectureMap, points: "list[str] | str", layers: "list[int] | str", d_mlp: int) -> int:
    """Of one row of all these tensors, in bf16."""
    chosen = m.selectors(points, layers)
    kept = [selector for selector in chosen if selector.point.partition(".")[0] not in ("pattern", "logits")]
    return estimate(m, kept, [1], 1, BF16, [[0]], d_mlp).bytes


def thirds(m: ArchitectureMap) -> list[int]:
    """Three layers: at a quarter, the middle and three quarters."""
    return [m.num_layers // 4, m.num_layers // 2, 3 * m.num_layers // 4]


def size(count: float) -> str:
    """Three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 999.5 or unit == "PB":
            break
        count /= 1000
    return f"{count:#.3g}".rstrip(".") + f" {unit}" if count < 999.5 else f"{count:,.0f} {unit}"


def print_sizes(maps: dict[str, ArchitectureMap]) -> None:
    print(
        "| model | d_model | layers | one residual tensor | 2 points x 3 layers | 2 points x all layers | all points |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, m in maps.items():
        wide = MODELS[name].d_mlp
        cells = [
            bytes_per_token(m, ["resid_mid"], [m.num_layers // 2], wide),
            bytes_per_token(m, POINTS, thirds(m), wide),
            bytes_per_token(m, POINTS, "all", wide),
            bytes_per_token(m, "all", "all", wide),
        ]
        print(f"| {MODELS[name].name} | {m.d_model} | {m.num_layers} | {' | '.join(map(size, cells))} |")


def print_rates(maps: dict[str, ArchitectureMap], layers: str) -> None:
    print("\n| model | run | tokens/s, 1 GPU | bytes/s, 1 GPU | 8 GPUs | 1,000 GPUs | a day of 1,000 |")
    print("|---|---|---|---|---|---|---|")
    for name, m in maps.items():
        each = bytes_per_token(m, POINTS, thirds(m) if layers == "thirds" else "all", MODELS[name].d_mlp)
        for run, tokens in (("reads", MODELS[name].reads), ("generates", MODELS[name].generates)):
            rate = tokens * each
            cells = [f"{tokens:,.0f}", *(size(rate * gpus) for gpus in (1, 8, 1000)), size(rate * 1000 * 86400)]
            print(f"| {MODELS[name].name} | {run} | {' | '.join(cells)} |")


def commits(folder: Path, group: int, tokens: int, groups: int = 100) -> float:
    """Groups per second that the store's own code makes durable in its two tables, the shards being written."""
    for name in (SAMPLES, SHARDS):
        (folder / name).touch()
    samples, shards, known = AppendedFile(folder / SAMPLES), AppendedFile(folder / SHARDS), Committed()
    ids, prompt, spans = tuple(range(10_000, 10_000 + tokens)), "abcd" * (tokens // 2), (Span(0, 0, 6, 0, 0, 1),)
    begun = time.perf_counter()
    for shard in range(groups):
        entries = [
            Entry(Sample(shard * group + n, prompt, prompt, ids, tokens // 2, rows=tokens - 1), spans)
            for n in range(group)
        ]
        shards.append(encode_shards([ShardInfo(shard, 2**24, "0" * 64)]))
        samples.append(encode_group(entries, shard + 1))
        known = scan(folder / SAMPLES, known)
    seconds = time.perf_counter() - begun
    samples.close()
    shards.close()
    return groups / seconds


def print_commits(folder: Path) -> None:
    print("\n| samples in a group | tokens in a sample | groups/s | samples/s | tokens/s |\n|---|---|---|---|---|")
    for group, tokens in ((1, 256), (8, 256), (64, 256), (8, 4096)):
        rates = []
        for _ in range(5):
            with tempfile.TemporaryDirectory(dir=folder) as made:
                rates.append(commits(Path(made), group, tokens))
        rate = statistics.median(rates)
        print(f"| {group} | {tokens} | {rate:,.0f} | {rate * group:,.0f} | {rate * group * tokens:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    if given.commits:
        print(describe())
        print_commits(given.commits)
        return
    maps = {name: map_of(name) for name in MODELS}
    print_sizes(maps)
    print("\n2 points x 3 layers:")
    print_rates(maps, "thirds")
    print("\n2 points x all layers:")
    print_rates(maps, "all")


if __name__ == "__main__":
    main()
