"""Samples per second of a capture with 1 and 2 workers on Ray, beside the same capture in one process.

    python benchmarks/workers.py [--rounds 5] [--json FILE]

A random Qwen3 of 12 layers, d_model 256; 64 prompts of 32 tokens, 32 new tokens, batches of 8; `resid_mid` of all
layers to a folder. Every run is checked against the first, byte for byte. Runs are interleaved; medians are told.
Workers are started, and their models loaded, before the clock starts; one thread each, as the single process.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from machine import describe
from transformers import Qwen3Config, Qwen3ForCausalLM

import hookmap

RUN: dict[str, Any] = {"points": ["resid_mid"], "layers": "all", "max_new_tokens": 32, "batch_size": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(describe())
        found = measure(Path(folder), given.rounds)
    one = found["in this process"]
    for name, rate in found.items():
        print(f"{name:<18} {rate:6.2f} samples/s   {rate / one:5.2f} x")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Samples per second, the median of the rounds."""
    make(folder / "model")
    ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    prompts = torch.randint(0, 1000, (64, 32), generator=torch.Generator().manual_seed(0)).tolist()
    with (
        hookmap.open_on_ray(folder / "model", workers=2) as two,
        hookmap.open_on_ray(folder / "model", workers=1) as one,
    ):
        runners = {"in this process": hookmap.open(folder / "model"), "1 worker": one, "2 workers": two}
        expected = None
        for runner in runners.values():  # warms up, and waits until the models are loaded
            expected = expected or runner.capture(prompts, **RUN)
            same(runner.capture(prompts, **RUN), expected)
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for number in range(rounds):
            for name, runner in runners.items():
                start = time.perf_counter()
                runner.capture(prompts, **RUN, store=folder / f"{name} {number}")
                seconds[name].append(time.perf_counter() - start)
    return {name: len(prompts) / statistics.median(times) for name, times in seconds.items()}


def make(folder: Path) -> None:
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 768, "vocab_size": 1000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    config = Qwen3Config(**sizes, **heads, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def same(found: Any, expected: Any) -> None:
    """Raises AssertionError where a byte differs."""
    for sample in expected.samples:
        for point, layer in expected.keys:
            assert torch.equal(found.read(sample.sample, point, layer), expected.read(sample.sample, point, layer))


if __name__ == "__main__":
    main()
