"""Processor time of statistics and examples beside a harvest of the same points: `benchmarks/reductions.py MODEL`.

The harvest keeps the rows of all layers in memory; that of the neurons hands them to nobody. One process; the ways
take turns; medians of ratios within a round, of processor time: what else runs on the machine counts less. `--memory`
tells instead the peak of a process that sums up so many tokens, and nothing else:
`benchmarks/reductions.py MODEL --memory 10000,100000,1000000`.
"""

import argparse
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from machine import describe

import hookmap
from hookmap.activations import Activation, Sample

Way = Callable[[list[list[int]]], object]


class Nobody:
    """Takes rows, and does nothing with them."""

    def write(self, activation: Activation) -> None: ...
    def finish(self, sample: Sample) -> None: ...
    def abandon(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", metavar="TEXT", default="", help="ways whose name has this text")
    parser.add_argument("--memory", metavar="TOKENS", help="peaks of memory for so many tokens, and no times")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        memory(given)
        return
    torch.set_num_threads(given.threads)
    hm = hookmap.open(given.model, dtype="float32")
    draw, words = random.Random(0), min(2000, hm.map.d_vocab or 2000)
    texts = [[draw.randrange(3, words) for _ in range(given.length)] for _ in range(given.texts)]
    batches = {"batch_tokens": given.batch_tokens}
    if given.peak:
        hm.reduce(texts, "resid_post", "all", ("mean", "variance", "max"), **batches)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return

    def harvest(some: list[list[int]]) -> None:
        hm.capture(some, "resid_post", "all", 0, **batches)

    def bare(some: list[list[int]]) -> None:
        hm.prepare(some, "mlp_post", "all", 0, **batches).into(Nobody())

    def reduced(*reductions: str) -> Way:
        return lambda some: hm.reduce(some, "resid_post", "all", reductions, **batches)

    ways: dict[str, tuple[Way, Way]] = {
        "mean, variance, max": (harvest, reduced("mean", "variance", "max")),
        "covariance": (harvest, reduced("covariance")),
        "examples of every neuron": (bare, lambda some: hm.examples(some, "mlp_post", "all", **batches)),
    }
    ways = {name: each for name, each in ways.items() if given.only in name}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds + 1):  # the first one warms up
        for name, (plain, own) in ways.items():
            some = texts if number else texts[: max(1, given.batch_tokens // given.length)]
            spent = [seconds(lambda run=run: run(some)) for run in (plain, own)]  # type: ignore[misc]  # noqa: B023
            if number:
                ratios[name].append(spent[1] / spent[0])
    print(describe())
    print(f"{given.model}, {given.texts} texts of {given.length} tokens, {given.threads} threads")
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.2f} x the harvest ({min(found):.2f} to {max(found):.2f})")


def memory(given: argparse.Namespace) -> None:
    """Each number of tokens in a process of its own."""
    print(describe())
    print(f"{given.model}, mean, variance and max of all layers, texts of {given.length} tokens")
    for tokens in map(int, given.memory.split(",")):
        size = ["--texts", str(max(1, tokens // given.length)), "--length", str(given.length)]
        more = ["--batch-tokens", str(given.batch_tokens), "--threads", str(given.threads), "--peak"]
        command = [sys.executable, __file__, given.model, *size, *more]
        begun = time.perf_counter()
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f"{tokens:,} tokens: peak {int(said) / 1e6:.0f} MB, {time.perf_counter() - begun:.0f} s")


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
