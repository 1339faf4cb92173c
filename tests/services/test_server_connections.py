"""Connections that send nothing, or slowly: they take no place from those that ask."""

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.raises import raises
from support.served import Served, demo, serving

from hookmap.services.server.encoding import LONG, Encoding
from hookmap.services.server.errors import ApiError
from hookmap.services.server.guard import Guard
from hookmap.services.server.settings import Settings

pytestmark = pytest.mark.slow


def connected(served: Served) -> socket.socket:
    host, _, port = served.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes; b"" where it closes in silence."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            found += piece
    return found


def test_half_a_request_is_told_that_it_came_too_late(tmp_path: Path) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(tmp_path, header_seconds=1.0, body_seconds=1.0) as served:
        for sent, missing in (
            (b"", b"headers"),
            (head, b"headers"),
            (head + b"Content-Length: 100\r\n\r\n{", b"body"),
            (head[:20], b"headers"),
        ):
            with contextlib.closing(connected(served)) as connection:
                if sent == head[:20]:  # the second request of a connection
                    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    first = b""
                    while b"}" not in first:
                        first += connection.recv(65536)
                    assert first.startswith(b"HTTP/1.1 200")
                start = time.monotonic()
                connection.sendall(sent)
                answer = received(connection)
            assert answer.startswith(b"HTTP/1.1 408 "), answer
            assert b"the " + missing + b" of the request did not come in time" in answer
            assert time.monotonic() - start < 20
            told = json.loads(answer.rpartition(b"\r\n\r\n")[2])
            assert told["error"]["code"] == "request_timeout"


def test_who_reads_slowly_or_thinks_between_two_requests_is_left_alone(tmp_path: Path) -> None:
    """The limits are of requests: a long answer, and a client that is asked for nothing, have their time."""
    with (
        serving(tmp_path, header_seconds=1.0, body_seconds=1.0) as served,
        contextlib.closing(connected(served)) as own,
    ):
        body = json.dumps({"prompt": "1+1=", "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0})
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        own.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        time.sleep(2.5)
        answer = received(own)
        assert answer.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in answer


def test_silent_connections_make_room_for_those_that_ask(tmp_path: Path) -> None:
    with serving(tmp_path, connections=20) as served, contextlib.ExitStack() as held:
        silent = [held.enter_context(contextlib.closing(connected(served))) for _ in range(130)]
        assert served.get("/health").status_code == 200
        assert served.chat(max_tokens=1).status_code == 200
        assert received(silent[0]) == b"", "the oldest silent one went"


def test_where_all_connections_are_busy_a_new_one_is_told_so(tmp_path: Path) -> None:
    free = threading.Event()
    hook = demo().model.register_forward_pre_hook(lambda *_: (free.wait(240), None)[1])
    try:
        with serving(tmp_path, connections=2) as served, ThreadPoolExecutor(2) as people:
            scheduler, end = served.models.all[0].scheduler, time.monotonic() + 120
            busy = [people.submit(served.chat, max_tokens=1) for _ in range(2)]
            while scheduler.running + scheduler.waiting < 2:
                assert time.monotonic() < end
                time.sleep(0.01)
            with contextlib.closing(connected(served)) as third:
                answer = received(third)
            assert answer.startswith(b"HTTP/1.1 503")
            assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["code"] == "busy"
            free.set()
            assert [each.result().status_code for each in busy] == [200, 200]
    finally:
        free.set()
        hook.remove()


def test_who_reads_nothing_holds_up_nobody(tmp_path: Path) -> None:
    """Clients ask for long streams and read none of them: what they would be sent waits, others are answered."""
    body = json.dumps({"prompt": "1+1=", "max_tokens": 300, "ignore_eos": True, "stream": True, "logprobs": 5})
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(tmp_path) as served, contextlib.ExitStack() as held:
        slow = [held.enter_context(contextlib.closing(connected(served))) for _ in range(3)]
        for each in slow:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert served.chat(max_tokens=4).status_code == 200
        served.idle()
        assert served.chat(max_tokens=4).status_code == 200
        answer = b""
        while b"data: [DONE]" not in answer:
            answer += slow[0].recv(65536)
        assert answer.count(b"data: {") > 300, "it was all there"


def test_long_prompts_of_many_leave_a_short_request_alone(tmp_path: Path) -> None:
    """Eight callers with 4 MB each: what can never fit is refused by its length, before anything is tokenized."""

    def short(served: Served) -> float:
        start = time.perf_counter()
        assert served.chat(max_tokens=4).status_code == 200
        return time.perf_counter() - start

    with serving(tmp_path) as served, ThreadPoolExecutor(8) as people:
        idle = min(short(served) for _ in range(3))
        long = "x " * (2 * 10**6 - 100)
        sent = [people.submit(served.post, "/v1/completions", prompt=long, max_tokens=1) for _ in range(8)]
        beside = min(short(served) for _ in range(3))
        answers = [each.result() for each in sent]
    assert {each.status_code for each in answers} == {400}
    assert {each.json()["error"]["code"] for each in answers} == {"context_length_exceeded"}
    assert beside < 2 * idle + 0.5, (idle, beside)


def test_what_can_never_fit_is_refused_before_it_is_read() -> None:
    tokenizer, read = demo().tokenizer, list[int]()
    most = 16 * max(map(len, tokenizer.get_vocab()))

    async def ask(characters: int) -> None:
        encoding = Encoding(tokenizer, 16)
        await encoding.run(characters, lambda _: read.append(characters), "prompt")

    asyncio.run(ask(most))
    with raises(ApiError, "16 tokens", f"at most {most} characters", f"your prompt has {most + 1}"):
        asyncio.run(ask(most + 1))
    assert read == [most]


def test_a_long_text_that_may_fit_is_read_beside_short_ones_by_another_tokenizer() -> None:
    encoding = Encoding(demo().tokenizer, None)
    begun, free, seen = threading.Event(), threading.Event(), list[Any]()

    def read(tokenizer: Any) -> None:
        begun.set()
        assert free.wait(60)
        seen.append(tokenizer)

    async def both() -> Any:
        long = asyncio.create_task(encoding.run(LONG, read, "prompt"))
        await asyncio.to_thread(begun.wait, 60)
        short = await asyncio.wait_for(encoding.run(LONG - 1, lambda tokenizer: tokenizer, "prompt"), 30)
        assert not long.done()
        free.set()
        await long
        return short

    try:
        short = asyncio.run(both())
    finally:
        free.set()
    assert seen != [short], "no tokenizer is used in two threads at once"


def test_others_are_served_between_large_bodies(tmp_path: Path) -> None:
    """Bodies of 1 MB that end at the same moment: each is parsed in one go, so a turn of the loop lies between two."""
    order = list[str]()

    async def parse(scope: Any, receive: Any, send: Any) -> None:
        assert len((await receive())["body"]) == 2**20
        order.append("parsed")

    async def body() -> Any:
        return {"type": "http.request", "body": bytes(2**20), "more_body": False}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    async def others() -> None:
        while order.count("parsed") < 6:
            order.append("other")
            await asyncio.sleep(0)

    async def all_at_once() -> None:
        guard = Guard(parse, Settings(root=tmp_path), lambda *_: None)
        scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": [(b"host", b"localhost")]}
        await asyncio.gather(*(guard({**scope}, body, send) for _ in range(6)), others())

    asyncio.run(all_at_once())
    assert "parsed parsed" not in " ".join(order)


def test_large_bodies_without_a_pause_take_a_tenth_of_the_loop(tmp_path: Path) -> None:
    """Six that each take 10 ms of the processor to parse."""
    begun = list[float]()

    async def parse(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        begun.append(time.perf_counter())
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass

    async def body() -> Any:
        return {"type": "http.request", "body": bytes(2**20), "more_body": False}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    async def all_at_once() -> None:
        guard = Guard(parse, Settings(root=tmp_path), lambda *_: None)
        scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": [(b"host", b"localhost")]}
        await asyncio.gather(*(guard({**scope}, body, send) for _ in range(6)))

    asyncio.run(all_at_once())
    assert min(later - earlier for earlier, later in itertools.pairwise(begun)) >= 0.1
