"""What operations cost: CPU time of generating with the softmax of 3 and of all layers watched, over eager plain.

    python -m benchmarks.operations MODEL [ROUNDS]

The three are run one after the other, again and again; the medians are compared, so that a busy machine tells little.
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
PLACE = "model.layers.{i}.self_attn:_softmax.input"


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
        "operation, 3 layers": watched(PLACE, three),
        "pattern, all layers": watched("pattern", "all"),
        "operation, all layers": watched(PLACE, "all"),
    }
    times: dict[str, list[float]] = {label: [] for label in runs}
    for label, run in (*runs.items(), *list(runs.items()) * rounds):
        start = time.process_time()
        run()
        times[label].append(time.process_time() - start)
    medians = {label: statistics.median(values[1:]) for label, values in times.items()}
    for label, median in medians.items():
        print(f"{label}: {median / medians['plain']:.2f} ({median:.2f} s)")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
