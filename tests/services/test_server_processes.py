"""Servers as processes of their own: stopped, killed, started again, two on one folder, and a folder that shrinks."""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.ports import free_port
from support.served import MESSAGES

import hookmap

pytest.importorskip("fastapi", reason='pip install "hookmap[server]"')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals")]

RECORD = {"points": ["resid_mid"], "layers": [8]}
LONG = 400
"""tokens of an answer that still runs when others have begun, and a signal has come"""
FILES = 1024
"""that each server may have open: what systems give by default"""


@dataclass
class Started:
    """A running `hookmap serve`."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def post(self, **body: Any) -> httpx.Response:
        whole = {"messages": MESSAGES, "temperature": 0, "max_tokens": 3, **body}
        return httpx.post(f"{self.url}/v1/chat/completions", json=whole, timeout=240)

    def sessions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/v1/activations/sessions", timeout=60).json()["data"]
        return found


def command(root: Path, port: int) -> list[str]:
    own = [sys.executable, "-m", "hookmap.cli", "serve", "--device", "cpu", "--port", str(port)]
    return [*own, "--sessions", str(root)]


@contextlib.contextmanager
def started(root: Path, *more: str) -> Iterator[Started]:
    """A server on this folder of sessions, when it answers. `more`: options."""
    port = free_port()
    log = root.parent / f"log-{port}"
    limited = ["/bin/sh", "-c", f'ulimit -n {FILES}; exec "$@"', "sh"]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*limited, *command(root, port), *more], stdout=errors, stderr=errors, cwd=root.parent
        )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 240
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield Started(url, process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(60)


def stream(server: Started, number: int) -> tuple[bool, list[str]]:
    """A long recorded answer: whether it came to an end, and what came of it."""
    body = {"messages": MESSAGES, "max_tokens": LONG, "ignore_eos": True, "temperature": 5.0, "seed": number}
    body |= {"stream": True, "hookmap": RECORD}
    lines: list[str] = []
    try:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=240) as answer:
            lines += [line for line in answer.iter_lines() if line]
    except httpx.TransportError:
        return False, lines
    return True, lines


def until_running(server: Started, count: int) -> None:
    """Return when so many sessions are being written."""
    end = time.monotonic() + 120
    while sum(session["status"] == "running" for session in server.sessions()) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_was_finished_outlives_kill_9_and_sigterm_lets_all_that_runs_end(tmp_path: Path) -> None:
    root = tmp_path / "sessions"
    with started(root) as server, ThreadPoolExecutor(4) as people:
        kept = server.post(hookmap=RECORD, metadata={"of": "before"}).json()["session_id"]
        running = [people.submit(stream, server, number) for number in range(4)]
        until_running(server, 4)
        server.process.kill()
        assert not any(each.result()[0] for each in running)
    assert len(list(root.glob("act-*"))) > 1, "it was killed in the middle"
    with started(root, "--drain", "240") as server, ThreadPoolExecutor(4) as people:
        (session,) = server.sessions()
        assert (session["id"], session["status"], session["metadata"]) == (kept, "finished", {"of": "before"})
        assert [folder.name for folder in root.glob("act-*")] == [kept], "nothing is left of the others"
        answer = httpx.get(f"{server.url}/v1/activations/sessions/{kept}/tensors?point=resid_mid&layer=8", timeout=60)
        rows = hookmap.open_store(root / kept).read(0, "resid_mid", 8)
        assert answer.status_code == 200 and len(answer.content) >= rows.nbytes

        running = [people.submit(stream, server, number) for number in range(4)]
        until_running(server, 4)
        server.process.send_signal(signal.SIGTERM)
        answers = [each.result() for each in running]
        assert all(ended and lines[-1] == "data: [DONE]" for ended, lines in answers)
        assert server.process.wait(120) in (0, -signal.SIGTERM)
    for _, lines in answers:
        store = hookmap.open_store(root / json.loads(lines[-2][6:])["session_id"])
        (sample,) = store.samples
        assert len(store.read(0, "resid_mid", 8)) == len(sample.token_ids) - 1


def test_a_deterministic_server_gives_the_same_answer_to_the_last_bit_whatever_the_load(tmp_path: Path) -> None:
    asked = {"max_tokens": 30, "ignore_eos": True, "logprobs": True, "top_logprobs": 3}

    def ask(server: Started, number: int) -> Any:
        body = {"messages": [{"role": "user", "content": f"{number}+{number}? " * (number + 1)}], **asked}
        return server.post(**body).json()["choices"]

    with started(tmp_path / "sessions", "--deterministic") as server, ThreadPoolExecutor(6) as people:
        together = list(people.map(lambda number: ask(server, number), range(6)))
        assert together == [ask(server, number) for number in range(6)]
        assert "in a batch of" not in server.log.read_text()


def test_two_servers_a_folder_that_shrinks_and_1300_idle_sockets(tmp_path: Path) -> None:
    root = tmp_path / "sessions"
    with started(root) as server:
        second = subprocess.run(command(root, 0), capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert second.returncode == 1 and "--sessions" in second.stderr and "Traceback" not in second.stderr

        gone, cut, whole = (server.post(hookmap=RECORD).json()["session_id"] for _ in range(3))
        shutil.rmtree(root / gone)
        (shard,) = (root / cut).rglob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[:100])
        for id in (gone, cut):
            for path in ("", "/tensors?point=resid_mid&layer=8", "/archive"):
                answer = httpx.get(f"{server.url}/v1/activations/sessions/{id}{path}", timeout=60)
                if answer.status_code != 200:  # of one whose shard alone is broken the rest can be read
                    assert answer.status_code in (404, 500, 503) and answer.json()["error"]["code"], answer.text
                    assert str(root) not in answer.text
                assert (id, path) == (cut, "") or path == "/archive" or answer.status_code != 200
        answer = httpx.get(f"{server.url}/v1/activations/sessions/{whole}/tensors?point=resid_mid&layer=8", timeout=60)
        assert answer.status_code == 200
        assert httpx.delete(f"{server.url}/v1/activations/sessions/{gone}", timeout=60).status_code == 200
        assert server.post(hookmap=RECORD).status_code == 200
        shutil.rmtree(root)
        assert server.post().status_code == 200, "what keeps nothing needs no folder"
        assert server.post(hookmap=RECORD).status_code in (200, 500, 507), server.log.read_text()

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard < 4096:
            pytest.skip(f"this process may open {hard} files only")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
        host, _, port = server.url.removeprefix("http://").partition(":")
        since = time.monotonic()
        with contextlib.ExitStack() as held:
            held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            for _ in range(1300):
                held.enter_context(contextlib.closing(socket.create_connection((host, int(port)), timeout=30)))
            assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
            assert server.post().status_code == 200
        lines = server.log.read_text().splitlines()
        said = [line for line in lines if "no connection is accepted" in line]
        minutes = 1 + (time.monotonic() - since) / 60
        assert 1 <= len(said) <= 1 + minutes and len(lines) < 1000, "one line a minute where no file is left"


HELPERS = """
import sys, threading, time
from pathlib import Path
import psutil, torch
from support.served import NAME, serving
from hookmap.demo import MODEL_PATH
from hookmap.services.server.models import Models
from hookmap.services.server.settings import Settings

def helpers():
    return psutil.Process().num_threads() - threading.active_count()

root, before = Path(sys.argv[1]), helpers()
with serving(root, Models(Settings(root=root)).open(str(MODEL_PATH))) as served:
    long = {"prompt": "Tom has 3 apples. " * 40, "max_tokens": 3}
    edit = [{"do": "ablate", "point": "mlp_out", "layers": [2], "to": "mean"}]
    kept = [{"points": ["resid_mid"], "return": way} for way in ("store", "inline")]
    alone = {"points": ["pattern"], "layers": [3], "return": "inline"}
    for record in (None, *kept, alone, {"return": "none", "interventions": edit}):
        answer = served.post("/v1/completions", **long, **({"hookmap": record} if record else {}))
        assert answer.status_code == 200, answer.text
        if record and record["return"] == "store":
            tensor = answer.json()["activations_meta"]["tensors"][0]
            assert served.get(tensor["where"]).status_code == 200
    served.idle()
    end = time.monotonic() + 60
    while helpers() - before > 1 and time.monotonic() < end:  # a thread of OpenMP outlives its master by some moments
        time.sleep(0.05)
    print(helpers() - before, torch.get_num_threads())
"""


def test_one_thread_computes_all_others_end_with_what_they_computed(tmp_path: Path) -> None:
    """OpenMP's threads, those that Python does not know: more than there are cores wait for each other asleep."""
    own = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    found = subprocess.run(
        [sys.executable, "-c", HELPERS, tmp_path / "sessions"],
        env={**os.environ, **own, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    more, threads = map(int, found.stdout.split())
    assert threads == 2 and more == 1, "the helper of the thread of the batch, and no other"
