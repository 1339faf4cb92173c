"""Many at once, people who leave, memory that runs out, a stop in the middle: nothing is lost and nothing is wrong."""

import asyncio
import base64
import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import safetensors.torch
import torch
from support.plain_hooks import hooks_on
from support.ports import free_port
from support.served import MESSAGES, Served, demo, serving

import hookmap

pytestmark = pytest.mark.slow

WIDE = 400
"""tokens of a prompt that does not fit into memory here"""


def asked(number: int) -> dict[str, Any]:
    """One of the mixed requests: streamed or not, plain, kept in a session, or in the answer."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"{number} and {number + 1}?"}],
        "max_tokens": 4 + number % 3,
        "temperature": (0, 3.0)[number % 2],
        "stream": number % 4 < 2,
    }
    if number % 4:  # the others are plain and greedy, and may share batches
        body["seed"] = number
    if number % 4 in (1, 2):
        record = {"points": [("resid_pre", "mlp_out", "q")[number % 3]], "layers": [number % 20]}
        body["hookmap"] = {**record, "return": ("store", "inline")[number % 8 > 3]}
    return body


def expected(body: dict[str, Any]) -> Any:
    record = body.get("hookmap") or {"points": ["embed"], "layers": "all"}
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_k": 0, "top_p": 1.0}
    options = options if body["temperature"] else {}
    what: dict[str, Any] = {"points": record["points"], "layers": record["layers"]}
    return demo().capture(
        [body["messages"]], **what, max_new_tokens=body["max_tokens"], seed=body.get("seed"), **options
    )


async def send(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text, and what is said of the activations."""
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        found = answer.json()
        return found["choices"][0]["message"]["content"], found.get("activations_meta") or {}
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    return text, chunks[-1].get("activations_meta") or {}


async def leave(client: httpx.AsyncClient, served: Served, streams: bool) -> None:
    """Ask for a long answer and go away in its middle; of a stream, as soon as something comes."""
    body = {"messages": MESSAGES, "max_tokens": 900, "temperature": 5.0, "stream": streams, "store_activations": True}
    body["seed"] = 0  # with which 377 tokens come
    before = {session.id for session in served.sessions.all()}

    async def ask() -> None:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                return

    asking = asyncio.create_task(ask())
    if not streams:
        while {session.id for session in served.sessions.all()} == before and not asking.done():  # it does not run
            await asyncio.sleep(0.01)
        asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """A module of the model finds no memory for a long prompt, as on a GPU that is full."""

    def refuse(_: Any, args: Any) -> None:
        if args[0].shape[1] > WIDE:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (forced by a test)")

    hook = demo().model.get_submodule("model.layers.7.mlp").register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


async def mixed(served: Served, count: int, in_flight: int) -> dict[int, Any]:
    """So many requests, so many at once; every tenth leaves, one is too large. Returns what the others got."""
    gate, answers = asyncio.Semaphore(in_flight), {}
    limits = httpx.Limits(max_connections=in_flight)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        async with gate:
            if number == count // 2:
                body = {"messages": [{"role": "user", "content": "x" * 2 * WIDE}], "max_tokens": 2}
                answer = await client.post("/v1/chat/completions", json={**body, "store_activations": True})
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
            elif number % 10 == 7:
                await leave(client, served, streams=number % 20 == 7)
            else:
                answers[number] = await send(client, asked(number))

    async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(one(client, number) for number in range(count)))
    return answers


def check(served: Served, count: int, in_flight: int) -> None:
    """Every answer and every tensor of a mixed load is that of `capture`, and nothing else is left."""
    own = hooks_on(demo().model)
    with little_memory():
        answers = asyncio.run(mixed(served, count, in_flight))
        served.idle()
    ids = set()
    for number, (text, meta) in answers.items():
        body = asked(number)
        run = expected(body)
        assert text == run.texts[0], number
        assert bool(meta) == ("hookmap" in body)
        if not meta:
            continue
        if meta["return"] == "inline":
            held = safetensors.torch.load(base64.b64decode(meta["samples"][0]["safetensors"]))
            tensors = {name: held[name] for name in held}
        else:
            ids.add(meta["session_id"])
            store = hookmap.open_store(served.root / meta["session_id"])
            tensors = {f"{point}.{layer}": store.read(0, point, layer) for point, layer in store.keys}
        assert tensors and len(tensors) == len(run.keys)
        for point, layer in run.keys:
            # Beside others the last bits are others; rows of somebody else would be far away.
            torch.testing.assert_close(tensors[f"{point}.{layer}"], run.read(0, point, layer), atol=1e-3, rtol=1e-3)
    assert {session.id for session in served.sessions.all()} == ids, "who left leaves no session"
    assert hooks_on(demo().model) == own


def test_a_mixed_load_gives_everyone_what_is_theirs(served: Served) -> None:
    check(served, 40, 16)


@pytest.mark.skipif("HOOKMAP_LONG" not in os.environ, reason="minutes long: HOOKMAP_LONG=1 runs it")
def test_two_hundred_requests_and_memory_is_back_where_it_was(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        check(served, 60, 16)  # what is allocated once is
        for session in served.sessions.all():
            served.sessions.delete(session.id)
        gc.collect()
        before = psutil.Process().memory_info().rss
        check(served, 200, 16)
        gc.collect()
        grown = psutil.Process().memory_info().rss - before
        assert grown < 30e6, f"memory grew by {grown / 1e6:.1f} MB over 200 requests"


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
def test_who_leaves_ends_the_run(served: Served, streams: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
            await leave(client, served, streams)

    caplog.set_level(logging.INFO, "hookmap.server")
    before = {session.id for session in served.sessions.all()}
    asyncio.run(go())
    served.idle()
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("request ")]
    assert ": cancelled in" in line
    assert {session.id for session in served.sessions.all()} == before


def test_memory_that_runs_out_in_a_stream_is_told_and_the_next_request_runs(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hookmap.server")
    wide = [{"role": "user", "content": "x" * 2 * WIDE}]
    with little_memory():
        answer = served.chat(messages=wide, stream=True)
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert "out of memory" in answer.json()["error"]["message"]
        assert served.chat(max_tokens=2).status_code == 200
    served.idle()
    lines = [record.getMessage() for record in caplog.records]
    assert any(": out_of_memory in" in line for line in lines)
    (line,) = [line for line in lines if ": 2 tokens" in line]
    assert all(f"{name} " in line for name in ("before", "after", "peak"))


def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    free = threading.Event()
    hook = demo().model.register_forward_pre_hook(lambda *_: (free.wait(240), None)[1])
    try:
        with serving(tmp_path, queue=1) as served, ThreadPoolExecutor(2) as people:
            worker = served.models.all[0].scheduler
            waiting = []
            for state in ("running", "waiting"):
                waiting.append(people.submit(served.chat, max_tokens=1))
                end = time.monotonic() + 120
                while not getattr(worker, state):
                    assert time.monotonic() < end
                    time.sleep(0.01)
            third = served.chat(max_tokens=1)
            assert (third.status_code, third.json()["error"]["code"]) == (429, "queue_full")
            assert int(third.headers["retry-after"]) >= 1
            free.set()
            assert [each.result().status_code for each in waiting] == [200, 200]
    finally:
        free.set()
        hook.remove()


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
def test_who_still_waits_when_a_model_is_unloaded_is_told_so(tmp_path: Path, streams: bool) -> None:
    long = {"max_tokens": 900, "temperature": 5.0, "seed": 0, "stream": streams, "store_activations": True}
    with serving(tmp_path, admin_key="k", drain=0.1) as served, ThreadPoolExecutor(1) as people:
        served.headers = {"Authorization": "Bearer k"}
        waiting = people.submit(served.chat, **long)
        end = time.monotonic() + 120
        while not served.sessions.all():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert served.post("/models/unload", model="hookmap-demo").status_code == 200
        told = waiting.result()
        assert '"model_unloading"' in told.text and told.status_code in ((200, 503) if streams else (503,))
        assert served.sessions.all() == []


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM")
def test_sigterm_lets_the_running_answer_end(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "hookmap.cli", "serve", "--port", str(port), "--sessions", str(tmp_path / "s")]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log, cwd=tmp_path)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        body = {"messages": MESSAGES, "max_tokens": 60, "temperature": 5.0, "seed": 1, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=240) as answer:
            lines = []
            for line in answer.iter_lines():
                if not lines:
                    server.send_signal(signal.SIGTERM)
                lines.append(line)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(240) in (0, -signal.SIGTERM)
        assert "s; memory in MB: before" in (tmp_path / "log").read_text()
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
