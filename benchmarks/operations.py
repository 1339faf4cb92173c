"""What operations cost: CPU time of generating with the attention scores of 3 and of all layers, over eager plain.

    python -m benchmarks.operations MODEL [ROUNDS]

They are run one after the other, again and again: medians of each run's ratio to the plain run of its round. `pattern`
is what a module hands over, `attn_scores` what an operation in it reads: between the two stands what operations cost.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import hookmap
from hookmap.loading.modules import eager

TOKENS = 24


def main(name: str, rounds: int = 7) -> None:
    """Print the medians as multiples of a plain `generate`."""
    hm = hookmap.open(name, dtype="float32")
    ids = torch.arange(5, 37)[None]
    count = hm.map.num_layers
    three = [0, count // 2, count - 1]
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "chat": False}

    def plain() -> None:
        with eager(hm.model):
            hm.model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)  # type: ignore[operator]

    def watched(point: str, layers: Any) -> Callable[[], Any]:
        return lambda: hm.capture(ids.tolist(), [point], layers, min_new_tokens=TOKENS, **settings)

    runs = {
        "plain": plain,
        "pattern, 3 layers": watched("pattern", three),
        "attn_scores, 3 layers": watched("attn_scores", three),
        "pattern, all layers": watched("pattern", "all"),
        "attn_scores, all layers": watched("attn_scores", "all"),
    }
    times: dict[str, list[float]] = {label: [] for label in runs}
    for label, run in (*runs.items(), *list(runs.items()) * rounds):
        start = time.process_time()
        run()
        times[label].append(time.process_time() - start)
    for label, values in times.items():
        ratios = [own / plain for own, plain in zip(values[1:], times["plain"][1:], strict=True)]
        print(f"{label}: {statistics.median(ratios):.3f} ({statistics.median(values[1:]):.2f} s)")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
