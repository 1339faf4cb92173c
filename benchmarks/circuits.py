"""Attribution to nodes and edges on a real model: what it costs, how true it is, and how faithful its circuits are.

    python benchmarks/circuits.py MODEL [--pairs N] [--rounds N] [--cost]

Pairs are made here: "When Mary and John went to the store, John gave a drink to", whose answer is the name that is
there once (IOI), and the same with the other name repeated. Half of them choose a circuit's edges (EAP and EAP-IG); the
other half say how faithful it is, as the circuit track of the benchmark MIB does: CPR and CMD. Costs are CPU time, over
that of a plain forward and backward pass over the same prompts, in turns; the median.
`--cost` measures these alone, in a minute or two.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import describe

import hookmap

NAMES = "Mary John Tom James Dan Sam Anna Kate Mark Paul Peter David Alice Jack Lisa Ben Lucy Adam Emma Sarah".split()
PLACES = ["store", "park", "school", "office", "station", "garden", "beach", "house"]
THINGS = ["drink", "book", "ring", "letter", "ball", "key", "flower", "map"]
TEXT = "When {} and {} went to the {}, {} gave a {} to"


def pairs(hm: Any, count: int) -> list[dict[str, str]]:
    """IOI pairs of equal length: names of one token each."""
    names = [name for name in NAMES if len(hm.tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) == 1]
    draw = random.Random(0)
    found = []
    while len(found) < count:
        one, other = draw.sample(names, 2)
        place, thing = draw.choice(PLACES), draw.choice(THINGS)
        sides = [TEXT.format(one, other, place, giver, thing) for giver in (other, one)]
        pair = {"clean": sides[0], "corrupted": sides[1], "answer": f" {one}", "wrong": f" {other}"}
        if len({len(hm.tokenizer(side)["input_ids"]) for side in sides}) == 1:
            found.append(pair)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cost", action="store_true", help="what nodes and edges cost, and no more")
    given = parser.parse_args()
    torch.set_num_threads(1)
    hm = hookmap.open(given.model, dtype="float32", device="cpu")
    found = pairs(hm, given.pairs)
    print(describe())
    cost(hm, found[: max(1, given.pairs // 2)], given.rounds)
    if given.cost:
        return
    faithful(hm, found[: given.pairs // 2], found[given.pairs // 2 :])


def cost(hm: Any, given: list[dict[str, str]], rounds: int) -> None:
    plain = _plain(hm, given)
    runs: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "nodes": lambda: hm.attribution_patch(given, check=4),
        "nodes, check=16": lambda: hm.attribution_patch(given),
        "edges": lambda: hm.edge_attribution(given, check=4),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in (*runs.items(), *list(runs.items()) * rounds):
        start = time.process_time()
        run()
        times[name].append(time.process_time() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"\n{len(given)} pairs, over a forward and backward pass ({medians['plain']:.2f} s):")
    for name, median in medians.items():
        print(f"  {name}: {median / medians['plain']:.2f}")


def _plain(hm: Any, given: list[dict[str, str]]) -> Callable[[], None]:
    """A forward and a backward pass over the corrupted prompts in one batch, the gradient of the embeddings."""
    rows = [hm.tokenizer(pair["corrupted"])["input_ids"] for pair in given]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(rows):
        ids[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
    last = [len(own) - 1 for own in rows]
    right, wrong = (
        [hm.tokenizer(pair[side], add_special_tokens=False)["input_ids"][0] for pair in given]
        for side in ("answer", "wrong")
    )

    def run() -> None:
        wanted = [parameter for parameter in hm.model.parameters() if parameter.requires_grad]
        for parameter in wanted:
            parameter.requires_grad_(False)
        embeds = hm.root.get_input_embeddings()(ids).requires_grad_()
        logits = hm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
        count = range(len(rows))
        torch.autograd.grad((logits[count, last, right] - logits[count, last, wrong]).sum(), [embeds])
        for parameter in wanted:
            parameter.requires_grad_(True)

    return run


def faithful(hm: Any, chosen: list[dict[str, str]], held: list[dict[str, str]]) -> None:
    nodes = hm.attribution_patch(chosen, check=64)
    print(f"\nnodes: {nodes.check!r}")
    for steps in (1, 5):
        edges = hm.edge_attribution(chosen, steps=steps, check=64)
        start = time.process_time()
        curve = hm.circuit_curve(held, edges)
        took = time.process_time() - start
        print(f"\n{'EAP' if steps == 1 else f'EAP-IG, {steps} steps'}: {edges!r}")
        print(f"  on {len(held)} other pairs: CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f} ({took:.0f} s)")
        print(f"  shares:   {', '.join(f'{share:.1%}' for share in curve.shares)}")
        for name, each in (("signed", curve.signed), ("absolute", curve.absolute)):
            print(f"  {name}: {', '.join(f'{float(value):.3f}' for value in each.values)}")
        clean, corrupted = float(curve.signed.clean.mean()), float(curve.signed.corrupted.mean())
        print(f"  logit difference {clean:.3f} clean, {corrupted:.3f} corrupted")


if __name__ == "__main__":
    main()
