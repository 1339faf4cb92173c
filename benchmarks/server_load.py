"""100 requests at 16 in flight, of mixed lengths, over HTTP: `hookmap serve` beside `generate`'s best batch of 16.

    python benchmarks/server_load.py ~/.cache/hookmap/SmolLM2-135M-Instruct            load, some 4 minutes
    python benchmarks/server_load.py ~/.cache/hookmap/SmolLM2-135M-Instruct --alone    each alone, some 5 minutes

Load: tokens per second of plain and of captured requests (3 layers x 2 points, stored) over those of `generate` on 16
prompts of one length, and processor time for each token, which other work on the machine changes less; the time to the
first token of a short request, idle and beside one of 400 tokens. The ways take turns. Alone: how many of the greedy
answers differ from those of the same server one by one, and what one by one costs, as `--deterministic` runs them.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from machine import describe
from server import server
from transformers import AutoModelForCausalLM

SIZES = ((16, 16), (48, 32), (96, 64), (160, 48))
"""tokens of prompt and answer, in turn; their means are 80 and 40"""
NEW = 40
SHORT, LONG = (16, 4), (64, 400)
CAPTURED = {"points": ["resid_mid", "resid_post"], "layers": [8, 12, 16], "return": "store"}


def prompt(length: int, number: int) -> list[int]:
    """Token ids of no text in particular, other ones for each number."""
    return [100 + (number * 7919 + at * 31) % 20_000 for at in range(length)]


def ask(client: httpx.Client, size: tuple[int, int], number: int, **more: Any) -> tuple[float, list[int]]:
    """Seconds to the first token, and the tokens."""
    body = {"prompt": prompt(size[0], number), "max_tokens": size[1], "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True, **more}
    start, first, tokens = time.perf_counter(), 0.0, list[int]()
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                new = json.loads(line[6:])["choices"][0].get("token_ids") or []
                if new and not tokens:
                    first = time.perf_counter() - start
                tokens += new
    assert len(tokens) == size[1], len(tokens)
    return first, tokens


def load(client: httpx.Client, requests: int, **more: Any) -> tuple[float, list[list[int]]]:
    """Tokens per second, and the answers."""
    start = time.perf_counter()
    with ThreadPoolExecutor(16) as people:
        found = list(people.map(lambda n: ask(client, SIZES[n % len(SIZES)], n, **more)[1], range(requests)))
    return sum(map(len, found)) / (time.perf_counter() - start), found


def batch(model: Any, size: int = 16) -> float:
    """Tokens per second of `generate` on prompts of one length."""
    ids = torch.tensor([prompt(80, number) for number in range(size)])
    start = time.perf_counter()
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **length, do_sample=False)
    return size * (out.shape[1] - 80) / (time.perf_counter() - start)


def beside(client: httpx.Client) -> float:
    """Seconds to the first token of a short request beside a long one."""
    with ThreadPoolExecutor(1) as people:
        long = people.submit(ask, client, LONG, 10**6)
        time.sleep(2)
        found = ask(client, SHORT, 10**6 + 1)[0]
        assert not long.done()
        long.result()
    return found


def loaded(client: httpx.Client, process: psutil.Process, model: Any, requests: int) -> dict[str, float]:
    """One round."""
    found: dict[str, float] = {}
    here = psutil.Process()
    start = seconds(here)
    found["generate, 16 at once, tokens/s"] = batch(model)
    found["generate, processor ms/token"] = 1000 * (seconds(here) - start) / (16 * NEW)
    for name, more in (("plain", {}), ("captured", {"hookmap": CAPTURED})):
        start = seconds(process)
        found[f"{name}, tokens/s"], answers = load(client, requests, **more)
        found[f"{name}, processor ms/token"] = 1000 * (seconds(process) - start) / sum(map(len, answers))
    found["first token, idle, s"] = statistics.median(ask(client, SHORT, n)[0] for n in range(5))
    found["first token, beside 400, s"] = beside(client)
    return found


def alone(client: httpx.Client, requests: int) -> None:
    """Each request by itself, and then under load."""
    start = time.perf_counter()
    one_by_one = [ask(client, SIZES[n % len(SIZES)], n)[1] for n in range(requests)]
    slow = sum(map(len, one_by_one)) / (time.perf_counter() - start)
    fast, together = load(client, requests)
    print(f"one by one {slow:.1f} tokens/s, 16 in flight {fast:.1f}: {slow / fast:.2f} of it")
    answers = zip(one_by_one, together, strict=True)
    pairs = [zip(*each, strict=True) for each in answers if each[0] != each[1]]
    differ = [next(place for place, (a, b) in enumerate(pair) if a != b) for pair in pairs]
    print(f"{len(differ)} of {requests} greedy answers differ under load, from their token {sorted(differ)} on")


def seconds(process: psutil.Process) -> float:
    """Processor time so far, of all threads."""
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="compare with each alone, in place of the load's figures")
    parser.add_argument("--more", nargs="*", default=[], help="further options of `hookmap serve`")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hookmap.cli", "serve", args.model, "--device", "cpu", "--dtype", args.dtype]
        command += ["--sessions", str(Path(folder) / "sessions"), *args.more]
        with server(*command) as (url, process), httpx.Client(base_url=url, timeout=3600) as client:
            load(client, 16)
            print(describe())
            if args.alone:
                alone(client, args.requests)
                return
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
            batch(model)
            rounds = []
            for _ in range(args.rounds):
                rounds.append(loaded(client, process, model, args.requests))
                print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    middle = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    print(json.dumps(middle, indent=2))
    generate, of_generate, plain, of_plain, kept, of_kept, idle, late = middle.values()
    print(f"plain over generate {plain / generate:.2f}, by processor time {of_generate / of_plain:.2f}; captured over "
          f"plain {kept / plain:.2f}, by processor time {of_plain / of_kept:.2f}; first token beside over idle "
          f"{late / idle:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
