"""hookmap on vLLM beside vLLM's plain generation and beside hookmap's own engine: tokens per second of one machine.

    .venv-vllm/bin/python benchmarks/on_vllm.py MODEL [--prompts 64] [--tokens 64] [--dtype bfloat16] [--rounds 3]

One process per measurement, since vLLM keeps its settings for a whole process; the rounds take turns, and the best of
each counts. vLLM's engine runs in the measured process, so that its processor time is known too: on a machine that is
busy with other things, it says more. Prints JSON, one line for each: what ran, its tokens per second, and its speed as
a share of vLLM's plain generation, by the clock and by processor time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MEASURED = ("plain vllm", "idle taps", "3 layers x 2 points", "all layers x 2 points to disk", "hooks engine")
POINTS = ["resid_pre", "resid_mid"]


def prompts(count: int) -> list[list[int]]:
    """Token ids of 40 to 120 tokens."""
    import random

    draw = random.Random(0)
    return [[draw.randrange(100, 10_000) for _ in range(draw.randrange(40, 121))] for _ in range(count)]


def on_vllm(what: str, given: argparse.Namespace) -> list[float]:
    """Seconds of a run on vLLM, compiled; the first run warms up."""
    import hookmap

    asked = prompts(given.prompts)
    if what == "plain vllm":
        from vllm import LLM, SamplingParams

        llm = LLM(given.model, dtype=given.dtype, max_model_len=512, max_num_seqs=given.prompts)
        parameters = SamplingParams(temperature=0.0, max_tokens=given.tokens, ignore_eos=True, detokenize=False)
        ids: Any = [{"prompt_token_ids": each} for each in asked]

        def run() -> None:
            llm.generate(ids, parameters, use_tqdm=False)

        return best(run)
    with hookmap.open_on_vllm(
        given.model, dtype=given.dtype, max_model_len=512, max_num_seqs=given.prompts, taps=POINTS
    ) as model:
        middle = model.map.num_layers // 2
        options: dict[str, Any] = {"max_new_tokens": given.tokens, "min_new_tokens": given.tokens}
        if what == "idle taps":
            return best(lambda: model.generate(asked, **options))
        if what == "3 layers x 2 points":
            return best(lambda: model.capture(asked, POINTS, [middle - 2, middle, middle + 2], **options))
        with tempfile.TemporaryDirectory() as folder:
            numbers = iter(range(100))
            return best(lambda: model.capture(asked, POINTS, store=Path(folder) / str(next(numbers)), **options))


def on_hooks(given: argparse.Namespace) -> list[float]:
    """Seconds of the same capture by hookmap's own engine, in its best batch."""
    import hookmap

    model = hookmap.open(given.model, dtype=given.dtype, check=False)
    middle, asked = model.map.num_layers // 2, prompts(given.prompts)
    layers = [middle - 2, middle, middle + 2]
    sizes = [size for size in (16, 32, 64) if size <= given.prompts] or [given.prompts]

    def run(size: int) -> None:
        model.capture(asked, POINTS, layers, max_new_tokens=given.tokens, min_new_tokens=given.tokens, batch_size=size)

    return min(best(lambda size=size: run(size), times=1) for size in sizes)  # type: ignore[misc]


def best(run: Any, times: int = 2) -> list[float]:
    """The shortest of so many runs, after one that warms up: seconds by the clock, and of processor time."""
    run()
    found = []
    for _ in range(times):
        clock, processor = time.perf_counter(), time.process_time()
        run()
        found.append((time.perf_counter() - clock, time.process_time() - processor))
    return [min(each) for each in zip(*found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=MEASURED, action="append")
    parser.add_argument("--one", choices=MEASURED, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if given.one:
        seconds = on_hooks(given) if given.one == "hooks engine" else on_vllm(given.one, given)
        print(json.dumps({"seconds": seconds}), flush=True)
        os._exit(0)  # vLLM's threads may hold the process
    fastest: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for what in given.only or MEASURED:
            made = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", what], stdout=subprocess.PIPE, check=True
            )
            seconds = json.loads(made.stdout.splitlines()[-1])["seconds"]
            fastest[what] = [min(each) for each in zip(seconds, fastest.get(what, seconds), strict=True)]
    plain = fastest.get("plain vllm")
    for what, (clock, processor) in fastest.items():
        speed = round(given.prompts * given.tokens / clock, 1)
        shares = None if plain is None else [round(plain[0] / clock, 3), round(plain[1] / processor, 3)]
        print(json.dumps({"what": what, "tokens_per_second": speed, "of_plain_vllm": shares}))


if __name__ == "__main__":
    main()
