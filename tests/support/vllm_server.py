"""Real servers on a port of this machine, in processes of their own: hookmap's on vLLM, and vLLM's with the plugin."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from support import on_vllm
from support.ports import free_port

SIZES = {**on_vllm.SETTINGS, **on_vllm.SCARCE}
MODEL = "tiny"


@dataclass
class Server:
    """A running server."""

    url: str
    process: "subprocess.Popen[bytes]"
    sessions: Path
    hookmaps: bool
    """whether it is hookmap's own"""
    headers: dict[str, str] = field(default_factory=dict)

    def post(self, path: str, headers: Mapping[str, str] | None = None, **body: Any) -> httpx.Response:
        given = {"model": MODEL, "temperature": 0, **body}
        return httpx.post(self.url + path, json=given, headers={**self.headers, **(headers or {})}, timeout=300)

    def complete(self, prompt: list[int], **more: Any) -> httpx.Response:
        if not self.hookmaps:
            more["return_token_ids"] = True
        return self.post("/v1/completions", prompt=prompt, **{"max_tokens": 12, **more})

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, which must end with [DONE]."""
        given = {"model": MODEL, "temperature": 0, "stream": True, **body}
        with httpx.stream("POST", self.url + path, json=given, headers=self.headers, timeout=300) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@contextlib.contextmanager
def hookmaps(checkpoint: Path, folder: Path, key: str, *more: str) -> Iterator[Server]:
    """`hookmap serve --engine vllm`. `more`: further options."""
    given = [f"--vllm={name}={json.dumps(value)}" for name, value in SIZES.items() if name != "dtype"]
    given += ["--dtype=float32", f"--sessions={folder}", f"--served-model-name={MODEL}", f"--key={key}", "--drain=5"]
    command = ["-m", "hookmap", "serve", str(checkpoint), "--engine=vllm", "--eager", *given, *more]
    with _running(command, folder, True, {"Authorization": f"Bearer {key}"}) as server:
        yield server


@contextlib.contextmanager
def vllms(checkpoint: Path, folder: Path, hookmap: dict[str, Any] | None, *more: str) -> Iterator[Server]:
    """vLLM's own server. `hookmap`: its `additional_config` for the plugin; None: not switched on."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items() if name != "enable_prefix_caching"]
    own = [f"--served-model-name={MODEL}", "--enforce-eager", "--enable-prefix-caching"]
    if hookmap is not None:
        own.append(f"--additional-config={json.dumps({'hookmap': hookmap})}")
    command = ["-m", "vllm.entrypoints.openai.api_server", f"--model={checkpoint}", *given, *own, *more]
    with _running(command, folder, False, {}) as server:
        yield server


@contextlib.contextmanager
def _running(command: list[str], folder: Path, own: bool, headers: dict[str, str]) -> Iterator[Server]:
    port, log = free_port(), folder.with_suffix(".log")
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    own_environment = {**os.environ, "PYTHONPATH": paths, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as said:
        process = subprocess.Popen(
            [sys.executable, *command, f"--port={port}"], stdout=said, stderr=said, stdin=subprocess.DEVNULL,
            env=own_environment, start_new_session=True,
        )  # fmt: skip
    server = Server(f"http://127.0.0.1:{port}", process, folder, own, headers)
    try:
        _wait(server, log)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # what is left of its group: the engine and its workers
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def _wait(server: Server, log: Path) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        assert server.process.poll() is None, log.read_text(errors="replace")[-4000:]
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"the server does not start: {log.read_text(errors='replace')[-4000:]}")
