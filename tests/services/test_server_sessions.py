"""Sessions as people find them again, and answers whose session the disk refuses."""

import json
import resource
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.raises import raises
from support.served import MESSAGES, Served, demo, serving

import hookmap
from hookmap.services.server.errors import ApiError
from hookmap.services.server.sessions import Sessions

RECORD = {"points": ["resid_mid"], "layers": [3]}


@pytest.mark.slow
def test_sessions_are_found_by_label_and_metadata_also_by_the_next_server(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        ids = []
        for number in range(4):
            told = {"run": f"{number % 2}", "who": "ann"}
            record = {**RECORD, "label": "even"} if number % 2 == 0 else RECORD
            answer = served.chat(max_tokens=1, hookmap=record, metadata=told, messages=MESSAGES)
            ids.append(answer.json()["session_id"])

        def listed(query: str = "") -> list[str]:
            answer = served.get(f"/v1/activations/sessions{query}")
            assert answer.status_code == 200, answer.text
            return [each["id"] for each in answer.json()["data"]]

        assert listed() == ids and listed("?order=desc") == ids[::-1]
        assert listed("?label=even") == [ids[0], ids[2]]
        assert listed("?metadata=run:1") == [ids[1], ids[3]]
        assert listed("?metadata=run:1&metadata=who:ann") == [ids[1], ids[3]]
        assert listed("?metadata=run:1&label=even") == listed("?label=Even") == []
        assert listed(f"?order=desc&limit=2&after={ids[3]}") == [ids[2], ids[1]]
        assert served.get("/v1/activations/sessions?limit=3").json()["has_more"] is True
        assert served.get(f"/v1/activations/sessions?after={ids[0]}").json()["has_more"] is False
        assert served.get("/v1/activations/sessions?after=act-x").status_code == 404
        one = served.get(f"/v1/activations/sessions/{ids[0]}").json()
        assert (one["label"], one["metadata"], one["points"]) == ("even", {"run": "0", "who": "ann"}, ["resid_mid"])
        assert one["prompt"] == MESSAGES[0]["content"]
    again = Sessions(tmp_path, 10**9, 3600)
    assert [each.described()["label"] for each in again.all()] == ["even", None, "even", None]
    assert again.all()[3].about.metadata == {"run": "1", "who": "ann"}
    again.close()


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ({"metadata": {"a" * 65: "b"}}, "metadata", "64 characters"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
        ({"hookmap": {**RECORD, "label": "x" * 513}}, "hookmap.label", "512"),
        ({"store_activations": False, "hookmap": RECORD}, "store_activations", "leave one of them out"),
        ({"store_activations": True, "hookmap": {"return": "none"}}, "store_activations", "leave one of them out"),
    ],
    ids="type key many label false none".split(),
)
def test_what_would_be_ignored_is_refused(served: Served, body: dict[str, Any], param: str, told: str) -> None:
    answer = served.chat(max_tokens=1, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and told in error["message"]


def test_half_a_surrogate_pair_is_no_label(served: Served) -> None:
    for body in ({"metadata": {"a": "\ud800"}}, {"hookmap": {**RECORD, "label": "\ud800"}}):
        answer = served.chat(max_tokens=1, **body)
        assert answer.status_code == 400, answer.text


@pytest.mark.slow
def test_a_sessions_text_is_what_was_answered_and_its_tokens_are_all(served: Served) -> None:
    text = served.chat(max_tokens=30).json()["choices"][0]["message"]["content"]
    stop = text[8:10]
    answer = served.chat(max_tokens=30, stop=stop, hookmap=RECORD).json()
    sample = served.get(f"/v1/activations/sessions/{answer['session_id']}").json()["samples"][0]
    assert sample["text"] == answer["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert len(sample["token_ids"]) == answer["usage"]["total_tokens"]
    store = hookmap.open_store(served.root / answer["session_id"])
    assert stop in store.texts[0], "a capture folder has the text of all its tokens"


def a_disk(tmp_path: Path, room: list[int], total: int = 10**6) -> Sessions:
    """Sessions on a disk with so many bytes left beside them."""

    def free(root: Path) -> int:
        return room[0] - sum(file.stat().st_size for file in root.rglob("*") if file.is_file())

    return Sessions(tmp_path, total_bytes=total, max_age=60, free=free)


def made(sessions: Sessions, size: int) -> str:
    session, folder = sessions.begin("m", size)
    folder.mkdir()
    (folder / "rows").write_bytes(bytes(size))
    sessions.end(session)
    return session.id


def test_a_full_disk_lets_the_oldest_go_and_refuses_what_would_never_fit(tmp_path: Path) -> None:
    room = [2500]
    sessions = a_disk(tmp_path, room)
    first, second = made(sessions, 1000), made(sessions, 1000)
    third = made(sessions, 1000)
    assert [each.id for each in sessions.all()] == [second, third] and not (tmp_path / first).exists()
    with raises(ApiError, "2600 bytes") as error:
        sessions.begin("m", 2600)
    assert error.value.status == 507 and [each.id for each in sessions.all()] == [second, third], "none in vain"
    running, _ = sessions.begin("m", 1500)
    with raises(ApiError, "1500 bytes are in use by running requests") as error:
        sessions.begin("m", 1500)
    assert error.value.status == 503 and error.value.headers["Retry-After"]
    sessions.drop(running)
    sessions.close()


def test_many_sessions_make_the_next_one_no_slower(tmp_path: Path) -> None:
    """The disk was asked once for each of them."""
    asked = list[Path]()

    def free(root: Path) -> int:
        asked.append(root)
        return 10**9

    sessions = Sessions(tmp_path, total_bytes=10**9, max_age=60, free=free)
    for _ in range(30):
        made(sessions, 1)
    asked.clear()
    made(sessions, 1)
    assert 1 <= len(asked) <= 3
    sessions.close()


def test_no_room_is_told_before_anything_runs(tmp_path: Path) -> None:
    with serving(tmp_path, free=lambda folder: 5000) as served:
        passes: list[int] = []
        hook = demo().model.register_forward_pre_hook(lambda *_: passes.append(1))
        try:
            answer = served.chat(hookmap=RECORD)
        finally:
            hook.remove()
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "no_room")
        assert "5000 left" in answer.json()["error"]["message"] and not passes
        assert served.chat(max_tokens=1).status_code == 200


def test_no_room_is_told_while_others_run(tmp_path: Path) -> None:
    """At once, and not when the request's turn comes."""
    with serving(tmp_path, free=lambda folder: 5000, batch=1) as served:
        begun, free = threading.Event(), threading.Event()

        def hold(*_: Any) -> None:
            begun.set()
            assert free.wait(60)

        hook = demo().model.register_forward_pre_hook(hold)
        with ThreadPoolExecutor(2) as people:
            try:
                running = people.submit(served.chat, max_tokens=1)
                assert begun.wait(60)
                answer = people.submit(served.chat, max_tokens=1, hookmap=RECORD | {"layers": "all"}).result(30)
                assert (answer.status_code, answer.json()["error"]["code"]) == (507, "no_room")
                free.set()
                assert running.result().status_code == 200
            finally:
                free.set()
                hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("how", "why"), [("gone", "No such file"), ("full", "File too large")])
def test_an_answer_whose_session_is_lost_on_the_way_is_whole(tmp_path: Path, streams: bool, how: str, why: str) -> None:
    """While the model writes the folder goes, which is seen at the end, or the system takes no more bytes."""
    root = tmp_path / "sessions"
    record = {"points": "all", "layers": "all"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(root) as served:
        plain = served.chat(max_tokens=40).json()["choices"][0]["message"]["content"]
        passes = []

        def lose(*_: Any) -> None:
            passes.append(threading.get_ident())
            if len(passes) == 3 and how == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            elif len(passes) == 3:
                for folder in root.glob("act-*"):
                    shutil.rmtree(folder)

        hook = demo().model.register_forward_pre_hook(lose)
        try:
            answer = served.chat(max_tokens=40, hookmap=record, stream=streams)
        finally:
            hook.remove()
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert answer.status_code == 200, answer.text
        if streams:
            lines = [line[6:] for line in answer.text.splitlines() if line]
            assert lines.pop() == "[DONE]"
            chunks = [json.loads(line) for line in lines]
            text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
            last = chunks[-1]
        else:
            last = answer.json()
            text = last["choices"][0]["message"]["content"]
        assert text == plain
        meta = last["activations_meta"]
        assert last["session_id"] is meta["session_id"] is None
        assert meta["error"]["code"] == "store_failed" and why in meta["error"]["message"]
        assert str(tmp_path) not in answer.text and meta["tensors"] == []
        assert served.sessions.all() == []
        assert served.chat(max_tokens=1, hookmap=RECORD).json()["session_id"] is not None


@pytest.mark.slow
def test_rows_that_come_after_the_disk_refused_some_are_let_go(tmp_path: Path) -> None:
    """The first text of a request is refused when it is written; those behind it are answered all the same."""
    body = {"prompt": ["a b", "c d", "e f"], "max_tokens": 8, "temperature": 0}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(tmp_path / "sessions", batch=1) as served:
        plain = [each["text"] for each in served.post("/v1/completions", **body).json()["choices"]]
        passes = []

        def fill(*_: Any) -> None:
            passes.append(1)
            if len(passes) == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            elif len(passes) == 9:
                time.sleep(1)  # the writer's thread has seen it

        hook = demo().model.register_forward_pre_hook(fill)
        try:
            answer = served.post("/v1/completions", **body, hookmap={"points": "all", "layers": "all"})
        finally:
            hook.remove()
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert answer.status_code == 200, answer.text
        assert [each["text"] for each in answer.json()["choices"]] == plain
        assert answer.json()["activations_meta"]["error"]["code"] == "store_failed"
        assert served.sessions.all() == []
