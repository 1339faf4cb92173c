"""The server as OpenAI's clients meet it: openai-python where it has a way, plain HTTP where it has none."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from support.served import MESSAGES, NAME, QUESTION, Served, serving

from hookmap.demo import MODEL_PATH
from hookmap.loading.prompts import encode
from hookmap.services.server.page import FILES

pytestmark = pytest.mark.slow


def generated(served: Served, **options: Any) -> tuple[list[str], list[list[int]]]:
    """What `generate` gives for the question, called directly: texts and the new token ids."""
    (prompt,) = encode([MESSAGES], served.hm.tokenizer)
    ids = torch.tensor([prompt.token_ids])
    seed = options.pop("seed", None)
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        out = served.hm.model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    new = [row[ids.shape[1] :].tolist() for row in out]
    return [served.hm.tokenizer.decode(row, skip_special_tokens=True) for row in new], new


def test_a_chat_answer_is_what_generate_gives_and_nothing_of_the_prompt(served: Served, client: OpenAI) -> None:
    texts, tokens = generated(served, max_new_tokens=48, do_sample=False)
    found = client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=48, temperature=0)
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (texts[0], "stop")
    assert choice.message.role == "assistant" and choice.message.tool_calls is None
    assert found.usage is not None
    assert found.usage.completion_tokens == len(tokens[0])
    (prompt,) = encode([MESSAGES], served.hm.tokenizer)
    assert found.usage.prompt_tokens == len(prompt.token_ids)
    assert found.model == NAME


def test_a_stream_is_the_same_text_and_ends_with_usage_and_done(served: Served, client: OpenAI) -> None:
    texts, tokens = generated(served, max_new_tokens=48, do_sample=False)
    stream = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=48, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == texts[0]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage and chunks[-1].usage.completion_tokens == len(tokens[0])
    raw = served.chat(stream=True).text
    assert raw.endswith("data: [DONE]\n\n")
    assert "usage" not in raw, "only who asks gets it"


@pytest.mark.slow
def test_max_tokens_ends_with_length_and_a_seed_repeats(served: Served, client: OpenAI) -> None:
    def ask(seed: int) -> Any:
        asked: dict[str, Any] = {"temperature": 4.0, "top_p": 0.99, "max_tokens": 12, "seed": seed}
        return client.chat.completions.create(model=NAME, messages=MESSAGES, **asked).choices[0]

    sampling = {"do_sample": True, "temperature": 4.0, "top_p": 0.99, "top_k": 0, "max_new_tokens": 12}
    first = ask(5)
    assert first.message.content == ask(5).message.content == generated(served, **sampling, seed=5)[0][0]
    # 12 tokens at temperature 4 over 259 characters: that six seeds give one text is less likely than 1e-6.
    assert len({ask(seed).message.content for seed in range(6)}) > 1
    assert client.completions.create(model=NAME, prompt="1", max_tokens=1).choices[0].finish_reason == "length"


def test_n_choices_are_the_rows_of_one_generate(served: Served) -> None:
    found = served.chat(n=3, temperature=4.0, seed=1, max_tokens=8).json()
    (prompt,) = encode([MESSAGES], served.hm.tokenizer)
    options = {"do_sample": True, "temperature": 4.0, "top_k": 0, "top_p": 1.0}
    run = served.hm.capture([list(prompt.token_ids)] * 3, ["embed"], max_new_tokens=8, seed=1, batch_size=3, **options)
    assert [choice["message"]["content"] for choice in found["choices"]] == run.texts
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    streamed = [""] * 3
    with OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        asked: Any = {"n": 3, "temperature": 4.0, "seed": 1, "max_tokens": 8, "stream": True}
        for chunk in client.chat.completions.create(model=NAME, messages=MESSAGES, **asked):
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == run.texts


@pytest.mark.parametrize("stop", [["zzz", "+4=<<3+4"], "T"])
def test_a_stop_string_ends_the_text_and_is_not_in_it(served: Served, stop: Any) -> None:
    (text,), _ = generated(served, max_new_tokens=48, do_sample=False)
    stops = [stop] if isinstance(stop, str) else stop
    expected = text[: min(text.find(s) for s in stops if s in text)]
    whole = served.chat(stop=stop, max_tokens=48).json()["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == (expected, "stop")
    with OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        asked: Any = {"stop": stop, "max_tokens": 48, "temperature": 0, "stream": True}
        chunks = list(client.chat.completions.create(model=NAME, messages=MESSAGES, **asked))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("penalty", [1.0, 2.5])
@pytest.mark.parametrize("kept", [False, True], ids=["plain", "kept"])
def test_logprobs_are_of_the_models_own_distribution(
    served: Served, client: OpenAI, penalty: float, kept: bool
) -> None:
    asked: Any = {"max_tokens": 5, "temperature": 0.6, "seed": 2, "logprobs": True, "top_logprobs": 3}
    asked["extra_body"] = {"repetition_penalty": penalty, "store_activations": kept}
    found = client.chat.completions.create(model=NAME, messages=MESSAGES, **asked)
    content = found.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and found.usage is not None
    assert len(content) == found.usage.completion_tokens
    options = {"do_sample": True, "temperature": 0.6, "top_k": 0, "max_new_tokens": 5, "seed": 2}
    options |= {"repetition_penalty": penalty}
    _, (new,) = generated(served, **options)
    (prompt,) = encode([MESSAGES], served.hm.tokenizer)
    with torch.no_grad():
        logits = served.hm.model(torch.tensor([[*prompt.token_ids, *new]])).logits[0].log_softmax(-1)
    for place, (token, told) in enumerate(zip(new, content, strict=True)):
        row = logits[len(prompt.token_ids) - 1 + place]
        assert told.token == served.hm.tokenizer.decode([token])
        assert told.logprob == pytest.approx(float(row[token]), abs=1e-3)
        tops = row.topk(3)
        assert [top.logprob for top in told.top_logprobs] == pytest.approx(tops.values.tolist(), abs=1e-3)
        assert told.top_logprobs[0].token == served.hm.tokenizer.decode([int(tops.indices[0])])
    streamed = list(client.chat.completions.create(model=NAME, messages=MESSAGES, stream=True, **asked))
    pieces = [c.choices[0].logprobs.content for c in streamed if c.choices[0].logprobs]
    assert [piece[0] for piece in pieces if piece] == content


@pytest.mark.slow
def test_completions_take_texts_and_tokens_and_are_what_generate_gives(served: Served, client: OpenAI) -> None:
    ids = served.hm.tokenizer("2+2=")["input_ids"]
    prompts: list[Any] = ["2+2=", ["2+2=", "Tom has"], ids, [ids, ids[:2]]]
    for prompt in prompts:
        asked: Any = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
        found = client.completions.create(model=NAME, **asked)
        each = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        run = served.hm.capture(each, ["embed"], max_new_tokens=6, batch_size=1)
        assert [choice.text for choice in found.choices] == run.texts
        texts = [""] * len(each)
        for chunk in client.completions.create(model=NAME, stream=True, **asked):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == run.texts
        assert found.usage is not None
        assert found.usage.prompt_tokens == sum(sample.prompt_tokens for sample in run.samples)
        assert found.usage.completion_tokens == sum(len(s.token_ids) - s.prompt_tokens for s in run.samples)
    found = client.completions.create(model=NAME, prompt="2+2=", max_tokens=3, logprobs=2)
    logprobs: Any = found.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 3
    assert "".join(logprobs.tokens) == found.choices[0].text


def test_the_model_list_and_the_error_for_another_model(client: OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    assert "Loaded: hookmap-demo" in error.value.message


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"tempratur": 1}, "tempratur", "unknown field"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"n": 17}, "n", "16 is the most"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "Input should be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "parts of type image_url"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
            "messages",
            "prompt 0, message 0 has an image, and Qwen3ForCausalLM reads text only",
        ),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "json_object or json_schema"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "chat template takes none"),
        ({"tool_choice": "required"}, "tool_choice", "cannot force a call"),
        ({"stop": ""}, "stop", "1 to 1000 characters"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"max_tokens": 5000}, "max_tokens", "at most 4096"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "cannot be given"),
        (
            {"chat_template_kwargs": {"enable_thinkin": True}},
            "chat_template_kwargs",
            "the chat template reads no enable_thinkin",
        ),
        ({"messages": [{"role": "user", "content": "x", "images": ["y"]}]}, "messages", "parts of type image_url"),
        ({"hookmap": {"positions": "text=zzzz"}}, "hookmap.positions", "no single token"),
        ({"hookmap": {"positions": [9999]}}, "hookmap.positions", "positions 9999: no prompt has them"),
        ({"hookmap": {"positions": "0:" + "9" * 5000}}, "hookmap.positions", "positions"),
        ({"hookmap": {"layers": [99]}}, "hookmap.layers", "layer 99 is out of range"),
        ({"hookmap": {"points": ["resid_mdi"], "layers": [3]}}, "hookmap.points", "did you mean resid_mid"),
        ({"hookmap": {"points": ["resid_mdi"], "layers": [99]}}, "hookmap", "2 problems"),
        ({"hookmap": {"features": [64]}}, "hookmap.features", "0 to 63"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens", "max_completion_tokens: 5000"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "expected a text"),
        ({"hookmap": {"features": 3, "features_seed": 2**70}}, "hookmap.features_seed", "64 bits"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_what_is_not_understood_is_refused_with_its_name(
    served: Served, body: dict[str, Any], param: str | None, told: str
) -> None:
    answer = served.chat(**body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert told in error["message"]


def test_a_query_parameter_that_no_route_reads_is_refused(served: Served) -> None:
    for path, told in (
        ("/v1/models?limit=3", "limit: unknown query parameter of /v1/models; it takes none"),
        ("/v1/model/structure?modell=x", "it knows model"),
        ("/v1/activations/sessions?ordr=x", "ordr"),
        ("/health?x=1", "x: unknown query parameter"),
    ):
        answer = served.get(path)
        assert answer.status_code == 400 and told in answer.json()["error"]["message"]
    assert served.get(f"/v1/model/structure?model={NAME}").status_code == 200


def test_a_conversation_begins_another_turn_or_goes_on_as_in_vllm(served: Served) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Tom has 3+"}]
    tokenizer = served.hm.tokenizer
    for body, how in (
        ({}, {"add_generation_prompt": True}),
        ({"continue_final_message": True}, {"continue_final_message": True}),
        ({"add_generation_prompt": False}, {}),
    ):
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how)
        found = served.chat(messages=messages, max_tokens=3, **body).json()
        assert found["usage"]["prompt_tokens"] == len(ids)
        (run,) = served.hm.generate(ids, max_new_tokens=3).texts
        assert found["choices"][0]["message"]["content"] == run
    both = served.chat(messages=messages, add_generation_prompt=True, continue_final_message=True)
    assert both.status_code == 400 and "Give one of them" in both.json()["error"]["message"]


def test_a_prompt_that_does_not_fit_is_refused_with_the_figures(served: Served) -> None:
    long = [{"role": "user", "content": "x" * 2000}]
    error = served.chat(messages=long, max_tokens=None).json()["error"]
    assert error["code"] == "context_length_exceeded" and "maximum context length is 1024" in error["message"]
    assert error["param"] == "messages"
    for count in (2000, 10**6):  # the second is refused by its characters
        for path, field in (("completions", "prompt"), ("responses", "input"), ("embeddings", "input")):
            error = served.post(f"/v1/{path}", **{field: "x" * count}).json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", field), path
    (prompt,) = encode([MESSAGES], served.hm.tokenizer)
    left = 1024 - len(prompt.token_ids)
    assert served.chat(max_tokens=left + 1).json()["error"]["code"] == "context_length_exceeded"
    assert served.chat(max_tokens=left, stop="T").status_code == 200
    assert served.chat(max_tokens=None, max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_broken_bodies_and_ways_are_told_as_errors_are(served: Served) -> None:
    url = f"{served.url}/v1/chat/completions"
    broken = httpx.post(url, content=b"{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 400 and "not JSON" in broken.json()["error"]["message"]
    bare = httpx.post(url, content=b'{"messages": []}')
    assert bare.status_code == 400 and "Content-Type: application/json" in bare.json()["error"]["message"]
    nowhere = served.get("/v1/nothing").json()["error"]
    assert nowhere["type"] == "not_found_error" and "nothing at /v1/nothing" in nowhere["message"]
    way = served.get("/v1/chat/completions")
    assert way.status_code == 405 and "expected POST" in way.json()["error"]["message"]
    for body in (b"", b"[]"):
        empty = httpx.post(url, content=body, headers={"Content-Type": "application/json"})
        assert empty.status_code == 400 and "expected a JSON object" in empty.json()["error"]["message"]
    half = httpx.post(
        url,
        content=b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        headers={"Content-Type": "application/json"},
    )
    assert half.status_code == 400


@pytest.mark.parametrize("more", [{}, {"seed": 1}, {"store_activations": True}], ids=["plain", "alone", "kept"])
def test_half_a_surrogate_pair_as_a_stop_string_is_refused_and_the_server_goes_on(
    served: Served, more: dict[str, Any]
) -> None:
    body = json.dumps({"messages": MESSAGES, "max_tokens": 1, "stop": ["\ud800"], **more})
    headers = {"Content-Type": "application/json"}
    refused = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=headers, timeout=240)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stop")
    assert served.chat(max_tokens=1).status_code == 200


def test_names_of_the_template_do_not_meet_those_of_the_code(served: Served) -> None:
    for name in ("messages", "number", "tokenizer", "options"):
        answer = served.chat(max_tokens=3, chat_template_kwargs={name: []})
        assert answer.status_code == 400, name
        told = answer.json()["error"]["message"]
        assert ("multiple values" if name == "messages" else f"the chat template reads no {name}") in told


def test_no_refusal_names_a_folder_of_the_server(served: Served) -> None:
    error = served.chat(hookmap={"points": ["nope"]}).json()["error"]["message"]
    assert str(MODEL_PATH) not in error and "GET /v1/model/structure" in error


def test_every_answer_has_a_request_id_and_a_given_one_comes_back(served: Served) -> None:
    assert served.get("/health").headers["x-request-id"] != served.get("/health").headers["x-request-id"]
    assert served.get("/nothing", **{"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert served.get("/health", **{"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


def test_metrics_count_requests_and_name_no_client(served: Served) -> None:
    served.chat(max_tokens=1)
    served.get("/v1/secret-path")
    text = served.get("/metrics").text
    assert 'hookmap_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'hookmap_requests_waiting{model="hookmap-demo"} 0.0' in text
    assert "secret-path" not in text


def test_the_structure_is_the_map_and_the_tree(served: Served) -> None:
    found = served.get("/v1/model/structure").json()
    assert found["map"] == served.hm.map.model_copy(update={"model_id": NAME}).to_document()
    assert str(MODEL_PATH) not in str(found), "a client learns no path of the server"
    assert (found["layers"], "resid_mid" in found["points"]) == (20, True)
    assert "input_layernorm" in found["tree"] and "● resid_mid" in found["tree"]


def test_the_question_is_sent_as_a_template_writes_it(served: Served) -> None:
    """A developer's message is a system's, parts are lines, and what an answer carries besides is ignored."""
    messages: list[Any] = [
        {"role": "developer", "content": "Count."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "annotations": []},
        {"role": "user", "content": QUESTION},
    ]
    plain = [{"role": "system", "content": "Count."}, {"role": "user", "content": "a\nb"}]
    plain += [{"role": "assistant", "content": "c"}, {"role": "user", "content": QUESTION}]
    run = served.hm.capture([plain], ["embed"], max_new_tokens=12)
    assert served.chat(messages=messages).json()["choices"][0]["message"]["content"] == run.texts[0]


def test_the_page_may_ask_nobody_else(served: Served) -> None:
    for path, (_, kind) in FILES.items():
        page = served.get(path)
        assert page.headers["content-type"].startswith(kind)
        rules = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
        assert rules["default-src"] == "'none'" and rules["connect-src"] == rules["script-src"] == "'self'"
        assert "https://" not in page.text and "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("echo", [None, True])
def test_an_echo_is_the_prompt_before_the_text_also_in_a_stream(served: Served, client: OpenAI, echo: Any) -> None:
    ids = served.hm.tokenizer("Tom has")["input_ids"]
    (plain,) = client.completions.create(model=NAME, prompt="2+2=", max_tokens=4, temperature=0).choices
    for prompt, text in (("2+2=", "2+2="), (["2+2=", "Tom has"], "2+2="), ([ids], "Tom has")):
        asked: Any = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "echo": echo}
        whole = client.completions.create(model=NAME, **asked).choices
        assert whole[0].text.startswith(text) is bool(echo)
        if text == "2+2=":
            assert whole[0].text == ("2+2=" if echo else "") + plain.text
        streamed = [""] * len(whole)
        for chunk in client.completions.create(model=NAME, stream=True, **asked):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == [choice.text for choice in whole]


def test_an_echo_with_logprobs_scores_the_prompt_as_the_model_does(served: Served, client: OpenAI) -> None:
    """What lm-eval reads: each prompt token's logprob, and whether it is the likeliest."""
    ids: list[list[int]] = [served.hm.tokenizer(text)["input_ids"] for text in ("Tom has 3 apples. " * 8, "2+2=4")]
    assert len(ids[0]) > 128, "more than one piece of the distribution"
    asked: Any = {"prompt": ids, "max_tokens": 2, "temperature": 0, "logprobs": 2, "echo": True, "n": 2, "seed": 1}
    found = client.completions.create(model=NAME, **asked).choices
    streamed: list[list[Any]] = [[] for _ in found]
    for chunk in client.completions.create(model=NAME, stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.logprobs.token_logprobs or [] if choice.logprobs else []
    for choice in found:
        prompt, told = ids[choice.index // 2], choice.logprobs
        assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
        new = served.hm.tokenizer("".join(told.tokens[len(prompt) :]))["input_ids"]
        with torch.no_grad():
            logits = served.hm.model(torch.tensor([[*prompt, *new]])).logits[0].log_softmax(-1)
        assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None), "nothing stands before the first token"
        assert len(told.token_logprobs) == len(prompt) + 2 and streamed[choice.index] == told.token_logprobs
        assert choice.text == "".join(told.tokens)
        assert [choice.text[at:][: len(t)] for at, t in zip(told.text_offset, told.tokens, strict=True)] == told.tokens
        for place, token in enumerate([*prompt, *new][1:]):
            row, own, top = logits[place], told.token_logprobs[place + 1], told.top_logprobs[place + 1]
            assert own == pytest.approx(float(row[token]), abs=1e-3)
            assert (own == max(top.values())) == (int(row.argmax()) == token)
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-3)


def test_an_echo_is_of_the_run_with_its_interventions(served: Served) -> None:
    steer = {"do": "steer", "point": "resid_post", "layers": [4], "vector": [3.0] * 64, "strength": 2.0}
    body: dict[str, Any] = {"prompt": "2+2=", "max_tokens": 1, "logprobs": 0, "echo": True, "temperature": 0}
    edited = {"hookmap": {"return": "none", "interventions": [steer]}}
    plain, changed = (served.post("/v1/completions", **body, **more).json()["choices"][0] for more in ({}, edited))
    run = served.hm.capture(["2+2="], ["logits"], max_new_tokens=1, interventions=[steer])
    logits = run.read(0, "logits").log_softmax(-1)
    ids = run.tokens[0]
    expected = [float(logits[place, token]) for place, token in enumerate(ids[1:-1])]
    assert changed["logprobs"]["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-3)
    assert changed["logprobs"]["token_logprobs"] != plain["logprobs"]["token_logprobs"]
    clamp = {**steer, "point": "logits", "layers": "all", "vector": [1.0] * 259}
    refused = served.post("/v1/completions", **body, hookmap={"return": "none", "interventions": [clamp]})
    assert refused.status_code == 400


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_an_echo_of_no_new_token_is_the_prompt_and_its_scores(
    served: Served, client: OpenAI, logprobs: int | None, stream: bool
) -> None:
    """As vLLM answers it, for log-likelihoods; usage counts no token, a session keeps the prompt's rows."""
    ids = served.hm.tokenizer("Tom has 3 apples.")["input_ids"]
    record = {"hookmap": {"points": ["resid_mid"], "layers": [3]}}
    asked: Any = {"prompt": [ids, ids[:5]], "echo": True, "logprobs": logprobs, "n": 2, "extra_body": record}
    scored = served.post("/v1/completions", prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0).json()
    expected = scored["choices"][0]["logprobs"]["token_logprobs"][:-1]
    found = client.completions.create(model=NAME, max_tokens=0, stream=stream, **asked)
    if stream:
        chunks = list(found)
        texts, scores = [""] * 4, [list[Any]() for _ in range(4)]
        for choice in (chunk.choices[0] for chunk in chunks):
            texts[choice.index] += choice.text
            scores[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
        meta = chunks[-1].activations_meta
    else:
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids) + 5, 0)
        assert {choice.finish_reason for choice in found.choices} == {"length"}
        texts = [choice.text for choice in found.choices]
        scores = [choice.logprobs.token_logprobs if choice.logprobs else [] for choice in found.choices]
        meta = found.activations_meta
    assert texts == ["Tom has 3 apples."] * 2 + ["Tom h"] * 2
    assert scores[0] == pytest.approx(expected if logprobs else [])
    assert [len(each) for each in scores] == ([len(ids)] * 2 + [5] * 2 if logprobs else [0] * 4)
    assert [each["rows"] for each in meta["samples"]] == [each["tokens"] for each in meta["samples"]]
    assert [each["shape"][0] for each in meta["tensors"]] == [len(ids)] * 2 + [5] * 2
    whole = served.post("/v1/completions", prompt=[65] * 1024, echo=True, max_tokens=0)
    assert whole.status_code == 200, "a prompt may fill the context"
    assert served.post("/v1/completions", prompt=[65] * 1025, echo=True, max_tokens=0).status_code == 400


def test_an_echo_whose_logits_do_not_fit_is_refused_with_the_figure(tmp_path: Path) -> None:
    body: dict[str, Any] = {"prompt": [[65] * 9, [65] * 10], "echo": True, "logprobs": 0, "max_tokens": 1}
    with serving(tmp_path, request_bytes=2 * 10 * 259 * 4) as served:
        assert served.post("/v1/completions", **body, n=2).status_code == 200
        error = served.post("/v1/completions", **body, n=3).json()["error"]
        assert error["code"] == "echo_too_large" and str(3 * 10 * 259 * 4) in error["message"]
        assert served.post("/v1/completions", **{**body, "logprobs": None}, n=3).status_code == 200
