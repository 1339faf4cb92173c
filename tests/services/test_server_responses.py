"""/v1/responses: what chat would answer, as OpenAI's client reads it, in one piece and as events."""

import base64
import json
from typing import Any

import pytest
import safetensors.torch
import torch
from support.raises import raises
from support.served import MESSAGES, QUESTION, Served, demo

openai = pytest.importorskip("openai")
from openai.types.responses import Response, ResponseStreamEvent  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

from hookmap.services.server.errors import ApiError  # noqa: E402
from hookmap.services.server.response_requests import ResponseRequest  # noqa: E402
from hookmap.services.server.responses import ResponseWire  # noqa: E402

ASKED: dict[str, Any] = {"model": "hookmap-demo", "input": QUESTION, "temperature": 0}


def events(served: Served, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each held against openai's own types, and numbered one after the other."""
    answer = served.post("/v1/responses", **{**ASKED, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        TypeAdapter(ResponseStreamEvent).validate_python(found[-1])
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


@pytest.mark.slow
def test_the_text_is_that_of_chat(served: Served, client: Any) -> None:
    chat = served.chat(max_tokens=60).json()
    answer = client.responses.create(**ASKED, max_output_tokens=60)
    assert answer.output_text == chat["choices"][0]["message"]["content"]
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    usage = chat["usage"]
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
        usage["total_tokens"],
    )
    Response.model_validate(answer.to_dict())


@pytest.mark.slow
def test_a_stream_says_the_same_in_events(served: Served, client: Any) -> None:
    whole = client.responses.create(**ASKED, max_output_tokens=60)
    told = events(served, max_output_tokens=60)
    kinds = [each["type"].removeprefix("response.") for each in told]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    deltas = [each["delta"] for each in told if each["type"] == "response.output_text.delta"]
    assert len(deltas) > 10 and "".join(deltas) == whole.output_text
    with client.responses.stream(**ASKED, max_output_tokens=60) as stream:  # the client's own reading
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == whole.output_text


@pytest.mark.slow
def test_a_text_that_was_cut_off_says_so(served: Served, client: Any) -> None:
    answer = client.responses.create(**ASKED, max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete" and answer.output_text
    assert events(served, max_output_tokens=3)[-1]["type"] == "response.incomplete"


def test_items_and_instructions_are_the_messages_of_chat(served: Served) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "And one more?"},
    ]
    chat = served.chat(messages=messages, max_tokens=8).json()
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "7", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": "And one more?"},
    ]  # fmt: skip
    answer = served.post(
        "/v1/responses", **{**ASKED, "input": items, "instructions": "Be brief.", "max_output_tokens": 8}
    ).json()
    assert answer["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


@pytest.mark.slow
def test_logprobs_are_those_of_chat(served: Served, client: Any) -> None:
    chat = served.chat(max_tokens=4, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    include = ["message.output_text.logprobs"]
    answer = client.responses.create(**ASKED, max_output_tokens=4, include=include, top_logprobs=2)
    told = answer.output[0].content[0].logprobs
    assert [each.to_dict() for each in told] == chat
    streamed = events(served, max_output_tokens=4, include=include, top_logprobs=2)
    assert [each for event in streamed for each in event.get("logprobs", ()) if event["type"].endswith("delta")] == chat


@pytest.mark.slow
def test_activations_are_those_of_capture(served: Served, client: Any) -> None:
    record = {"points": ["resid_mid"], "layers": [8], "return": "inline"}
    run = demo().capture([MESSAGES], points="resid_mid", layers=8, max_new_tokens=4)
    answer = client.responses.create(**ASKED, max_output_tokens=4, extra_body={"hookmap": record})
    last = events(served, max_output_tokens=4, hookmap=record)[-1]["response"]
    for meta in (answer.activations_meta, last["activations_meta"]):
        held = safetensors.torch.load(base64.b64decode(meta["samples"][0]["safetensors"]))
        assert torch.equal(held["resid_mid.8"], run["resid_mid", 8][0])
    summary = {"return": "none", "summary": {"point": "resid_post", "of": "norm", "layers": [3]}}
    told = events(served, max_output_tokens=4, hookmap=summary)
    assert sum(len(each.get("activations_summary", ())) for each in told) == 4


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("background", True),
        ("truncation", "auto"),
        ("reasoning", {"effort": "low"}),
        ("prompt", {"id": "p"}),
        ("max_tool_calls", 3),
        ("include", ["file_search_call.results"]),
        ("n", 2),
        ("max_tokens", 3),
        ("max_output_tokens", 0),
        ("max_output_tokens", 10**6),
        ("tools.0.type", [{"type": "web_search"}]),
        ("tool_choice", "required"),
        ("tools", [{"type": "function", "name": "add"}]),
        ("input", []),
        ("input", "x" * 100_000),
        ("input.0.type", [{"type": "item_reference", "id": "msg_1"}]),
        ("input.0.content.0", [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]),
    ],
)
def test_what_is_not_done_is_refused_by_name(served: Served, param: str, value: Any) -> None:
    answer = served.post("/v1/responses", **{**ASKED, param.partition(".")[0]: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert param == "max_tokens" or not error["message"].startswith(("max_tokens:", "messages:", "response_format:"))


def test_what_asks_for_nothing_is_taken(client: Any) -> None:
    nothing = {"background": False, "truncation": "disabled", "store": True, "user": "me", "service_tier": "auto"}
    text: Any = {"format": {"type": "text"}}
    more: Any = {"reasoning": {"effort": None}}
    answer = client.responses.create(**ASKED, **nothing, **more, text=text, max_output_tokens=1)
    assert answer.store is False, "nothing is kept"


def test_earlier_calls_go_to_the_template_as_messages_of_chat() -> None:
    items = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "Let me see."},
        {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "3"},
    ]
    tools = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}]
    chat = ResponseRequest.model_validate({"input": items, "tools": tools}).chat()
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert [each.model_dump(exclude_none=True, exclude_defaults=True) for each in chat.messages] == [
        {"role": "user", "content": "1+2?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "call_1"},
    ]
    assert chat.tools is not None and chat.tools[0].function.name == "add"
    with raises(ApiError, "role"):
        ResponseRequest.model_validate({"input": [{"content": "x"}]}).chat()


def test_a_stream_that_fails_is_an_error_of_the_client() -> None:
    asked = ResponseRequest.model_validate(ASKED)
    wire = object.__new__(ResponseWire)
    wire._sent = 7
    told = wire.failing(ApiError(503, "out of memory", code="out_of_memory")).model_dump()
    assert asked.model == "hookmap-demo"
    TypeAdapter(ResponseStreamEvent).validate_python(told)
    assert (told["sequence_number"], told["code"], told["error"]["code"]) == (7, "out_of_memory", "out_of_memory")
