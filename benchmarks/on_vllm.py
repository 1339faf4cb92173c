"""hookmap on vLLM beside vLLM's plain generation and beside hookmap's own engine: tokens per second of one machine.

    .venv-vllm/bin/python benchmarks/on_vllm.py MODEL [--prompts 64] [--tokens 64] [--dtype bfloat16] [--rounds 3]
    .venv-vllm/bin/python benchmarks/on_vllm.py full     # Qwen3-0.6B's own shape, random weights; "narrow": a small one

One process per engine, since vLLM keeps its settings for a whole process; the rounds take turns, and so do the runs of
one process; the best of each counts. vLLM's engine runs in the measured process, so that its processor time is known
too: on a machine that is busy with other things, it says more. Prints JSON, one line for each: what ran, its tokens per
second, and its speed as a share of vLLM's plain generation, by the clock and by processor time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from narrow import SHAPES

ENGINES = ("plain vllm", "hookmap on vllm", "hooks engine")
POINTS = ["resid_pre", "resid_mid"]
Runs = dict[str, Callable[[], Any]]


def prompts(count: int) -> list[list[int]]:
    """Token ids of 40 to 120 tokens."""
    import random

    draw = random.Random(0)
    return [[draw.randrange(100, 2_000) for _ in range(draw.randrange(40, 121))] for _ in range(count)]


def plain_vllm(given: argparse.Namespace) -> Runs:
    from vllm import LLM, SamplingParams

    llm = LLM(given.model, **settings(given))
    parameters = SamplingParams(temperature=0.0, max_tokens=given.tokens, ignore_eos=True, detokenize=False)
    ids: Any = [{"prompt_token_ids": each} for each in prompts(given.prompts)]
    return {"plain vllm": lambda: llm.generate(ids, parameters, use_tqdm=False)}


def hookmap_on_vllm(given: argparse.Namespace) -> Runs:
    """Nothing captured, three layers in memory, all of them in memory and into a folder."""
    import hookmap

    model = hookmap.open_on_vllm(given.model, taps=POINTS, **settings(given))
    asked, middle, numbers = prompts(given.prompts), model.map.num_layers // 2, iter(range(1000))
    options: dict[str, Any] = {"max_new_tokens": given.tokens, "min_new_tokens": given.tokens}
    return {
        "idle taps": lambda: model.generate(asked, **options),
        "3 layers x 2 points": lambda: model.capture(asked, POINTS, [middle - 2, middle, middle + 2], **options),
        "all layers x 2 points": lambda: model.capture(asked, POINTS, **options),
        "all layers x 2 points to disk": lambda: model.capture(
            asked, POINTS, store=Path(given.folder) / str(next(numbers)), **options
        ),
    }


def hooks_engine(given: argparse.Namespace) -> Runs:
    """The same capture of three layers by hookmap's own engine, in batches of several sizes."""
    import hookmap

    model = hookmap.open(given.model, dtype=given.dtype, check=False)
    middle, asked = model.map.num_layers // 2, prompts(given.prompts)
    layers = [middle - 2, middle, middle + 2]
    options: dict[str, Any] = {"max_new_tokens": given.tokens, "min_new_tokens": given.tokens}

    def run(size: int) -> None:
        model.capture(asked, POINTS, layers, batch_size=size, **options)

    return {f"hooks engine, batches of {size}": partial(run, size) for size in (16, 32, 64) if size <= len(asked)}


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """vLLM's, the same for both."""
    has_none = not any(Path(given.model).glob("tokenizer*"))
    return {
        "dtype": given.dtype,
        "max_model_len": 512,
        "max_num_seqs": given.prompts,
        "skip_tokenizer_init": Path(given.model).is_dir() and has_none,
    }


def best(runs: Runs, times: int, warm: int) -> dict[str, list[float]]:
    """Of each, the shortest of so many turns, after those that warm up: seconds by the clock, and of processor time."""
    found: dict[str, list[tuple[float, float]]] = {}
    for turn in range(warm + times):
        for name, run in runs.items():
            clock, processor = time.perf_counter(), time.process_time()
            run()
            if turn >= warm:
                found.setdefault(name, []).append((time.perf_counter() - clock, time.process_time() - processor))
    return {name: [min(each) for each in zip(*seconds, strict=True)] for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a hub id, a folder, or one of random weights: {', '.join(SHAPES)}")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=2, help="turns of the runs in each round")
    parser.add_argument("--only", choices=ENGINES, action="append")
    parser.add_argument("--one", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if given.one:
        made = {"plain vllm": plain_vllm, "hookmap on vllm": hookmap_on_vllm, "hooks engine": hooks_engine}[given.one]
        warm = 0 if given.one == "hooks engine" else 1  # it compiles nothing
        print(json.dumps(best(made(given), given.times if warm else 1, warm)), flush=True)
        os._exit(0)  # vLLM's threads may hold the process
    fastest: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if given.model in SHAPES:
            sys.argv[sys.argv.index(given.model)] = random_weights(given.model, Path(folder) / given.model)
        for _ in range(given.rounds):
            for engine in given.only or ENGINES:
                command = [sys.executable, __file__, *sys.argv[1:], "--one", engine, "--folder", f"{folder}/stores"]
                said = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
                for what, seconds in json.loads(said.splitlines()[-1]).items():
                    fastest[what] = [min(each) for each in zip(seconds, fastest.get(what, seconds), strict=True)]
                shutil.rmtree(f"{folder}/stores", ignore_errors=True)
    plain = fastest.get("plain vllm")
    for what, (clock, processor) in fastest.items():
        speed = round(given.prompts * given.tokens / clock, 1)
        shares = None if plain is None else [round(plain[0] / clock, 3), round(plain[1] / processor, 3)]
        print(json.dumps({"what": what, "tokens_per_second": speed, "of_plain_vllm": shares}))


def random_weights(shape: str, folder: Path) -> str:
    """A checkpoint of this shape; returns its folder."""
    import torch
    from narrow import build

    build(shape, torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    return str(folder)


if __name__ == "__main__":
    main()
