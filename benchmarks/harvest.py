"""Tokens per second of a harvest beside the bare batched forward pass: `python benchmarks/harvest.py [narrow|full]`.

The bare pass runs the same batches, all layers and no head, and throws everything away. The harvests keep 3 layers x 2
points, or all layers x 2 points, in memory and on disk; their pass ends at the last layer that they need. One process;
the ways take turns; medians of ratios within a round.
"""

import argparse
import itertools
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from capture import POINTS
from machine import describe
from narrow import ALL, FEW, build

import hookmap
from hookmap.capture.batches import harvest_batches, padded
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.loading.prompts import Prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=("narrow", "full"), nargs="?", default="narrow")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = torch.bfloat16 if given.device.startswith("cuda") else torch.float32
    model = build(given.shape, dtype, given.device)
    hm = hookmap.open(model)
    draw = random.Random(0)
    texts = [[draw.randrange(3, 2000) for _ in range(draw.randrange(40, 250))] for _ in range(given.texts)]
    lengths = [len(ids) for ids in texts]
    folder, numbers = Path(tempfile.mkdtemp()), itertools.count()

    def bare() -> None:
        for batch in harvest_batches(lengths, given.batch_tokens):
            prompts = [Prompt("", tuple(texts[n])) for n in batch]
            layout = BatchLayout(batch, tuple(lengths[n] for n in batch), right=True)
            with torch.no_grad():
                model.model(**padded(prompts, layout, 0, torch.device(given.device)), use_cache=False)  # type: ignore[operator]

    def harvest(layers: list[int], disk: bool) -> None:
        store = folder / str(next(numbers)) if disk else None
        hm.capture(texts, POINTS, layers, 0, batch_tokens=given.batch_tokens, store=store)
        if store:
            shutil.rmtree(store)

    ways: dict[str, Callable[[], None]] = {
        "bare forward pass, all layers": bare,
        "harvest, 3 layers x 2 points, in memory": lambda: harvest(FEW, False),
        "harvest, 3 layers x 2 points, to disk": lambda: harvest(FEW, True),
        "harvest, all layers x 2 points, in memory": lambda: harvest(ALL, False),
        "harvest, all layers x 2 points, to disk": lambda: harvest(ALL, True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds + 1):
        for name, run in ways.items():
            begun = time.perf_counter()
            run()
            if given.device.startswith("cuda"):
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - begun)
    print(describe(), end="\n\n")
    print(f"{given.shape}: {given.texts} texts, {sum(lengths)} tokens, {given.batch_tokens} a batch\n")
    print("| way | tokens per second over the bare pass's | tokens per second |\n|---|---|---|")
    base = seconds["bare forward pass, all layers"]
    for name, found in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(found, base, strict=True))
        print(f"| {name} | {ratio:.2f} | {sum(lengths) / statistics.median(found):.0f} |")


if __name__ == "__main__":
    main()
