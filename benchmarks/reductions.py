"""Processor time of statistics and examples beside a harvest of the same points: `benchmarks/reductions.py MODEL`.

The harvest keeps the rows of all layers in memory. One process; the ways take turns; medians of ratios within a round,
of processor time: what else runs on the machine counts less.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from machine import describe

import hookmap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    hm = hookmap.open(given.model, dtype="float32")
    draw = random.Random(0)
    texts = [[draw.randrange(3, 2000) for _ in range(given.length)] for _ in range(given.texts)]
    batches = {"batch_tokens": given.batch_tokens}

    def harvest(point: str) -> None:
        hm.capture(texts, point, "all", 0, **batches)

    def reduced(*reductions: str) -> None:
        hm.reduce(texts, "resid_post", "all", reductions, **batches)

    def examples() -> None:
        hm.examples(texts, "mlp_post", "all", **batches)

    ways: dict[str, tuple[str, Callable[[], None]]] = {
        "mean, variance, max": ("resid_post", lambda: reduced("mean", "variance", "max")),
        "covariance": ("resid_post", lambda: reduced("covariance")),
        "examples of every neuron": ("mlp_post", examples),
    }
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds + 1):  # the first one warms up
        for name, (point, run) in ways.items():
            plain, own = seconds(lambda point=point: harvest(point)), seconds(run)  # type: ignore[misc]
            if number:
                ratios[name].append(own / plain)
    print(describe())
    print(f"{given.model}, {given.texts} texts of {given.length} tokens, {given.threads} threads")
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.2f} x the harvest ({min(found):.2f} to {max(found):.2f})")


def seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
