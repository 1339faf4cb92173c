"""Samples per second of a capture on vLLM: one engine with all cores, and Ray's workers with a core each.

    .venv-vllm/bin/python benchmarks/vllm_workers.py MODEL [--prompts 64] [--tokens 64] [--dtype bfloat16] [--rounds 3]

The prompts of on_vllm.py; `resid_pre` and `resid_mid` of three layers, compiled, to a folder. All engines are started
and have run once before the clock starts. Runs take turns; medians are told, and in how many samples the tokens are
those of the one engine: in bfloat16, what shares a step with a prompt decides near ties.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe
from on_vllm import POINTS, prompts, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        for line in measured(given, Path(folder)):
            print(json.dumps(line), flush=True)


def measured(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A line for each way."""
    import torch

    import hookmap

    cores, asked = len(os.sched_getaffinity(0)), prompts(given.prompts)
    how: dict[str, Any] = {"taps": POINTS, **settings(given)}
    options: dict[str, Any] = {"max_new_tokens": given.tokens, "min_new_tokens": given.tokens}
    with contextlib.ExitStack() as ends:
        several = ends.enter_context(hookmap.open_on_ray(given.model, workers=cores, engine="vllm", **how))
        alone = ends.enter_context(hookmap.open_on_vllm(given.model, processes=False, **how))
        middle = alone.map.num_layers // 2
        options["layers"] = [middle - 2, middle, middle + 2]
        ways = {
            f"one engine, {torch.get_num_threads()} threads": alone,
            f"{cores} workers with vLLM, a thread each": several,
        }
        runs = {name: way.capture(asked, POINTS, **options) for name, way in ways.items()}  # warms up
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(given.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way.capture(asked, POINTS, store=folder / f"{name} {number}", **options)
                seconds[name].append(time.perf_counter() - start)
    expected = next(iter(runs.values())).tokens
    return [
        {
            "way": name,
            "samples/s": round(given.prompts / statistics.median(times), 2),
            "tokens/s": round(given.prompts * given.tokens / statistics.median(times)),
            "seconds": [round(each, 2) for each in times],
            "same tokens": sum(one == other for one, other in zip(runs[name].tokens, expected, strict=True)),
        }
        for name, times in seconds.items()
    ]


if __name__ == "__main__":
    main()
