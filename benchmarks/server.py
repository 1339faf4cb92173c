"""What HTTP costs: time to the first token and tokens per second through `hookmap serve`, over `generate` itself.

    python benchmarks/server.py narrow       a 28-layer Qwen3 of width 256
    python benchmarks/server.py full         Qwen3-0.6B's own shape: 28 layers of width 1024, 151,936 tokens
    python benchmarks/server.py demo         the bundled model, whose forward pass takes some milliseconds

Each server is a process of its own, and the ways take turns. Processor time is that of the process that has the model,
all its threads: beside other work on the machine it says more than the clock does. `--peer /path/to/transformers` adds
`transformers serve`, which may live in an environment of its own. The random models say letters only, so that each
token is text at once.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from machine import describe
from narrow import build
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from hookmap.demo import MODEL_PATH

MESSAGES = [{"role": "user", "content": "Tom has 3 apples. He buys 4 more. How many apples does Tom have?"}]
POINTS = {"points": ["resid_pre", "resid_mid"], "return": "store"}


def saved(shape: str, folder: Path) -> Path:
    """A folder with the model and the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    if shape == "demo":
        model: Any = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    else:
        model = build(shape)
        letters = [tokenizer(chr(letter))["input_ids"][0] for letter in range(ord("a"), ord("z") + 1)]
        says = torch.zeros_like(model.lm_head.weight)
        says[letters] = torch.randn(len(letters), says.shape[1])  # the others have logit 0
        model.lm_head.weight, model.config.tie_word_embeddings = torch.nn.Parameter(says), False
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def server(*command: str) -> Iterator[tuple[str, psutil.Process]]:
    """Its URL and its process, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the server
    process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            if process.poll() is not None:
                log.seek(0)
                sys.exit(log.read().decode())
            time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


class First(StoppingCriteria):  # type: ignore[misc]
    """When the first token came."""

    at = 0.0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Ways:
    """Each returns (seconds to the first token, tokens, seconds)."""

    def __init__(self, folder: Path, new: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.folder, self.new = folder, new
        self.client = httpx.Client(timeout=600)

    def direct(self) -> tuple[float, int, float]:
        start, first = time.perf_counter(), First()
        options = {"return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        inputs = self.tokenizer.apply_chat_template(MESSAGES, **options)
        out = self.model.generate(**inputs, max_new_tokens=self.new, do_sample=False, stopping_criteria=[first])
        new = out[0, inputs["input_ids"].shape[1] :]
        self.tokenizer.decode(new)
        return first.at - start, len(new), time.perf_counter() - start

    def body(self, **more: Any) -> dict[str, Any]:
        return {"messages": MESSAGES, "temperature": 0, "max_tokens": self.new, **more}

    def whole(self, url: str, **more: Any) -> tuple[float, int, float]:
        start = time.perf_counter()
        answer = self.client.post(f"{url}/v1/chat/completions", json=self.body(**more))
        assert answer.status_code == 200, answer.text
        tokens = answer.json()["usage"]["completion_tokens"]
        return float("nan"), tokens, time.perf_counter() - start

    def streamed(self, url: str, **more: Any) -> tuple[float, int, float]:
        """The first token is there when the first text is."""
        start, first, tokens = time.perf_counter(), 0.0, 0
        with self.client.stream("POST", f"{url}/v1/chat/completions", json=self.body(stream=True, **more)) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    first = first or time.perf_counter() - start
                    tokens += 1
        return first, tokens, time.perf_counter() - start

    def eight(self, url: str, **more: Any) -> tuple[float, int, float]:
        """Eight people at once."""
        start = time.perf_counter()
        with ThreadPoolExecutor(8) as people:
            found = list(people.map(lambda _: self.streamed(url, **more), range(8)))
        return statistics.median(each[0] for each in found), sum(each[1] for each in found), time.perf_counter() - start


Way = tuple[psutil.Process, Callable[[], tuple[float, int, float]]]
Round = tuple[float, int, float, float]
"""seconds to the first token, tokens, seconds, seconds of the processor"""


def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[Round]]:
    for _, way in ways.values():
        way()  # warm
    found: dict[str, list[Round]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]:
            process, way = ways[name]
            before = process.cpu_times()
            told = way()
            after = process.cpu_times()
            found[name].append((*told, after.user + after.system - before.user - before.system))
    return found


def table(found: dict[str, list[Round]]) -> str:
    """Ratios are medians of each round's own."""

    def over(name: str, figure: Callable[[Round], float]) -> str:
        pairs = zip(found[name], found["generate"], strict=True)
        return f"{statistics.median(figure(each) / figure(own) for each, own in pairs):.2f}"

    lines = [
        "| way | first token, ms | over `generate` | tokens/s | over `generate` | processor time, over `generate` |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, rounds in found.items():
        first = statistics.median(each[0] for each in rounds)
        speed = statistics.median(each[1] / each[2] for each in rounds)
        told = ("", "") if first != first else (f"{first * 1e3:.1f}", over(name, lambda each: each[0]))
        figures = (*told, f"{speed:.1f}", over(name, lambda each: each[1] / each[2]))
        lines.append(f"| {' | '.join((name, *figures, over(name, lambda each: each[3] / each[1])))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=["demo", "narrow", "full"])
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--peer", metavar="FILE", help="the transformers program of an environment with its serving extra"
    )
    parser.add_argument("--only", nargs="*", default=[], help="ways that contain one of these words, and generate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as servers:
        folder = saved(args.shape, Path(temporary) / "model")
        command = [sys.executable, "-m", "hookmap.cli", "serve", str(folder), "--device", "cpu"]
        sessions = Path(temporary) / "sessions"
        url, served = servers.enter_context(server(*command, "--sessions", f"{sessions}-8", "--max-bytes", "1"))
        single, served_singly = servers.enter_context(server(*command, "--sessions", f"{sessions}-1", "--batch", "1"))
        run = Ways(folder, args.new)
        few, every = ({"hookmap": {**POINTS, "layers": layers}} for layers in ([8, 12, 16], "all"))
        ways: dict[str, Way] = {
            "generate": (psutil.Process(), run.direct),
            "hookmap, whole": (served, lambda: run.whole(url)),
            "hookmap, streamed": (served, lambda: run.streamed(url)),
            "hookmap, streamed, 3 layers x 2 points": (served, lambda: run.streamed(url, **few)),
            "hookmap, streamed, all layers x 2 points": (served, lambda: run.streamed(url, **every)),
            "hookmap, 8 at once": (served, lambda: run.eight(url)),
            "hookmap, 8 at once, --batch 1": (served_singly, lambda: run.eight(single)),
        }
        if args.peer:
            peer, process = servers.enter_context(server(args.peer, "serve", str(folder), "--device", "cpu"))
            ways["transformers serve, streamed"] = (process, lambda: run.streamed(peer, model=str(folder)))
        if args.only:
            ways = {n: w for n, w in ways.items() if n == "generate" or any(word in n for word in args.only)}
        load = os.getloadavg()[0]
        found = measure(ways, args.rounds)
    print(describe())
    print(f"{args.shape}: {args.new} tokens, median of {args.rounds} interleaved rounds; load before {load:.1f}\n")
    print(json.dumps(found), file=sys.stderr)
    print(table(found))


if __name__ == "__main__":
    main()
