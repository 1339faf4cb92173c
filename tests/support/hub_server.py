"""A hub on this machine: the few calls that huggingface_hub makes to put files into a repository and to get them.

It is no mock of the client: huggingface_hub talks to it over HTTP, in a process whose HF_ENDPOINT is its address.
Written from the client's requests; the real hub was not asked. Like that one it takes .safetensors by Git LFS.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What it holds and was asked."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """repository, `datasets/` in front of one of data -> path in it -> content"""
    large: dict[str, bytes] = field(default_factory=dict)
    """SHA-256 -> content, of what came by Git LFS"""
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    refuses: bool = False
    """whether writing is forbidden"""
    lists_also: tuple[str, ...] = ()
    """paths that it claims to hold: what a hostile server might say"""

    def commit(self, repo: str) -> str:
        held = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.files[repo].items())
        return hashlib.sha1(repr(held).encode()).hexdigest()


@contextmanager
def hub_on_this_machine() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def say(self, found: Any, status: int = 200) -> None:
            self.answer(status, json.dumps(found).encode(), Content_Type="application/json")

        def asked_for(self) -> str:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            hub.tokens |= {self.headers.get("Authorization") or ""}
            return path

        def do_POST(self) -> None:
            path, body = self.asked_for(), self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if hub.refuses:
                self.say({"error": "You don't have the rights"}, 403)
            elif path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                repo = f"datasets/{repo}" if asked.get("type") == "dataset" else repo
                hub.files.setdefault(repo, {})
                self.say({"url": f"{hub.address}/{repo}"})
            elif path == "/api/validate-yaml":
                self.say({"errors": [], "warnings": []})
            elif found := re.fullmatch(r"/api/(?:models/)?(.+)/preupload/main", path):
                names = [each["path"] for each in json.loads(body)["files"]]
                modes = {n: "lfs" if n.endswith(".safetensors") else "regular" for n in names}
                self.say({"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in names]})
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.address}/large/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                self.say({"transfer": "basic", "objects": objects})
            elif found := re.fullmatch(r"/api/(?:models/)?(.+)/commit/main", path):
                held = hub.files[found[1]]
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        assert value["encoding"] == "base64"
                        held[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        held[value["path"]] = hub.large[value["oid"]]
                    elif line["key"] == "deletedFile":
                        del held[value["path"]]
                oid = hub.commit(found[1])
                self.say({"success": True, "commitOid": oid, "commitUrl": f"{hub.address}/{found[1]}/commit/{oid}"})
            else:
                self.say({"error": f"unknown: {path}"}, 404)

        def do_PUT(self) -> None:
            path, data = urlsplit(self.path).path, self.rfile.read(int(self.headers.get("Content-Length") or 0))
            assert path == f"/large/{hashlib.sha256(data).hexdigest()}"
            hub.large[path.rpartition("/")[2]] = data
            self.answer(200)

        def do_GET(self) -> None:
            path = self.asked_for()
            if (found := re.fullmatch(r"/(?!api/)(.+?)/resolve/(\w+)/(.+)", path)) and found[1] in hub.files:
                data = hub.files[found[1]].get(found[3])
                if data is None:
                    self.answer(404, X_Error_Code="EntryNotFound")
                    return
                tag = f'"{hashlib.sha1(data).hexdigest()}"'
                self.answer(200, data, ETag=tag, X_Repo_Commit=hub.commit(found[1]))
            elif (found := re.fullmatch(r"/api/(?:models/)?(.+?)/(revision|tree)/(\w+)", path)) and found[
                1
            ] in hub.files:
                held = [*hub.files[found[1]], *hub.lists_also]
                if found[2] == "tree":
                    sizes = hub.files[found[1]]
                    self.say(
                        [{"type": "file", "path": p, "oid": "0" * 40, "size": len(sizes.get(p, b""))} for p in held]
                    )
                    return
                siblings = [{"rfilename": name} for name in held]
                self.say({"id": found[1], "modelId": found[1], "sha": hub.commit(found[1]), "siblings": siblings})
            else:
                self.answer(404, X_Error_Code="RepoNotFound" if "api" in path or "resolve" in path else "")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
