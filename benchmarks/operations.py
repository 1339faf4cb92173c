"""What operations cost: generating with the attention scores of 3 and of all layers, over plain eager attention.

    python benchmarks/operations.py [--peer transformer_lens=PYTHON] [--peer interp_engine=PYTHON] [--rounds 7]

The narrow model of benchmarks/narrow.py, random weights, greedy, one process; the ways take turns, and each figure is
the median over the rounds of its processor time divided by plain `generate`'s in the same round, a peer's over a plain
one in its own environment. `pattern` is what a module hands over, `attn_scores` what an operation in it reads.
"""

import argparse
import statistics
import time

import torch
from capture import Peer
from machine import describe
from narrow import ALL, FEW, PROMPT, build, plain

import hookmap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = build("narrow", attention="eager")
    hm = hookmap.open(model)
    peers = {
        name: Peer(name, python, "narrow", given.new, "eager") for name, python in (p.split("=") for p in given.peer)
    }
    ratios: dict[str, list[float]] = {}
    for number in range(given.rounds + 1):
        begun = time.process_time()
        plain(model, given.new)
        base = time.process_time() - begun
        bases = {name: peer.run("plain") for name, peer in peers.items()}
        for point in ("pattern", "attn_scores"):
            for way, layers in (("few", FEW), ("all", ALL)):
                label = f"{point}, {'all' if way == 'all' else len(layers)} layers"
                begun = time.process_time()
                hm.capture([PROMPT], [point], layers, given.new)
                ratios.setdefault(f"hookmap | {label}", []).append((time.process_time() - begun) / base)
                for name, peer in peers.items():
                    ratios.setdefault(f"{name} | {label}", []).append(peer.run(f"{way} {point}") / bases[name])
        if not number:  # the first round warms up
            for figures in ratios.values():
                figures.clear()
    print(describe(), end="\n\n")
    print(f"narrow, {given.new} new tokens after {len(PROMPT)}; {given.rounds} rounds\n")
    print("| of | what | over plain generate |\n|---|---|---|")
    for name, found in ratios.items():
        print(f"| {name} | {statistics.median(found):.2f} |")


if __name__ == "__main__":
    main()
