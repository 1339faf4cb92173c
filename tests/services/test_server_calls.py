"""Tools through the API: a model that calls them, as openai-python reads its answers, and the turn after."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from support.raises import raises
from support.scripted import scripted
from support.served import NAME, Served, serving

pytestmark = pytest.mark.slow

ASK: list[Any] = [{"role": "user", "content": "What are 3 and 4, and what time is it?"}]
CALLS = (
    'Let me see. <tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {"zone": "Zürich"}}\n</tool_call>'
)
LAST = "They are 7, and it is noon."


class add(BaseModel):
    """Two numbers."""

    a: int
    b: int


class now(BaseModel):
    zone: str


TOOLS: list[Any] = [openai.pydantic_function_tool(add), openai.pydantic_function_tool(now)]
NO_TOOLS = 'I write <tool_call>{"name": "add", "arguments": {}}</tool_call> as text.'


def after(message: dict[str, Any]) -> list[Any]:
    """The messages of the second turn: the answer as it came, and what the tools gave."""
    ids = [call["id"] for call in message["tool_calls"]]
    results = zip(ids, ["7", "noon"], strict=True)
    return [*ASK, message, *({"role": "tool", "tool_call_id": id, "content": text} for id, text in results)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tokenizer = scripted({}).tokenizer

    def prompt(messages: list[Any], **options: Any) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        return str(text)

    called = [
        {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}},
        {"id": "y", "type": "function", "function": {"name": "now", "arguments": {"zone": "Zürich"}}},
    ]
    second = after({"role": "assistant", "content": "Let me see. ", "tool_calls": called})
    answers = {prompt(ASK): NO_TOOLS, prompt(ASK, tools=TOOLS): CALLS, prompt(second, tools=TOOLS): LAST}
    with serving(tmp_path_factory.mktemp("sessions"), scripted(answers), points=("resid_post",), layers="all") as found:
        yield found


def right(message: Any) -> None:
    assert message.content == "Let me see. "
    calls = [(call.type, call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
    assert calls == [("function", "add", {"a": 3, "b": 4}), ("function", "now", {"zone": "Zürich"})]
    assert len({call.id for call in message.tool_calls}) == 2


def test_calls_are_read_and_openai_parses_their_arguments(client: OpenAI, served: Served) -> None:
    found = client.chat.completions.parse(model=NAME, messages=ASK, tools=TOOLS, temperature=0)
    (choice,) = found.choices
    right(choice.message)
    assert choice.finish_reason == "tool_calls"
    parsed = [call.function.parsed_arguments for call in choice.message.tool_calls or []]
    assert parsed == [add(a=3, b=4), now(zone="Zürich")]
    said = served.hm.tokenizer(CALLS, add_special_tokens=False)["input_ids"]
    assert found.usage is not None and found.usage.completion_tokens == len(said) + 1, "the end is a token"


def test_a_stream_of_calls_is_the_same_and_none_of_it_is_sent_as_text(client: OpenAI) -> None:
    with client.chat.completions.stream(model=NAME, messages=ASK, tools=TOOLS, temperature=0) as stream:
        texts = [event.delta for event in stream if event.type == "content.delta"]
        found = stream.get_final_completion()
    assert "".join(texts) == "Let me see. "
    right(found.choices[0].message)
    assert found.choices[0].finish_reason == "tool_calls"
    parsed = [call.function.parsed_arguments for call in found.choices[0].message.tool_calls or []]
    assert parsed == [add(a=3, b=4), now(zone="Zürich")]


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
def test_each_choice_has_its_own_calls(client: OpenAI, streams: bool) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": ASK, "tools": TOOLS, "n": 2, "tool_choice": "auto"}
    if streams:
        with client.chat.completions.stream(**asked) as stream:
            found: Any = stream.get_final_completion()
    else:
        found = client.chat.completions.create(**asked)
    for choice in found.choices:
        right(choice.message)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert len({call.id for choice in found.choices for call in choice.message.tool_calls}) == 4


def test_without_tools_or_with_none_a_call_is_text(client: OpenAI) -> None:
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        found = client.chat.completions.create(model=NAME, messages=ASK, temperature=0, **options)  # type: ignore[call-overload]
        (choice,) = found.choices
        assert (choice.message.content, choice.finish_reason) == (NO_TOOLS, "stop")
        assert choice.message.tool_calls is None


def test_what_the_tools_gave_goes_back_and_the_answer_comes(client: OpenAI) -> None:
    first = client.chat.completions.create(model=NAME, messages=ASK, tools=TOOLS, temperature=0)
    messages = after(first.choices[0].message.model_dump(exclude_none=True))
    second = client.chat.completions.create(model=NAME, messages=messages, tools=TOOLS, temperature=0)
    assert (second.choices[0].message.content, second.choices[0].finish_reason) == (LAST, "stop")


def test_a_stop_string_inside_a_call_leaves_what_came_as_text(client: OpenAI) -> None:
    found = client.chat.completions.create(model=NAME, messages=ASK, tools=TOOLS, temperature=0, stop='"b"')
    (choice,) = found.choices
    assert choice.message.content == CALLS[: CALLS.index('"b"')] and choice.finish_reason == "stop"


def test_activations_are_kept_beside_calls(client: OpenAI, served: Served) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "temperature": 0, "extra_body": {"store_activations": True}}
    found: Any = client.chat.completions.create(model=NAME, messages=ASK, **asked)
    right(found.choices[0].message)
    assert found.usage is not None
    (tensor,) = found.activations_meta["tensors"]
    assert tensor["shape"] == [found.usage.total_tokens - 1, 260]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice"),
    ],
    ids=["required", "named"],
)
def test_a_call_is_not_forced(client: OpenAI, options: dict[str, Any], param: str) -> None:
    with raises(openai.BadRequestError, "cannot force a call") as error:
        client.chat.completions.create(model=NAME, messages=ASK, **options)  # type: ignore[call-overload]
    assert error.value.param == param


def test_responses_have_the_calls_as_items_and_take_what_the_tools_gave(client: OpenAI, served: Served) -> None:
    tools: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
    asked: dict[str, Any] = {"model": NAME, "tools": tools, "temperature": 0}
    first = client.responses.create(**asked, input=ASK)
    message, *calls = first.output
    assert (message.type, first.output_text, first.status) == ("message", "Let me see. ", "completed")
    told = [(call.type, call.name, json.loads(call.arguments)) for call in calls]
    assert told == [("function_call", "add", {"a": 3, "b": 4}), ("function_call", "now", {"zone": "Zürich"})]
    with client.responses.stream(**asked, input=ASK) as stream:
        seen = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert [(call.name, call.arguments) for call in streamed.output[1:]] == [
        (each.name, each.arguments) for each in calls
    ]
    assert seen.count("response.output_item.done") == 3 and "response.function_call_arguments.done" in seen
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": text}
        for call, text in zip(calls, ["7", "noon"], strict=True)
    ]
    second = client.responses.create(**asked, input=[*ASK, *(item.to_dict() for item in first.output), *results])
    assert second.output_text == LAST
