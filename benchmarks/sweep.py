"""What a sweep of all heads costs beside the bare forward passes that it needs, and beside a loop of single runs.

    python benchmarks/sweep.py MODEL [--pairs N] [--rounds N]

Pairs of indirect object identification, made of the tokenizer's own names. Bare: the same prompts in the same batches,
without hooks, each pass computing the logits that the sweep reads. Both take turns in one process; the figure is
processor time of all threads. The loop writes single heads of single pairs by `hm.measure`, a few of them.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from time import process_time
from typing import Any

import torch

BATCH = 32
SINGLE = 10


def main(given: list[str]) -> None:
    import hookmap
    from hookmap.datasets.ioi import ioi_pairs

    model, *rest = given
    options = dict(zip(rest[::2], map(int, rest[1::2]), strict=True))
    hm = hookmap.open(model, device="cpu", dtype="float32")
    pairs = ioi_pairs(hm.tokenizer, options.get("--pairs", 50))
    hm.sweep(pairs[:2], point="z", over="heads", layers=[0])  # warms up: proofs, whether pads change anything
    ids = [list(prompt.token_ids) for prompt in hm.encode([pair.corrupted for pair in pairs])]
    heads = hm.proofs.of(hm.selectors("z", 0)[0]).row[0]
    batches = batches_of(ids * heads)
    print(f"{len(pairs)} pairs x {hm.map.num_layers * heads} heads, {sum(map(len, ids)) / len(ids):.1f} tokens each")
    ratios, swept, singles = [], [], []
    for _ in range(options.get("--rounds", 3)):
        bare = timed(lambda: [forward(hm.model, batch) for _ in range(hm.map.num_layers) for batch in batches])
        swept.append(timed(lambda: hm.sweep(pairs, point="z", over="heads", batch_size=BATCH)))
        ratios.append(swept[-1] / bare)
        singles.append(timed(lambda: one_by_one(hm, pairs)) / SINGLE)
        print(f"bare {bare:.1f} s, sweep {swept[-1]:.1f} s, {ratios[-1]:.3f}; a single run {singles[-1]:.3f} s")
    cells = len(pairs) * heads * hm.map.num_layers
    loop = statistics.median(singles) * cells / statistics.median(swept)
    print(f"median: {statistics.median(ratios):.3f} of the bare passes; single runs: {loop:.1f} times the sweep")


def batches_of(prompts: Sequence[list[int]]) -> list[list[list[int]]]:
    """As a harvest makes them: of about one length."""
    order = sorted(prompts, key=len)
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def forward(model: Any, batch: list[list[int]]) -> None:
    """Padded on the right; logits of the columns in which some text ends."""
    width = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
    ends = torch.tensor(sorted({len(row) - 1 for row in batch}))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=ends)


def one_by_one(hm: Any, pairs: Sequence[Any]) -> None:
    import hookmap

    for number in range(SINGLE):
        pair = pairs[number % len(pairs)]
        metric = hookmap.metrics.logit_difference(pair.answer, pair.wrong)
        patch = {"do": "patch", "point": "z", "layers": number, "heads": [number % 9], "source": {"prompt": pair.clean}}
        hm.measure(pair.corrupted, metric, [patch])


def timed(work: Callable[[], Any]) -> float:
    start = process_time()
    work()
    return process_time() - start


if __name__ == "__main__":
    main(sys.argv[1:])
