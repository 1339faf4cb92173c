"""Tries every part of a running server: health, load, structure, chat, capture, sessions, delete. Needs no package."""

import http.client
import json
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

_QUESTION = "Tom has 3 apples. He buys 4 more. How many apples does Tom have?"
_TOKENS = 8


class FailedError(Exception):
    """A step failed. `code`: of the server's error, where it sent one."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Step:
    """One line of the table."""

    name: str
    passed: bool
    detail: str
    seconds: float


@dataclass
class Smoke:
    """A client of one server."""

    url: str
    key: str | None = None
    model: str | None = None
    """the model to load and ask; None: the server's first one"""
    timeout: float = 120.0
    _session: str = ""
    _chats: bool = True
    """whether the model has a chat template; without one it completes texts"""
    _answer: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Iterator[Step]:
        """Run and yield every step, up to the first that fails."""
        steps: list[tuple[str, Callable[[], str]]] = [
            ("health", self._health),
            ("load", self._load),
            ("structure", self._structure),
            ("chat", self._chat),
            ("stream", self._stream),
            ("capture", self._capture),
            ("sessions", self._sessions),
            ("download", self._download),
            ("delete", self._delete),
        ]
        for name, step in steps:
            start = time.perf_counter()
            try:
                passed, detail = True, step()
            except (FailedError, LookupError, TypeError, ValueError, struct.error) as error:
                passed, detail = (
                    False,
                    str(error) if isinstance(error, FailedError) else f"unexpected answer: {error!r}",
                )
            yield Step(name, passed, detail, time.perf_counter() - start)
            if not passed:
                return

    def _health(self) -> str:
        found = self._json("GET", "/health")
        _expect(found["status"] == "ok", f"expected status ok, got {found['status']!r}")
        return f"hookmap {found['version']}, loaded: {', '.join(found['models']) or 'nothing'}"

    def _load(self) -> str:
        models = [model["id"] for model in self._json("GET", "/v1/models")["data"]]
        if self.model is None:
            _expect(bool(models), "no model is loaded: name one with --model")
            self.model = models[0]
        elif self.model not in models:
            self.model = self._json("POST", "/models/load", {"model": self.model})["id"]
        return str(self._json("GET", f"/v1/models/{quote(self.model)}")["id"])

    def _structure(self) -> str:
        found = self._json("GET", f"/v1/model/structure?model={quote(self.model or '')}")
        _expect("resid_post" in found["points"], "the model has no resid_post")
        return f"{found['map']['architecture']}, {found['layers']} layers, {len(found['points'])} points"

    def _chat(self) -> str:
        try:
            found = self._ask()
        except FailedError as error:
            if error.code != "TokenizerError":
                raise
            self._chats = False
            found = self._ask()
        choice = found["choices"][0]
        text = choice["message"]["content"] if self._chats else choice["text"]
        _expect(0 < found["usage"]["completion_tokens"] <= _TOKENS, f"unexpected usage: {found['usage']}")
        self._answer = {"text": text}
        return repr(text) if self._chats else f"{text!r}, completed: the model has no chat template"

    def _stream(self) -> str:
        lines = self._send("POST", *self._asked(stream=True))[0].decode().splitlines()
        chunks = [line.removeprefix("data: ") for line in lines if line]
        _expect(chunks[-1] == "[DONE]", f"the stream does not end with [DONE] but {chunks[-1][:200]!r}")
        choices = [choice for chunk in chunks[:-1] for choice in json.loads(chunk)["choices"]]
        pieces = (choice["delta"].get("content") if self._chats else choice["text"] for choice in choices)
        text = "".join(filter(None, pieces))
        _expect(text == self._answer["text"], f"streamed {text!r}, and in one piece {self._answer['text']!r}")
        return f"{len(chunks)} chunks, the same text"

    def _capture(self) -> str:
        recorded = {"points": ["resid_post"], "layers": [0, -1]}
        found = self._ask(hookmap=recorded)
        usage, meta = found["usage"], found["activations_meta"]
        self._session = found["session_id"]
        # The last generated token is never fed to the model, so it has no row.
        rows = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        shapes = [tensor["shape"] for tensor in meta["tensors"]]
        _expect(len(shapes) == 2, f"expected 2 tensors, got {len(shapes)}")
        _expect(all(shape[0] == rows for shape in shapes), f"expected {rows} rows in each tensor, got {shapes}")
        self._answer |= {"tensor": meta["tensors"][0], "rows": rows}
        return f"{rows} rows of 2 tensors, {usage['completion_tokens']} tokens generated"

    def _sessions(self) -> str:
        listed = self._json("GET", "/v1/activations/sessions")["data"]
        _expect(any(each["id"] == self._session for each in listed), "the session is not in the list")
        found = self._json("GET", f"/v1/activations/sessions/{self._session}")
        _expect(found["samples"][0]["rows"] == self._answer["rows"], "the session has another number of rows")
        return f"{len(listed)} sessions, this one {found['bytes']} bytes"

    def _download(self) -> str:
        tensor = self._answer["tensor"]
        data, _ = self._send("GET", tensor["where"])
        (size,) = struct.unpack("<Q", data[:8])
        ((name, held),) = ((k, v) for k, v in json.loads(data[8 : 8 + size]).items() if k != "__metadata__")
        _expect(held["shape"] == tensor["shape"], f"expected {tensor['shape']}, got {held['shape']}")
        part, status = self._send("GET", tensor["where"], headers={"Range": "bytes=0-7"})
        _expect(status == 206 and part == data[:8], f"a range of 8 bytes answers {status} with {len(part)} bytes")
        return f"{name} {held['dtype']} {held['shape']}, {len(data)} bytes"

    def _delete(self) -> str:
        self._json("DELETE", f"/v1/activations/sessions/{self._session}")
        left = self._json("GET", "/v1/activations/sessions")["data"]
        _expect(all(each["id"] != self._session for each in left), "the session is still in the list")
        return f"{len(left)} sessions left"

    def _ask(self, **more: Any) -> Any:
        return self._json("POST", *self._asked(**more))

    def _asked(self, **more: Any) -> tuple[str, dict[str, Any]]:
        """The path and the body of a request for text."""
        body = {"model": self.model, "max_tokens": _TOKENS, "temperature": 0, **more}
        if self._chats:
            return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": _QUESTION}]}
        return "/v1/completions", {**body, "prompt": _QUESTION}

    def _json(self, method: str, path: str, body: Any = None) -> Any:
        data, _ = self._send(method, path, body)
        try:
            return json.loads(data)
        except ValueError as error:
            raise FailedError(
                f"{method} {path} answers no JSON: {_line(data)}. Is {self.url} a hookmap server?"
            ) from error

    def _send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[bytes, int]:
        data = None if body is None else json.dumps(body).encode()
        told = {"Content-Type": "application/json", **(headers or {})}
        told |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        request = urllib.request.Request(self.url.rstrip("/") + path, data, told, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return answer.read(), answer.status
        except urllib.error.HTTPError as error:
            message, code = _told(error.read())
            hint = " Give its key with --key." if error.code == 401 else ""
            raise FailedError(f"{method} {path} answers {error.code}: {message}{hint}", code) from error
        except (OSError, http.client.HTTPException, UnicodeEncodeError) as error:
            raise FailedError(f"{method} {path}: no answer from {self.url}: {error}") from error


def _told(body: bytes) -> tuple[str, str | None]:
    """The message and the code of the server's error, or the first line of another body."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"]), error["code"]
    except (ValueError, KeyError, TypeError):
        return _line(body), None


def _line(body: bytes) -> str:
    return body.decode(errors="replace").strip().partition("\n")[0][:200] or "nothing"


def _expect(right: bool, wrong: str) -> None:
    if not right:
        raise FailedError(wrong)
