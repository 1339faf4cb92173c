"""What the server keeps of a request is what `capture` keeps; sessions, downloads, caps; and who may do what."""

import base64
import contextlib
import copy
import dataclasses
import functools
import http.client
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from support.raises import raises
from support.served import MESSAGES, NAME, Served, demo, serving

import hookmap
from hookmap.cli.main import main
from hookmap.services.server.downloads import download_of
from hookmap.services.server.errors import ApiError
from hookmap.services.server.sessions import Sessions
from hookmap.stores.ledger import tensor_name

pytestmark = pytest.mark.slow


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Another server, which tells nobody what it is asked."""

    def log_message(self, *args: Any) -> None:
        """Nothing."""


RECORD = {"points": ["resid_mid", "z"], "layers": [3, -1]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("sessions"), inline_bytes=300_000) as found:
        yield found


def tensor(served: Served, meta: dict[str, Any], more: str = "") -> torch.Tensor:
    answer = served.get(meta["where"] + more)
    assert answer.status_code == 200, answer.text
    (found,) = safetensors.torch.load(answer.content).values()
    return found


def test_a_kept_request_has_the_tensors_of_capture_for_the_same_seed(served: Served) -> None:
    asked: dict[str, Any] = {"n": 2, "temperature": 4.0, "seed": 9, "max_tokens": 5, "stop": "zz"}
    found = served.chat(**asked, hookmap=RECORD).json()
    options = {"do_sample": True, "temperature": 4.0, "top_k": 0, "top_p": 1.0, "stop": "zz"}
    run = served.hm.capture([MESSAGES] * 2, max_new_tokens=5, seed=9, batch_size=2, **RECORD, **options)
    assert [choice["message"]["content"] for choice in found["choices"]] == run.texts
    meta = found["activations_meta"]
    assert found["session_id"] == meta["session_id"]
    assert {(each["point"], each["layer"]) for each in meta["tensors"]} == set(run.keys)
    assert len(meta["tensors"]) == 8
    for each in meta["tensors"]:
        expected = run.read(each["choice"], each["point"], each["layer"])
        got = tensor(served, each)
        assert torch.equal(got, expected), each
        assert (list(got.shape), got.nbytes) == (each["shape"], each["bytes"])
        assert torch.equal(tensor(served, each, "&start=2&stop=4"), expected[2:4])
    session = served.get(f"/v1/activations/session/{found['session_id']}").json()
    assert [tuple(each["token_ids"]) for each in session["samples"]] == run.tokens
    store = hookmap.open_store(served.root / found["session_id"])
    assert store.texts == run.texts, "a session is a capture folder as any other"


def test_a_stream_keeps_the_same_and_says_so_in_its_last_chunk(served: Served) -> None:
    (run,) = [served.hm.capture([MESSAGES], ["resid_mid"], [8, 12], max_new_tokens=4)]
    for options in ({}, {"stream_options": {"include_usage": True}}):
        text = served.chat(stream=True, max_tokens=4, store_activations=True, **options).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line and not line.endswith("[DONE]")]
        assert all("activations_meta" not in chunk for chunk in chunks[:-1])
        for each in chunks[-1]["activations_meta"]["tensors"]:
            assert torch.equal(tensor(served, each), run.read(0, each["point"], each["layer"]))


def test_a_kept_request_is_what_the_command_line_captures_for_the_same_seed(served: Served, tmp_path: Path) -> None:
    drawn = ["--temperature", "2.5", "--seed", "7", "--top-k", "0", "--max-new-tokens", "6", "--device", "cpu"]
    what = ["--points", "resid_mid", "--layers", "3,8", "--prompt", MESSAGES[0]["content"], "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(main, ["capture", "--chat", *what, *drawn])
    assert done.exit_code == 0, done.output
    typed = hookmap.open_store(tmp_path / "run")
    record = {"points": ["resid_mid"], "layers": [3, 8]}
    found = served.chat(temperature=2.5, seed=7, max_tokens=6, hookmap=record).json()
    assert found["choices"][0]["message"]["content"] == typed.texts[0]
    for each in found["activations_meta"]["tensors"]:
        assert torch.equal(tensor(served, each), typed.read(0, each["point"], each["layer"]))


def test_inline_rows_come_with_the_answer_and_selections_are_those_of_capture(served: Served) -> None:
    before = len(served.sessions.all())
    select = {"positions": "generated", "every": 2, "features": [1, 5], "keep_dtype": "bfloat16"}
    body = {"prompt": ["1+1", "Tom"], "max_tokens": 7, "temperature": 0}
    record = {"points": "resid_post", "layers": 2, "return": "inline", **select}
    found = served.post("/v1/completions", **body, hookmap=record).json()
    assert found["session_id"] is None and len(served.sessions.all()) == before
    options: Any = select
    run = served.hm.capture(body["prompt"], ["resid_post"], [2], max_new_tokens=7, batch_size=1, **options)
    for told, sample in zip(found["activations_meta"]["samples"], run.samples, strict=True):
        held = safetensors.torch.load(base64.b64decode(told["safetensors"]))
        assert torch.equal(held["resid_post.2"], run.read(sample.sample, "resid_post", 2))
        assert tuple(told["positions"]) == sample.positions


def test_a_request_may_give_each_point_layers_of_its_own(served: Served) -> None:
    body = {"prompt": "1+1", "max_tokens": 2, "temperature": 0}
    record = {"points": {"resid_post": [3, -1], "z": 8, "embed": None}, "return": "inline"}
    found = served.post("/v1/completions", **body, hookmap=record).json()["activations_meta"]
    keys = [(each["point"], each["layer"]) for each in found["tensors"]]
    assert keys == [("embed", None), ("resid_post", 3), ("z", 8), ("resid_post", 19)]
    held = safetensors.torch.load(base64.b64decode(found["samples"][0]["safetensors"]))
    run = served.hm.capture("1+1", ["z"], [8], max_new_tokens=2)
    assert torch.equal(held["z.8"], run.read(0, "z", 8))
    answer = served.post("/v1/completions", **body, hookmap={**record, "layers": [3]})
    assert answer.status_code == 400 and "leave layers out" in answer.json()["error"]["message"]


def test_places_and_operations_come_as_points_do_and_are_written(served: Served) -> None:
    gate, softmax = "model.layers.{i}.mlp.gate_proj.output", "model.layers.{i}.self_attn:_softmax.output"
    body = {"prompt": "1+1", "max_tokens": 3, "temperature": 0}
    edits = [{"do": "ablate", "point": softmax, "layers": [8], "heads": [2]}]
    points = [gate, softmax, "z", "attn_scores", "mlp_pre"]
    record = {"points": points, "layers": [8], "return": "inline", "interventions": edits}
    answer = served.post("/v1/completions", **body, hookmap=record)
    assert answer.status_code == 200, answer.text
    held = safetensors.torch.load(base64.b64decode(answer.json()["activations_meta"]["samples"][0]["safetensors"]))
    run = served.hm.capture("1+1", points, [8], max_new_tokens=3, interventions=edits)
    assert held.keys() == {tensor_name((point, 8)) for point in points}
    for point in points:
        assert torch.equal(held[tensor_name((point, 8))], run.read(0, point, 8)), point
    assert not run.read(0, "z", 8)[:, 2].any() and torch.equal(run.read(0, gate, 8), run.read(0, "mlp_pre", 8))
    wrong = {**record, "points": ["model.layers.{i}.mlp:nothing.output"]}
    told = served.post("/v1/completions", **body, hookmap=wrong)
    assert told.status_code == 400 and "--operations" in told.json()["error"]["message"]


def test_what_cannot_be_kept_is_refused_before_anything_runs(served: Served) -> None:
    def error(**record: Any) -> tuple[int, dict[str, Any]]:
        answer = served.chat(hookmap=record)
        return answer.status_code, answer.json()["error"]

    status, told = error(points=["resid_mdi"], layers=[99])
    assert status == 400 and "resid_mid" in told["message"] and "99" in told["message"]
    status, told = error(points="all", **{"return": "inline"})
    assert (status, told["code"]) == (413, "activations_too_large") and "300000 bytes" in told["message"]
    assert error(point=["x"])[0] == 400
    assert error(**{"return": "mail"})[0] == 400
    assert served.chat(hookmap={"return": "none"}).json().get("activations_meta") is None


def test_a_part_of_a_download_is_that_part(served: Served) -> None:
    where = served.chat(hookmap=RECORD, max_tokens=2).json()["activations_meta"]["tensors"][0]["where"]
    whole = served.get(where)
    data, tag = whole.content, whole.headers["etag"]
    for asked, start, end in (
        ("bytes=0-9", 0, 10),
        ("bytes=10-", 10, len(data)),
        ("bytes=-7", len(data) - 7, len(data)),
    ):
        part = served.get(where, Range=asked)
        assert (part.status_code, part.content) == (206, data[start:end])
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{len(data)}"
        assert part.headers["etag"] == tag
    assert served.get(where, Range=f"bytes={len(data)}-").status_code == 416
    assert served.get(where, Range="bytes=-0").status_code == 416
    assert served.get(where, Range="Bytes=" + "0" * 15 + "5-6").content == data[5:7]
    for all_of_it in (
        "bytes=0-1,3-4",
        "lines=1-2",
        "bytes=-",
        "bytes=" + "0" * 30 + "5-6",
        "bytes=" + "9" * 5000 + "-",
    ):
        assert served.get(where, Range=all_of_it).content == data
    assert served.get(where, **{"Range": "bytes=0-1", "If-Range": '"other"'}).content == data


@pytest.mark.parametrize("selection", [{}, {"positions": "500:600"}, {"positions": [0, 3, 7]}, {"mean": True}])
@pytest.mark.parametrize("point", ["z", "embed"])
def test_a_download_is_a_safetensors_file_in_pieces_that_are_small(point: str, selection: dict[str, Any]) -> None:
    layer = None if point == "embed" else 3
    run = demo().capture([MESSAGES], [point], "all" if layer is None else [layer], max_new_tokens=4, **selection)
    (name,), rows = [f"{p}.{n}" if n is not None else p for p, n in run.keys], run.read(0, point, layer)
    file = dataclasses.replace(download_of(run.store, 0, point, layer, None), piece=1000)
    whole = b"".join(file.between(0, file.size))
    assert len(whole) == file.size and torch.equal(safetensors.torch.load(whole)[name], rows)
    assert whole == bytes(safetensors.torch.save({name: rows.contiguous()}))
    assert max(map(len, file.between(0, file.size))) <= len(file.head) + 1000
    head, end = len(file.head), file.size
    for start, stop in (
        (0, 1),
        (head - 1, head),
        (head - 1, head + 1),
        (head, end),
        (head + 255, head + 2049),
        (end - 1, end),
    ):
        if start < stop <= end:
            assert b"".join(file.between(start, stop)) == whole[start:stop]


def test_a_deleted_session_is_gone(served: Served) -> None:
    id = served.chat(store_activations=True, max_tokens=1).json()["session_id"]
    assert id in [each["id"] for each in served.get("/v1/activations/sessions").json()["data"]]
    assert served.delete(f"/v1/activations/session/{id}").json()["deleted"] is True
    assert served.delete(f"/v1/activations/sessions/{id}").status_code == 404
    assert not (served.root / id).exists()


def test_no_id_reaches_a_file_outside_the_root(served: Served) -> None:
    outside = served.root.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "manifest.json").write_text("{}")
    tricks = ["../outside", "..%2Foutside", "%2e%2e%2foutside", "..%252foutside", "....//outside", "act-/../../outside"]
    tricks += ["/etc/passwd", "%00", "act-" + "0" * 32, ".server", ".", "..", "a" * 5000, "act-%c0%af", str(outside)]
    for trick in tricks:
        for path in (f"/v1/activations/sessions/{trick}", f"/v1/activations/session/{trick}/tensors?point=embed"):
            for method in ("GET", "DELETE"):
                with contextlib.closing(http.client.HTTPConnection(served.url.removeprefix("http://"))) as connection:
                    connection.request(method, path)  # as it is: this client tidies no path up
                    assert connection.getresponse().status in (400, 404, 405), trick
    assert (outside / "manifest.json").exists() and (served.root / ".server").exists()


def test_sessions_go_by_size_and_age_the_oldest_first(tmp_path: Path) -> None:
    now = [1000.0]
    sessions = Sessions(tmp_path, total_bytes=2500, max_age=60, clock=lambda: now[0])

    def make(size: int) -> str:
        session, folder = sessions.begin("m", size)
        folder.mkdir()
        (folder / "rows").write_bytes(bytes(size))
        now[0] += 1
        sessions.end(session)
        return session.id

    first, second = make(1000), make(1000)
    running, _ = sessions.begin("m", 400)
    third = make(1000)
    assert [s.id for s in sessions.all()] == [second, running.id, third] and not (tmp_path / first).exists()
    with raises(ApiError, "no room") as error:
        sessions.begin("m", 2400)
    assert error.value.status == 503, "a running one is never removed"
    assert [s.id for s in sessions.all()] == [second, running.id, third], "nor a finished one in vain"
    with raises(ApiError, "still being written"):
        sessions.delete(running.id)
    sessions.drop(running)
    kept = make(10)
    now[0] += 59
    assert [s.id for s in sessions.all()] == [kept]
    sessions.close()


def test_a_session_that_its_manifest_takes_over_the_cap_is_there_until_the_next_one(tmp_path: Path) -> None:
    with serving(tmp_path, total_bytes=15_000) as served:
        asked: dict[str, Any] = {"max_tokens": 1, "store_activations": True}
        first = served.chat(**asked, messages=[{"role": "user", "content": "a"}])
        assert first.status_code == 200, first.text
        assert served.get(f"/v1/activations/sessions/{first.json()['session_id']}").json()["bytes"] > 15_000
        error = served.chat(**asked, messages=[{"role": "user", "content": "a" * 60}])
        assert (error.status_code, error.json()["error"]["code"]) == (413, "activations_too_large"), "it never fits"
        second = served.chat(**asked, messages=[{"role": "user", "content": "b"}]).json()["session_id"]
        assert [each.id for each in served.sessions.all()] == [second]


def test_a_folder_that_fails_is_told_without_its_name(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    answer = served.chat(store_activations=True, max_tokens=1).json()
    id, where = answer["session_id"], answer["activations_meta"]["tensors"][0]["where"]
    (served.root / id / "shards" / "000000.safetensors").write_bytes(b"torn")
    for path in (where, f"/v1/activations/sessions/{id}"):
        told = served.get(path)
        if told.status_code != 200:
            assert (told.status_code, told.json()["error"]["code"]) == (500, "store_failed")
        assert str(served.root) not in told.text
    assert served.get(where).status_code == 500 and str(served.root) in caplog.text, "the log names it"
    assert served.delete(f"/v1/activations/sessions/{id}").status_code == 200


def test_a_session_that_is_deleted_while_it_is_read_is_not_found(served: Served) -> None:
    id = served.chat(store_activations=True, max_tokens=1).json()["session_id"]
    with raises(ApiError, "no session") as error, served.sessions.reading(id) as store:
        served.sessions.delete(id)
        store.read(0, "resid_mid", 8)
    assert error.value.status == 404


def test_a_new_server_finds_the_finished_sessions_and_removes_the_others(served: Served, tmp_path: Path) -> None:
    id = served.chat(store_activations=True, max_tokens=1).json()["session_id"]
    shutil.copytree(served.root / id, tmp_path / id)
    half = tmp_path / ("act-" + "f" * 32)
    shutil.copytree(served.root / id, half)
    manifest = json.loads((half / "manifest.json").read_text())
    (half / "manifest.json").write_text(json.dumps({**manifest, "finished": False}))
    (tmp_path / "mine").mkdir()
    sessions = Sessions(tmp_path, 10**9, 3600)
    assert [each.id for each in sessions.all()] == [id]
    assert (tmp_path / "mine").exists() and not half.exists()
    with raises(hookmap.StoreError, "another process"):
        Sessions(tmp_path, 10**9, 3600)
    sessions.close()


def test_keys_hosts_and_sizes_are_checked_before_any_route(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"key": "k1", "admin_key": "k2", "body_bytes": 2000, "allow": ("nowhere/none",)}
    with serving(tmp_path, **limits) as served:
        assert served.get("/health").status_code == 200 and served.get("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/activations/sessions", "/nothing"):
            assert served.get(path).status_code == 401
        for wrong in ("Bearer k", "Bearer k11", "k1", "Basic k1", "Bearer", "Bearer k\u00e4"):
            assert served.get("/v1/models", Authorization=wrong.encode("latin-1")).status_code == 401  # type: ignore[arg-type]
        served.headers = {"Authorization": "Bearer k1"}
        assert served.get("/v1/models").status_code == 200
        assert served.get("/v1/models", Host="evil.example").status_code == 421
        assert served.post("/models/unload", model=NAME).status_code == 401, "a client's key is no admin's"
        assert served.chat(user="x" * 3000).status_code == 413
        url, headers = f"{served.url}/v1/chat/completions", {**served.headers, "Content-Type": "application/json"}
        chunked = httpx.post(url, content=iter([b'{"user": "', b"x" * 3000, b'"}']), headers=headers)
        assert (chunked.status_code, chunked.json()["error"]["type"]) == (413, "invalid_request_error")
        served.headers = {"Authorization": "Bearer k2"}
        assert served.post("/models/load", model="/etc").status_code == 403
        assert served.post("/models/load", model="nowhere/none").status_code == 400
        assert served.post("/models/unload", model=NAME).json()["unloaded"] is True
        assert served.chat().status_code == 404 and served.get("/health").json()["models"] == []


def test_without_an_admin_key_nobody_loads(served: Served) -> None:
    assert served.post("/models/load", model="x").json()["error"]["code"] == "no_admin_key"


def test_smoke_walks_through_and_says_what_fails(served: Served) -> None:
    before = len(served.sessions.all())
    done = CliRunner().invoke(main, ["smoke", served.url, "--json"])
    assert done.exit_code == 0, done.output
    steps = json.loads(done.stdout)
    names = ["health", "load", "structure", "chat", "stream", "capture", "sessions", "download", "delete"]
    assert [step["name"] for step in steps] == names
    assert "rows of 2 tensors, 8 tokens generated" in steps[5]["detail"]
    assert len(served.sessions.all()) == before
    failed = CliRunner().invoke(main, ["smoke", served.url, "--model", "nowhere/none"])
    assert failed.exit_code == 1 and "start the server with --admin-key" in " ".join(failed.stderr.split())


def test_smoke_completes_where_a_model_has_no_chat_template(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(demo().tokenizer)
    tokenizer.chat_template = None
    with serving(tmp_path, hookmap.open(demo().model, map=demo().map, tokenizer=tokenizer)) as served:
        done = CliRunner().invoke(main, ["smoke", served.url, "--json"])
        assert done.exit_code == 0, done.output
        assert "no chat template" in json.loads(done.stdout)[3]["detail"]


def test_smoke_asks_for_a_model_by_any_name(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.models.add("my model/\u00fc?", demo())
        done = CliRunner().invoke(main, ["smoke", served.url, "--json", "--model", "my model/\u00fc?"])
        assert done.exit_code == 0, done.output


def test_smoke_says_that_a_download_is_cut_off(served: Served) -> None:
    class Cut(Quiet):
        """The server, with four bytes of each tensor."""

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body, kind = self.rfile.read(length), {"Content-Type": "application/json"}
            answer = httpx.request(self.command, served.url + self.path, content=body, headers=kind, timeout=240)
            told = answer.content[:4] if "/tensors" in self.path else answer.content
            self.send_response(answer.status_code)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        do_POST = do_DELETE = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cut) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        done = CliRunner().invoke(main, ["smoke", f"http://127.0.0.1:{other.server_port}", "--json"])
        other.shutdown()
    last = json.loads(done.stdout)[-1]
    assert done.exit_code == 1 and (last["name"], last["passed"]) == ("download", False)


def test_smoke_says_what_is_no_hookmap_server(tmp_path: Path) -> None:
    def told(url: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["smoke", url])
        return done.exit_code, " ".join(done.stderr.split())

    (tmp_path / "health").write_text("<html>fine</html>")
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        code, words = told(url)
        assert code == 1 and f"answers no JSON: <html>fine</html>. Is {url} a hookmap server?" in words
        code, words = told(f"{url}/nowhere")
        assert code == 1 and "answers 404" in words and "<body>" not in words
        other.shutdown()
    code, words = told(url)
    assert code == 1 and "no answer from" in words
    with serving(tmp_path / "sessions", key="k") as served:
        code, words = told(served.url)
        assert code == 1 and "answers 401: a wrong key or none" in words and "--key" in words
    for wrong in ("127.0.0.1:8000", "http://[::1", "http://", "http://127.0.0.1:99999"):
        assert told(wrong)[0] == 2, wrong


def test_the_demo_loads_once_and_unloads(tmp_path: Path) -> None:
    from hookmap.demo import MODEL_PATH

    limits: dict[str, Any] = {"admin_key": "k", "allow": (str(MODEL_PATH),), "loads": {"device": "cpu"}}
    with serving(tmp_path, **limits) as served:
        served.headers = {"Authorization": "Bearer k"}
        one = served.models.get(NAME)
        assert served.post("/models/load", model=str(MODEL_PATH)).json()["id"] == NAME
        assert served.models.get(NAME) is one, "one copy of the weights"
        assert served.post("/models/unload", model=NAME).status_code == 200
        assert served.post("/models/load", model=str(MODEL_PATH)).status_code == 200
        assert served.chat(max_tokens=1).status_code == 200


def test_no_answer_names_a_folder_of_the_server(tmp_path: Path) -> None:
    from hookmap.demo import MODEL_PATH

    folder = shutil.copytree(MODEL_PATH, tmp_path / "secret" / "my-model")
    limits: dict[str, Any] = {"admin_key": "k", "allow": (str(folder),), "loads": {"device": "cpu"}}
    with serving(tmp_path / "sessions", **limits) as served:
        served.headers = {"Authorization": "Bearer k"}
        answers = [served.post("/models/load", model="my-model")]
        assert answers[0].json()["id"] == "my-model"
        record = {"points": ["resid_post"], "layers": [4]}
        answers.append(served.chat(model="my-model", max_tokens=2, hookmap=record))
        session = answers[1].json()["session_id"]
        patch = {"do": "patch", "point": "resid_post", "layers": [4], "source": {"store": session}}
        put = {"interventions": [patch], "model": "my-model"}
        answers.append(httpx.put(f"{served.url}/v1/interventions", json=put, headers=served.headers, timeout=240))
        assert answers[2].json()["data"][0]["source"]["store"] == session
        paths = ["/v1/models", "/v1/models/my-model", "/v1/interventions?model=my-model", "/health", "/metrics"]
        paths += [
            "/v1/model/structure?model=my-model",
            "/v1/activations/sessions",
            f"/v1/activations/sessions/{session}",
        ]
        answers += [served.get(path) for path in paths]
        answers += [served.chat(model="other"), served.post("/models/load", model="other")]
        assert [answer.status_code for answer in answers] == [200] * 11 + [404, 403]
        assert [str(answer.url) for answer in answers if str(tmp_path) in answer.text] == []


def test_interventions_are_those_of_capture_in_a_request_and_as_defaults(tmp_path: Path) -> None:
    steer = {"do": "steer", "point": "resid_post", "layers": [4], "vector": [3.0] * 64, "strength": 2.0}
    what: dict[str, Any] = {"points": ["resid_post"], "layers": [4, 9], "max_new_tokens": 6}
    plain = demo().capture([MESSAGES], **what)
    run = demo().capture([MESSAGES], **what, interventions=[steer])
    assert run.tokens != plain.tokens, "else the test shows nothing"
    record = {"points": ["resid_post"], "layers": [4, 9]}
    with serving(tmp_path, admin_key="k") as served:
        asked: dict[str, Any] = {"max_tokens": 6}

        def same(answer: dict[str, Any], expected: Any) -> None:
            assert answer["choices"][0]["message"]["content"] == expected.texts[0]
            for each in answer["activations_meta"]["tensors"]:
                assert torch.equal(tensor(served, each), expected.read(0, each["point"], each["layer"]))

        same(served.chat(**asked, hookmap={**record, "interventions": [steer]}).json(), run)
        only = served.chat(**asked, hookmap={"return": "none", "interventions": [steer]}).json()
        assert only["choices"][0]["message"]["content"] == run.texts[0] and "activations_meta" not in only
        same(served.chat(**asked, hookmap=record).json(), plain)

        session = served.chat(hookmap=record).json()["session_id"]
        patch = {"do": "patch", "point": "resid_post", "layers": [4], "source": {"store": session}}
        assert served.chat(**asked, hookmap={**record, "interventions": [patch]}).status_code == 200
        refused = [{**steer, "vector": {"file": "/etc/passwd.safetensors", "key": "a"}}, {**steer, "point": "nowhere"}]
        refused += [{**patch, "source": {"store": str(tmp_path / session)}}, {"do": "dance"}, {**steer, "layers": [99]}]
        file = {"file": "/etc/passwd.safetensors", "key": "a"}
        refused += [{"do": "low_rank", "point": "mlp_out", "down": file, "up": file}]
        refused += [
            {"do": "replace", "point": "mlp_out", "tensor": file},
            {"do": "apply", "point": "mlp_out", "fn": "x"},
        ]
        for wrong in refused:
            status = served.chat(hookmap={"return": "none", "interventions": [wrong]}).status_code
            assert status in (400, 404), wrong
        for other in ({"do": "skip", "what": "mlp", "layers": [4]}, {"do": "noise", "point": "resid_post", "std": 0.5}):
            edited = demo().capture([MESSAGES], **what, interventions=[other])
            same(served.chat(**asked, hookmap={**record, "interventions": [other]}).json(), edited)
        short = served.chat(hookmap={"return": "none", "interventions": [{**steer, "vector": [1.0]}]})
        assert short.status_code == 400 and "64" in short.json()["error"]["message"]

        served.headers = {"Authorization": "Bearer k"}
        for unfit in ({**steer, "vector": [1.0]}, {"do": "ablate", "point": "q", "heads": [7]}):
            body = {"interventions": [unfit]}
            refused_put = httpx.put(f"{served.url}/v1/interventions", json=body, headers=served.headers, timeout=240)
            assert refused_put.status_code == 400, "it would make every later request fail"
            assert served.get("/v1/interventions").json()["data"] == []
        put = httpx.put(
            f"{served.url}/v1/interventions", json={"interventions": [steer]}, headers=served.headers, timeout=240
        )
        assert put.json() == served.get("/v1/interventions").json()
        assert put.json()["data"][0]["strength"] == 2.0
        same(served.chat(**asked, hookmap=record).json(), run)
        same(served.chat(**asked, hookmap={**record, "interventions": []}).json(), plain)
        put = httpx.put(
            f"{served.url}/v1/interventions", json={"interventions": [patch]}, headers=served.headers, timeout=240
        )
        assert (put.status_code, served.chat(**asked).status_code) == (200, 200)
        served.sessions.delete(session)
        gone = served.chat(**asked)
        assert (gone.status_code, gone.json()["error"]["code"]) == (400, "session_not_found")
        assert str(tmp_path) not in gone.text


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0}, {"logprobs": True}, {"points": ["logits"]}])
def test_interventions_that_leave_no_numbers_are_told(served: Served, more: dict[str, Any]) -> None:
    """Also where the answer is greedy, and could name some token all the same."""
    scale = {"do": "scale", "point": "resid_post", "layers": [8], "factor": 1e38}
    kept = {"points": more["points"], "return": "inline"} if "points" in more else {"return": "none"}
    asked: dict[str, Any] = {"max_tokens": 2, "hookmap": {**kept, "interventions": [scale]}}
    asked |= {name: value for name, value in more.items() if name != "points"}
    for stream in (False, True):
        told = served.chat(**asked, stream=stream)
        assert told.status_code == 400, told.text
        error = told.json()["error"]
        assert (error["code"], error["param"]) == ("not_finite", "hookmap.interventions")
        assert "scale of resid_post, layers 8" in error["message"]
    assert served.chat(max_tokens=1).status_code == 200
