"""100 requests at 16 in flight, of mixed lengths, over HTTP: `hookmap serve` beside `generate`'s best batch of 16.

    python benchmarks/server_load.py ~/.cache/hookmap/SmolLM2-135M-Instruct --dtype bfloat16

Printed are tokens per second of plain and of captured requests (3 layers x 2 points, stored) over those of `generate`
on 16 prompts of one length; the time to the first token of a short request, idle and beside one of 400 tokens; and how
many of 100 greedy answers differ from those that come alone. The ways take turns.
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
import torch
from machine import describe
from server import server
from transformers import AutoModelForCausalLM

SIZES = ((16, 16), (48, 32), (96, 64), (160, 48))
"""tokens of prompt and answer, in turn; their means are 80 and 40"""
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
    length = {"max_new_tokens": 40, "min_new_tokens": 40}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--more", nargs="*", default=[], help="further options of `hookmap serve`")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hookmap.cli", "serve", args.model, "--device", "cpu", "--dtype", args.dtype]
        command += ["--sessions", str(Path(folder) / "sessions"), *args.more]
        with server(*command) as (url, _), httpx.Client(base_url=url, timeout=3600) as client:
            load(client, 16)
            batch(model)
            for _ in range(args.rounds):
                ours, answers = load(client, args.requests)
                kept, _ = load(client, args.requests, hookmap=CAPTURED)
                figures = {"generate, 16 at once, tokens/s": batch(model), "plain, tokens/s": ours}
                figures["captured, tokens/s"] = kept
                figures["first token, idle, s"] = statistics.median(ask(client, SHORT, n)[0] for n in range(5))
                figures["first token, beside 400, s"] = beside(client)
                for name, value in figures.items():
                    found.setdefault(name, []).append(value)
                print(json.dumps(figures), file=sys.stderr, flush=True)
            alone = [ask(client, SIZES[n % len(SIZES)], n)[1] for n in range(args.requests)]
    middle = {name: statistics.median(values) for name, values in found.items()}
    generate, plain, kept, idle, late = middle.values()
    print(describe())
    print(json.dumps(middle, indent=2))
    print(f"plain over generate {plain / generate:.2f}; captured over plain {kept / plain:.2f}; "
          f"first token beside over idle {late / idle:.2f}")  # fmt: skip
    differ = sum(a != b for a, b in zip(alone, answers, strict=True))
    print(f"{differ} of {args.requests} greedy answers differ under load from those alone")


if __name__ == "__main__":
    main()
