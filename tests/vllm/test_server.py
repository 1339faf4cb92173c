"""Both ways of serving on vLLM, as real processes: `hookmap serve --engine vllm`, and vLLM's with the plugin."""

import base64
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from support import vllm_server
from support.on_vllm import SETTINGS, Plain, held_against, prompts
from support.own_functions import BROKEN, TURNED
from support.tiny_tokenizer import tiny_tokenizer
from support.vllm_server import Server

import hookmap
from hookmap.errors import StoreError

POINTS = ("resid_mid", "resid_post")
NEW = 12
VECTOR = (torch.randn(64, generator=torch.Generator().manual_seed(1)) * 2).tolist()
EDIT = {"do": "steer", "point": "resid_post", "layers": [1], "vector": VECTOR, "strength": 3}
KEY = "sesame"
SECOND = "another-name"


@pytest.fixture(scope="module")
def hookmaps(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    sessions = tmp_path_factory.mktemp("own") / "sessions"
    with vllm_server.hookmaps(checkpoint, sessions, KEY, f"--function={TURNED}", "--vllm=max_logprobs=5") as server:
        yield server


@pytest.fixture(scope="module")
def vllms(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("vllm") / "sessions"
    serving = {"sessions": str(folder), "max_sessions": 20, "request_bytes": 100_000, "inline_bytes": 20_000}
    names = ("--served-model-name", vllm_server.MODEL, SECOND)
    with vllm_server.vllms(checkpoint, folder, {"serving": serving, "functions": [TURNED]}, *names) as server:
        yield server


@pytest.fixture
def killed(checkpoint: Path, tmp_path: Path) -> Iterator[Server]:
    with vllm_server.hookmaps(checkpoint, tmp_path / "sessions", KEY) as server:
        yield server


@pytest.fixture(params=["hookmaps", "vllms"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


def test_captured_edited_and_plain_requests_share_batches(server: Server, plain: Plain, checkpoint: Path) -> None:
    given = prompts(12, 20, seed=3, shared=8)
    captured: dict[str, Any] = {"points": list(POINTS)}

    def ask(number: int) -> dict[str, Any]:
        fields = ({"hookmap": captured}, {"hookmap": {**captured, "interventions": [EDIT]}}, {})[number % 3]
        answer = server.complete(given[number], max_tokens=NEW, **fields)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    with ThreadPoolExecutor(12) as together:
        answers = list(together.map(ask, range(12)))
    hm = hookmap.open(str(checkpoint), dtype="float32")
    for number, answer in enumerate(answers):
        expected = plain.generated(given[number], NEW)
        if number % 3 == 2:
            assert "activations_meta" not in answer
            if server.hookmaps:
                assert answer["choices"][0]["text"] == hm.tokenizer.decode(expected[20:], skip_special_tokens=True)
            else:
                assert answer["choices"][0]["token_ids"] == list(expected[20:])
            continue
        meta = answer["activations_meta"]
        assert meta["samples"] == [{"choice": 0, "prompt_tokens": 20, "tokens": 32, "rows": 31, "positions": None}]
        assert str(server.sessions) not in str(answer)
        store = hookmap.open_store(server.sessions / answer["session_id"])
        if number % 3 == 0:
            held_against(plain, store, points=POINTS)
            assert store.samples[0].token_ids == expected
        else:
            own = hm.capture([given[number]], list(POINTS), interventions=[EDIT], max_new_tokens=NEW)
            assert store.samples[0].token_ids == own.samples[0].token_ids
            assert (store.read(0, "resid_post", 2) - own.read(0, "resid_post", 2)).abs().max() < 1e-3


def test_a_stream_ends_with_what_was_recorded(server: Server, plain: Plain) -> None:
    [prompt] = prompts(1, 20, seed=5)
    whole = server.complete(prompt).json()["choices"][0]["text"]
    chunks = server.stream("/v1/completions", prompt=prompt, max_tokens=NEW, hookmap={"points": list(POINTS)})
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == whole
    assert len(chunks) > 6
    assert [n for n, chunk in enumerate(chunks) if "activations_meta" in chunk] == [len(chunks) - 1]
    held_against(plain, hookmap.open_store(server.sessions / chunks[-1]["session_id"]), points=POINTS)


def test_rows_in_the_answer_itself(server: Server, plain: Plain) -> None:
    [prompt] = prompts(1, 20, seed=6)
    wanted = {"points": {"resid_post": [1]}, "positions": "generated", "return": "inline"}
    meta = server.complete(prompt, hookmap=wanted).json()["activations_meta"]
    rows = load(base64.b64decode(meta["samples"][0]["safetensors"]))["resid_post.1"]
    expected = plain.rows(plain.generated(prompt, NEW)[:-1])["resid_post", 1][20:]
    assert torch.allclose(rows, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ({"points": ["nope"]}, ["nope", "resid_mid"]),
        ({"point": 1, "every": 0, "positions": 3}, ["hookmap.point", "hookmap.every", "hookmap.positions"]),
        ({"points": ["resid_post"], "layers": [99]}, ["layer 99"]),
        ({"points": ["resid_post"], "interventions": [{"do": "what"}]}, ["what", "steer"]),
        ({"points": ["resid_post"], "interventions": [{**EDIT, "vector": {"path": "/etc/passwd", "key": "a"}}]}, []),
        ({"points": ["resid_post"], "interventions": [
            {"do": "patch", "point": "resid_pre", "layers": [1], "source": {"store": "../../other"}}]}, ["session"]),
        ("no document", ["hookmap"]),
    ],
)  # fmt: skip
def test_nonsense_is_refused(server: Server, field: Any, told: list[str]) -> None:
    answer = server.complete(prompts(1, 20)[0], hookmap=field)
    assert answer.status_code == 400
    assert all(each in answer.json()["error"]["message"] for each in told)
    assert "hookmap show" not in answer.text


def test_positions_are_those_of_the_requests_own_prompt(server: Server) -> None:
    [prompt] = prompts(1, 20)
    wanted = {"points": ["resid_post"], "layers": [1], "return": "inline"}
    for positions, rows in (([5, 19, 21], [5, 19, 21]), ([-3], [17])):
        answer = server.complete(prompt, hookmap={**wanted, "positions": positions})
        assert answer.json()["activations_meta"]["samples"][0]["positions"] == rows
    words = tiny_tokenizer().decode(prompt[4:6])
    for wrong, said in (([500], "the longest prompt has 20 tokens"), (f"text={words}", "a text of several tokens is")):
        answer = server.complete(prompt, hookmap={**wanted, "positions": wrong})
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


def test_no_field_is_a_request_without_it(server: Server) -> None:
    answer = server.complete(prompts(1, 20)[0], hookmap=None)
    assert answer.status_code == 200 and "activations_meta" not in answer.json()


def test_what_a_request_is_too_long_for_is_the_clients_mistake(server: Server) -> None:
    mean = [{"do": "ablate", "to": "mean", "point": "mlp_out", "layers": [1]}]
    answer = server.complete(prompts(1, 60)[0], hookmap={"points": ["resid_post"], "interventions": mean})
    assert answer.status_code == 400 and "vLLM read the prompt in pieces" in answer.text


def test_settings_that_vllm_refuses_are_the_clients_mistake(server: Server) -> None:
    answer = server.complete(prompts(1, 20)[0], temperature=3, hookmap={"points": ["resid_post"]})
    assert answer.status_code == 400
    assert "temperature must be in [0, 2], got 3.0" in answer.json()["error"]["message"]


def test_openais_client(server: Server, plain: Plain) -> None:
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    [prompt] = prompts(1, 20, seed=7)
    asked: dict[str, Any] = {"model": vllm_server.MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 4}
    answer = client.completions.create(**asked, extra_body={"hookmap": {"points": list(POINTS)}})
    held_against(plain, hookmap.open_store(server.sessions / str(answer.model_extra["session_id"])), points=POINTS)
    with pytest.raises(BadRequestError, match="nope"):
        client.completions.create(**asked, extra_body={"hookmap": {"points": ["nope"]}})


def test_a_function_that_the_operator_allows(server: Server, checkpoint: Path) -> None:
    [prompt] = prompts(1, 20, seed=13)
    applied = {"do": "apply", "fn": TURNED, "point": "mlp_out", "layers": [1]}
    asked = {"points": ["resid_post"], "interventions": [applied]}
    answer = server.complete(prompt, hookmap=asked)
    assert answer.status_code == 200, answer.text
    own = hookmap.open(str(checkpoint), dtype="float32").capture(
        [prompt], ["resid_post"], interventions=[hookmap.apply(TURNED, "mlp_out", [1])], max_new_tokens=NEW
    )
    store = hookmap.open_store(server.sessions / answer.json()["session_id"])
    assert store.samples[0].token_ids == own.samples[0].token_ids
    torch.testing.assert_close(store.read(0, "resid_post", 2), own.read(0, "resid_post", 2), rtol=1e-4, atol=1e-3)
    for name in (BROKEN, "os:getcwd", None):
        refused = server.complete(prompt, hookmap={**asked, "interventions": [{**applied, "fn": name}]})
        assert refused.status_code == 400 and "is no function that this server calls" in refused.text


def test_vllms_own_way_of_further_arguments(vllms: Server, plain: Plain) -> None:
    [prompt] = prompts(1, 20, seed=8)
    answer = vllms.complete(prompt, vllm_xargs={"hookmap": '{"points": ["resid_mid", "resid_post"]}'}).json()
    held_against(plain, hookmap.open_store(vllms.sessions / answer["session_id"]), points=POINTS)
    wrong = vllms.complete(prompt, vllm_xargs={"hookmap": '{"point": 1}'})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "vllm_xargs.hookmap")
    both = vllms.complete(prompt, vllm_xargs={"hookmap": "{}"}, hookmap={})
    assert both.status_code == 400


def test_a_session_says_which_model_was_asked_for(vllms: Server) -> None:
    for name in (vllm_server.MODEL, SECOND):  # or an adapter
        answer = vllms.complete(prompts(1, 20)[0], model=name, max_tokens=1, hookmap={"points": ["resid_mid"]}).json()
        assert hookmap.open_store(vllms.sessions / answer["session_id"]).manifest.model == name


def test_vllms_other_routes_and_limits(vllms: Server) -> None:
    [prompt] = prompts(1, 20, seed=9)
    assert vllms.post("/v1/responses", input="w1", hookmap={"points": ["resid_mid"]}).status_code == 400
    scored: dict[str, Any] = {"query": "w1", "items": ["w2"], "label_token_ids": [5, 6]}
    assert vllms.post("/generative_scoring", **scored).status_code == 200
    assert vllms.post("/generative_scoring", **scored, hookmap={"points": ["resid_mid"]}).status_code == 400
    own = vllms.complete(prompt, store_activations=True)
    assert own.status_code == 400 and "a field of hookmap's own server" in own.text
    everything = vllms.complete(prompt, max_tokens=60, hookmap={"points": ["mlp_post", "resid_pre", "resid_post"]})
    assert everything.status_code == 400 and "100000 bytes" in everything.text
    for _ in range(22):
        answer = vllms.complete(prompt, max_tokens=1, hookmap={"points": ["resid_mid"], "layers": [0]})
    assert len([each for each in vllms.sessions.iterdir() if each.name.startswith("act-")]) == 20
    assert hookmap.open_store(vllms.sessions / answer.json()["session_id"]).manifest.finished


def test_settings_that_would_mean_something_else_on_vllm_are_refused(hookmaps: Server) -> None:
    [full] = prompts(1, SETTINGS["max_model_len"])
    for more, said in (
        ({"echo": True, "max_tokens": 0}, "the one that vLLM generates after what it reads do not fit"),
        ({"max_tokens": 1}, "maximum context length is 96 tokens"),
    ):
        answer = hookmaps.complete(full, **more)
        assert answer.status_code == 400 and said in answer.text
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    answer = hookmaps.complete(full[:9], logprobs=6)
    assert answer.status_code == 400 and "Requested sample logprobs of 6" in answer.text
    answer = hookmaps.complete(full[:9], min_tokens=5, stop="w1")
    assert answer.status_code == 400 and "vLLM would look for stop strings behind them alone" in answer.text


def test_a_key_is_needed(hookmaps: Server) -> None:
    hookmaps_headers, hookmaps.headers = hookmaps.headers, {}
    try:
        assert hookmaps.complete(prompts(1, 20)[0]).status_code == 401
    finally:
        hookmaps.headers = hookmaps_headers


def test_choices_and_logprobs_of_a_prompt(hookmaps: Server, plain: Plain) -> None:
    [prompt] = prompts(1, 20, seed=10)
    answer = hookmaps.complete(prompt, n=2, logprobs=1, echo=True, max_tokens=3, hookmap={"points": ["resid_post"]})
    body = answer.json()
    assert [sample["choice"] for sample in body["activations_meta"]["samples"]] == [0, 1]
    told = body["choices"][1]["logprobs"]["token_logprobs"]
    logits = plain.model(torch.tensor([plain.generated(prompt, 3)])).logits[0].log_softmax(-1)
    ids = plain.generated(prompt, 3)
    expected = [float(logits[at - 1, ids[at]]) for at in range(1, 23)]
    assert told[0] is None
    assert told[1:] == pytest.approx(expected, abs=1e-3)


def test_figures_of_each_token(hookmaps: Server, plain: Plain, checkpoint: Path) -> None:
    [prompt] = prompts(1, 20, seed=12)
    ids = plain.generated(prompt, 5)
    norm = {"return": "none", "summary": {"point": "resid_post", "of": "norm"}}
    told = hookmaps.complete(prompt, max_tokens=5, hookmap=norm).json()["activations_summary"]
    rows = plain.rows(ids)
    assert [each["position"] for each in told] == list(range(19, 24))
    for each in told:
        expected = [float(rows["resid_post", layer][each["position"]].norm()) for layer in range(3)]
        assert each["values"] == pytest.approx(expected, rel=1e-4)
    lens = {"return": "none", "summary": {"point": "resid_post", "of": "lens"}}
    told = hookmaps.complete(prompt, max_tokens=5, hookmap=lens).json()["activations_summary"]
    probabilities = plain.model(torch.tensor([ids])).logits[0].softmax(-1).max(-1).values
    for each in told:
        assert each["values"][-1] == pytest.approx(float(probabilities[each["position"]]), abs=1e-3)


def test_messages(server: Server, checkpoint: Path) -> None:
    given = {"messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 4, "hookmap": {"points": list(POINTS)}}
    answer = server.post("/v1/chat/completions", **given)
    assert answer.status_code == 200, answer.text
    whole = hookmap.open_store(server.sessions / answer.json()["session_id"])
    *_, last = server.stream("/v1/chat/completions", **given)
    streamed = hookmap.open_store(server.sessions / last["session_id"])
    assert whole.samples[0].token_ids == streamed.samples[0].token_ids
    assert torch.allclose(whole.read(0, "resid_mid", 1), streamed.read(0, "resid_mid", 1), rtol=0, atol=1e-4)


def test_a_plugin_that_is_not_switched_on_refuses(checkpoint: Path, tmp_path: Path) -> None:
    with vllm_server.vllms(checkpoint, tmp_path / "sessions", None) as server:
        [prompt] = prompts(1, 20)
        assert server.complete(prompt).status_code == 200
        for field in ({"hookmap": {"points": ["resid_mid"]}}, {"vllm_xargs": {"hookmap": "{}"}}):
            answer = server.complete(prompt, **field)
            assert answer.status_code == 400 and "--additional-config" in answer.text
        assert not server.sessions.exists()


@pytest.mark.parametrize(
    ("name", "how"), [("vllms", signal.SIGTERM), ("hookmaps", signal.SIGTERM), ("killed", signal.SIGKILL)]
)
def test_a_signal_ends_a_server_that_works_and_nothing_torn_is_readable(
    name: str, how: signal.Signals, request: pytest.FixtureRequest
) -> None:
    """The last of the file: it ends all servers."""
    server: Server = request.getfixturevalue(name)
    given = prompts(12, 20, seed=11)

    def ask(prompt: list[int]) -> None:
        try:
            server.complete(prompt, max_tokens=60, hookmap={"points": ["resid_mid"]})
        except Exception:  # it is gone
            return

    asking = [threading.Thread(target=ask, args=(prompt,)) for prompt in given]
    for each in asking:
        each.start()
    time.sleep(1.0)
    server.process.send_signal(how)
    server.process.wait(60)  # it ends by itself
    with contextlib.suppress(ProcessLookupError):  # its engine looks for it now and then
        os.killpg(server.process.pid, signal.SIGKILL)
    for each in asking:
        each.join(60)
    for folder in server.sessions.glob("act-*"):
        try:
            store = hookmap.open_store(folder)
        except StoreError:
            continue
        if store.manifest.finished:
            assert [sample.rows for sample in store.samples] == [len(sample.token_ids) - 1 for sample in store.samples]
            assert all(store.read(0, *key).isfinite().all() for key in store.keys)
