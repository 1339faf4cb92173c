"""200 requests, 16 in flight, mixed lengths, half captured: hookmap on vLLM, vLLM with taps, and vLLM alone.

    python benchmarks/vllm_server.py ~/.cache/hookmap/SmolLM2-135M-Instruct

Needs vLLM. Each server is a process of its own; they take turns, and each turn starts with the next one. Printed are
tokens per second of all requests and of plain ones alone, and the time to the first token of a short request: idle,
beside a long one that writes its answer, and beside one whose prompt is being read. Plain requests of a server with
taps must cost what those of vLLM alone do. `--piece N` starts all servers with steps of at most 2 N tokens
(max_num_batched_tokens), N of one prompt where there are others (long_prefill_token_threshold): a short request then
waits for a piece of a long one, and not for all of it. Each figure goes to stderr as it is found.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from machine import describe

POINTS = {"points": {"resid_mid": [8, 12, 16], "resid_post": [8, 12, 16]}}
TAPS = {"taps": POINTS["points"]}
LENGTHS = ((16, 16), (64, 32), (256, 32), (512, 64))
"""tokens of prompt and answer, in turn"""
SHORT, LONG = (16, 8), (1024, 64)
BESIDE = ("writing", "being read", "captured and writing", "captured and being read")
"""what a long request does while a short one waits for its first token"""


KINDS = ("hookmap", "taps", "vllm")


def prompt(length: int, number: int) -> list[int]:
    """Token ids that begin differently for each number below 20,000, so that no cache helps."""
    return [100 + (number * 7919 + at * 31) % 20_000 for at in range(length)]


@contextlib.contextmanager
def serving(kind: str, model: str, folder: Path, port: int, piece: int | None) -> Iterator[httpx.Client]:
    """A client of a running server of this kind.

    It is one for all requests, as that of OpenAI is: opening one takes 25 ms of the processor, for its certificates.
    """
    settings = {"max_model_len": 2048, "max_num_seqs": 16}
    if piece:
        settings |= {"max_num_batched_tokens": 2 * piece, "long_prefill_token_threshold": piece}
    common = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    taps = json.dumps({"hookmap": {**TAPS, "serving": {"sessions": str(folder / kind)}}})
    commands = {
        "hookmap": ["-m", "hookmap", "serve", model, "--engine=vllm", f"--sessions={folder / kind}",
                    f"--vllm=taps={json.dumps(POINTS['points'])}",
                    *(f"--vllm={name}={value}" for name, value in settings.items())],
        "taps": ["-m", "vllm.entrypoints.openai.api_server", "--model", model, *common, "--additional-config", taps],
        "vllm": ["-m", "vllm.entrypoints.openai.api_server", "--model", model, *common],
    }  # fmt: skip
    with open(folder / f"{kind}.log", "wb") as log:
        command = [sys.executable, *commands[kind], f"--port={port}"]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, (folder / f"{kind}.log").read_text()[-3000:]
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.5)
        limits = httpx.Limits(keepalive_expiry=2)  # before the servers end an idle connection, at 5 s
        with httpx.Client(base_url=url, timeout=600, limits=limits) as client:
            yield client
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def ask(
    client: httpx.Client, size: tuple[int, int], number: int, captured: bool, began: threading.Event | None = None
) -> tuple[int, float]:
    """Tokens that came, and seconds to the first of them. `began` is set when that has come."""
    body: dict[str, Any] = {"prompt": prompt(size[0], number), "max_tokens": size[1], "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}, **({"hookmap": POINTS} if captured else {})}
    start, first, tokens = time.perf_counter(), 0.0, 0
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                first = first or time.perf_counter() - start
                if began is not None:
                    began.set()
                tokens = (chunk.get("usage") or {}).get("completion_tokens") or tokens
    return tokens, first


def throughput(client: httpx.Client, requests: int, share: int, first: int) -> float:
    """Tokens per second of so many requests, 16 in flight. `share`: of two, how many are captured."""

    def one(n: int) -> int:
        return ask(client, LENGTHS[n % 4], first + n, (n // 4) % 2 < share)[0]

    start = time.perf_counter()
    with ThreadPoolExecutor(16) as together:
        tokens = sum(together.map(one, range(requests)))
    return tokens / (time.perf_counter() - start)


def first_token(client: httpx.Client, number: int, beside: str | None, moment: float) -> float:
    """Seconds to the first token of a short request, alone or beside a long one.

    `moment`: seconds that the long one has been writing, or read, when the short one is sent.
    """
    with ThreadPoolExecutor(1) as together:
        if beside is not None:
            began = threading.Event()
            long = together.submit(ask, client, LONG, number + 1, beside.startswith("captured"), began)
            if beside.endswith("writing"):
                began.wait(600)
            time.sleep(moment)
        found = ask(client, SHORT, number, False)[1]
        if beside is not None:
            long.result()
    return found


def figures_of(client: httpx.Client, kind: str, given: argparse.Namespace) -> dict[str, float]:
    """Of one server: tokens per second, and seconds to the first token."""
    figures = dict[str, float]()

    def note(name: str, value: float) -> None:
        figures[name] = value
        print(kind, name, value, file=sys.stderr, flush=True)

    throughput(client, 16, 0, 19_000)  # warm
    if given.requests:
        note("plain tokens/s", throughput(client, given.requests, 0, 0))
    if given.requests and kind != "vllm":
        note("half captured tokens/s", throughput(client, given.requests, 1, 10_000))
    fresh = count(15_000, 10)  # prompts that no cache has: one that is cached is not read
    moments = random.Random(0)  # a step runs then that is anywhere between its begin and its end
    times = {beside: list[float]() for beside in (None, *BESIDE[: 2 if kind == "vllm" else 4])}
    for _ in range(given.times):
        for beside, found in times.items():
            found.append(first_token(client, next(fresh), beside, moments.uniform(0.1, 0.2)))
    for beside, found in times.items() if given.times else ():
        name = "idle" if beside is None else f"beside a long one, {beside}"
        note(f"first token, {name}, s", statistics.median(found))
        if beside is not None:
            note(f"of idle, {beside}", statistics.median(found) / statistics.median(times[None]))
    return figures


def main() -> None:
    """Measure, and print one JSON document for each turn and one at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--times", type=int, default=9, help="first tokens of each kind, whose median counts")
    parser.add_argument("--piece", type=int, help="tokens of one prompt that a step reads at most")
    parser.add_argument("--only", choices=KINDS, action="append")
    given = parser.parse_args()
    print(json.dumps(describe()), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # the servers end, too
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.turns):
            for kind in given.only or (*KINDS[turn % 3 :], *KINDS[: turn % 3]):
                port = 8500 + turn * 3 + KINDS.index(kind)
                with serving(kind, given.model, Path(folder), port, given.piece) as client:
                    figures = figures_of(client, kind, given)
                for name, value in figures.items():
                    found.setdefault(f"{kind}: {name}", []).append(value)
                print(json.dumps({"turn": turn, "server": kind, "piece": given.piece, **figures}), flush=True)
    print(json.dumps({name: statistics.median(values) for name, values in found.items()}, indent=2))


if __name__ == "__main__":
    main()
