"""100 requests at 16 in flight, of mixed lengths, over HTTP: `hookmap serve` beside `generate`'s best batch of 16.

    python benchmarks/server_load.py ~/.cache/hookmap/SmolLM2-135M-Instruct            load, some 4 minutes
    python benchmarks/server_load.py ~/.cache/hookmap/SmolLM2-135M-Instruct --alone    beside --deterministic
    python benchmarks/server_load.py ~/.cache/hookmap/SmolLM2-135M-Instruct --requests 32 \\
        --peer "transformers serve {model} --dtype {dtype} --device cpu" \\
        "python -m vllm.entrypoints.openai.api_server --model {model} --dtype {dtype}" beside other servers

Load: tokens per second of plain and of captured requests (3 layers x 2 points, stored) over those of `generate` on 16
prompts of one length, and processor time for each token, which other work on the machine changes less; the time to the
first token of a short request, idle, beside one of 400 tokens, and beside eight callers with 4 MB each, once a second
and without a pause.
Alone: how many greedy answers under load differ from those of `--deterministic`, and what that costs; `--from 50`
asks the second half. Prompts are pieces of this repository's pages.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from machine import describe
from server import server
from transformers import AutoModelForCausalLM, AutoTokenizer

SIZES = ((16, 16), (48, 32), (96, 64), (160, 48))
"""tokens of prompt and answer, in turn; their means are 80 and 40"""
NEW = 40
SHORT, LONG = (16, 4), (64, 400)
CAPTURED = {"points": ["resid_mid", "resid_post"], "layers": [8, 12, 16], "return": "store"}
PAGES = Path(__file__).parents[1] / "docs"


class Prompts:
    """Pieces of the pages."""

    def __init__(self, model: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        text = "\n\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
        self._ids: list[int] = self._tokenizer(text)["input_ids"]

    def ids(self, length: int, number: int) -> list[int]:
        """So many tokens, other ones for each number."""
        start = number * 7919 % (len(self._ids) - length)
        return self._ids[start : start + length]

    def text(self, length: int, number: int) -> str:
        """The same as text."""
        found: str = self._tokenizer.decode(self.ids(length, number))
        return found


@dataclass
class Asked:
    """A server that is asked."""

    client: httpx.Client
    process: psutil.Process
    prompts: Prompts

    def ask(self, size: tuple[int, int], number: int, **more: Any) -> tuple[float, list[int]]:
        """Seconds to the first token, and the tokens."""
        body = {"prompt": self.prompts.ids(size[0], number), "max_tokens": size[1], "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "return_token_ids": True, **more}
        start, first, tokens = time.perf_counter(), 0.0, list[int]()
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    new = [id for choice in chunk["choices"] for id in choice.get("token_ids") or []]
                    if new and not tokens:
                        first = time.perf_counter() - start
                    tokens += new
        assert len(tokens) == size[1], len(tokens)
        return first, tokens

    def load(self, numbers: Sequence[int], **more: Any) -> tuple[float, float, list[list[int]]]:
        """Tokens per second, processor ms for each, and the answers."""
        with timed(self.process) as spent, ThreadPoolExecutor(16) as people:
            found = list(people.map(lambda n: self.ask(SIZES[n % len(SIZES)], n, **more)[1], numbers))
        count = sum(map(len, found))
        return count / spent[0], 1000 * spent[1] / count, found

    def first_token(self) -> float:
        """Seconds to that of a short request."""
        number = next(_others)
        return self.ask(SHORT, number)[0]

    def beside_long(self) -> float:
        """The same beside one of 400 tokens, which has begun."""
        with ThreadPoolExecutor(1) as people:
            long = people.submit(self.ask, LONG, next(_others))
            time.sleep(2)
            found = statistics.median(self.first_token() for _ in range(5))
            assert not long.done()
            long.result()
        return found

    def beside_megabytes(self, pause: float) -> float:
        """The same beside eight callers who send 4 MB each, so many seconds apart, from a process of their own."""
        given = str(self.client.base_url), 20.0, pause
        flood = multiprocessing.get_context("spawn").Process(target=_flood, args=given)
        flood.start()
        try:
            time.sleep(4)  # it imports first
            return statistics.median(self.first_token() for _ in range(15))
        finally:
            flood.kill()
            flood.join()


def _flood(url: str, seconds: float, pause: float) -> None:
    ends = time.perf_counter() + seconds
    body = json.dumps({"prompt": "x " * (2 * 10**6 - 1000), "max_tokens": 1}).encode()

    def send(_: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while time.perf_counter() < ends:
                answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
                assert answer.status_code == 400, answer.text
                time.sleep(pause)

    with ThreadPoolExecutor(8) as people:
        list(people.map(send, range(8)))


_others = itertools.count(10**6)
"""numbers of requests that are none of the load's"""


@contextmanager
def timed(process: psutil.Process) -> Iterator[list[float]]:
    """Filled at the end: seconds by the clock, and of the processor, of all threads."""
    found: list[float] = []
    start, before = time.perf_counter(), process.cpu_times()
    yield found
    after = process.cpu_times()
    found += [time.perf_counter() - start, after.user + after.system - before.user - before.system]


def batch(model: Any, prompts: Prompts, size: int = 16) -> tuple[float, float]:
    """Tokens per second of `generate` on prompts of one length, and processor ms for each."""
    ids = torch.tensor([prompts.ids(80, number) for number in range(size)])
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    with timed(psutil.Process()) as spent:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **length, do_sample=False)
    count = size * (out.shape[1] - 80)
    return count / spent[0], 1000 * spent[1] / count


def loaded(asked: Asked, model: Any, requests: int) -> dict[str, float]:
    """One round; each way before and after the others of its kind. Each figure is told as it is found."""
    ways: dict[str, Callable[[], tuple[float, ...]]] = {
        "generate, 16 at once": lambda: batch(model, asked.prompts),
        "plain": lambda: asked.load(range(requests))[:2],
        "captured": lambda: asked.load(range(requests), hookmap=CAPTURED)[:2],
        "captured again": lambda: asked.load(range(requests), hookmap=CAPTURED)[:2],
        "plain again": lambda: asked.load(range(requests))[:2],
        "generate again": lambda: batch(model, asked.prompts),
        "first token, idle": lambda: (statistics.median(asked.first_token() for _ in range(9)),),
        "first token, beside 400 tokens": lambda: (asked.beside_long(),),
        "first token, beside 8 x 4 MB": lambda: (asked.beside_megabytes(1.0),),
        "first token, beside 8 x 4 MB without a pause": lambda: (asked.beside_megabytes(0.0),),
    }
    found = dict[str, float]()
    for name, way in ways.items():
        told = way()
        units = ("s",) if len(told) == 1 else ("tokens/s", "processor ms/token")
        found |= {f"{name}, {unit}": value for unit, value in zip(units, told, strict=True)}
        print(name, *(f"{value:.3f}" for value in told), file=sys.stderr, flush=True)
    return found


def alone(together: Asked, by_itself: Asked, numbers: Sequence[int]) -> None:
    """The same load on both."""
    fast, cheap, answers = together.load(numbers)
    slow, dear, expected = by_itself.load(numbers)
    print(f"--deterministic {slow:.1f} tokens/s, in batches {fast:.1f}: {slow / fast:.2f} of it; processor ms/token "
          f"{dear:.1f} and {cheap:.1f}")  # fmt: skip
    again = [by_itself.ask(SIZES[n % len(SIZES)], n)[1] for n in numbers[:8]]
    assert again == expected[:8], "the same whatever the load"
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(answers, expected, strict=True) if a != b]
    differ = sorted(next(place for place, (a, b) in enumerate(pair) if a != b) for pair in pairs)
    print(f"{len(differ)} of {len(numbers)} greedy answers under load are others, from their token {differ} on")


def at_once(url: str, model: str, prompts: Prompts, requests: int) -> str:
    """What any OpenAI server is asked: texts, answers in one piece, and a stream for the first token."""
    with httpx.Client(base_url=url, timeout=3600) as client:

        def ask(size: tuple[int, int], number: int) -> int:
            body = {"model": model, "prompt": prompts.text(size[0], number), "max_tokens": size[1], "temperature": 0}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return int(answer.json()["usage"]["completion_tokens"])

        def first(size: tuple[int, int], number: int) -> float:
            body = {"model": model, "prompt": prompts.text(size[0], number), "max_tokens": size[1], "temperature": 0}
            start, found = time.perf_counter(), 0.0
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {") and json.loads(line[6:])["choices"][0].get("text"):
                        found = found or time.perf_counter() - start
            return found

        ask(SIZES[0], next(_others))
        start = time.perf_counter()
        with ThreadPoolExecutor(16) as people:
            tokens = sum(people.map(lambda n: ask(SIZES[n % len(SIZES)], n), range(requests)))
        speed = tokens / (time.perf_counter() - start)
        idle = statistics.median(first(SHORT, next(_others)) for _ in range(5))
        with ThreadPoolExecutor(1) as people:
            long = people.submit(ask, LONG, next(_others))
            time.sleep(2)
            late = first(SHORT, next(_others))
            long.result()
    return f"{speed:.1f} tokens/s ({tokens} tokens), first token idle {idle:.3f} s, beside 400 tokens {late:.3f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--from", dest="first", type=int, default=0, help="the number of the first request of --alone")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="compare with --deterministic, in place of the load")
    parser.add_argument("--peer", nargs="*", help="commands of other servers, with {model} and {dtype}")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    args.model = str(Path(args.model).expanduser())
    prompts = Prompts(args.model)
    own = f"{shlex.quote(sys.executable)} -m hookmap.cli serve {{model}} --device cpu --dtype {{dtype}}"
    print(describe())

    @contextmanager
    def served(command: str, *more: str) -> Iterator[tuple[str, psutil.Process]]:
        words = [word.format(model=args.model, dtype=args.dtype) for word in shlex.split(command)]
        with server(*words, *more) as found:
            yield found

    @contextmanager
    def hookmap(*more: str) -> Iterator[Asked]:
        with (
            tempfile.TemporaryDirectory() as folder,
            served(own, "--sessions", f"{folder}/sessions", *more) as (url, process),
            httpx.Client(base_url=url, timeout=3600) as client,
        ):
            yield Asked(client, process, prompts)

    if args.peer is not None:
        with tempfile.TemporaryDirectory() as folder:
            for command in (f"{own} --sessions {folder}/sessions", *args.peer):
                with served(command) as (url, _):
                    name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
                    name = name if "transformers" not in command else args.model
                    print(command, at_once(url, name, prompts, args.requests), sep="\n  ", flush=True)
    elif args.alone:
        numbers = range(args.first, args.first + args.requests)
        with hookmap() as together, hookmap("--deterministic") as by_itself:
            together.load(range(16))
            alone(together, by_itself, numbers)
    else:
        with hookmap() as asked:
            asked.load(range(16))
            asked.load(range(16), hookmap=CAPTURED)
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
            batch(model, prompts)
            rounds = []
            for _ in range(args.rounds):
                rounds.append(loaded(asked, model, args.requests))
        report({name: statistics.median(each[name] for each in rounds) for name in rounds[0]})


def report(middle: dict[str, float]) -> None:
    """What was asked, as ratios."""
    print(json.dumps({name: round(value, 4) for name, value in middle.items()}, indent=2))
    ways = ("generate, 16 at once", "generate again"), ("plain", "plain again"), ("captured", "captured again")
    units = "tokens/s", "processor ms/token"
    means = [statistics.fmean(middle[f"{name}, {unit}"] for name in names) for names in ways for unit in units]
    generate, of_generate, plain, of_plain, kept, of_kept = means
    idle, late, busy, full = (value for name, value in middle.items() if name.startswith("first token"))
    print(f"plain over generate {plain / generate:.2f}, by processor time {of_generate / of_plain:.2f}; captured over "
          f"plain {kept / plain:.2f}, by processor time {of_plain / of_kept:.2f}; first token over idle: beside "
          f"400 tokens {late / idle:.2f}, beside 8 x 4 MB {busy / idle:.2f}, and those without a pause "
          f"{full / idle:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
