"""The fields of POST /v1/responses, and the chat request that says the same. Nothing is kept between two of them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hookmap.services.server.errors import ApiError, bad
from hookmap.services.server.requests import (
    ChatRequest,
    Function,
    ImageURL,
    Message,
    Part,
    Recording,
    Strict,
    Tool,
    Whole,
)

LOGPROBS = "message.output_text.logprobs"
"""the only thing that may be included"""
_SHARED = (
    "model temperature top_p top_k min_p repetition_penalty presence_penalty frequency_penalty logit_bias seed stop "
    "min_tokens ignore_eos stop_token_ids stream hookmap store_activations metadata tool_choice parallel_tool_calls "
    "chat_template_kwargs top_logprobs"
).split()
"""fields that chat requests have under the same name, and with the same meaning"""
_OF_CHAT = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
"""a chat request's field -> the one that it was made from"""
_ASKS_NOTHING: Mapping[str, Sequence[Any]] = {
    "background": (False,),
    "conversation": (),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "truncation": ("disabled",),
}
"""what is not done, and besides null the values that ask for nothing"""


class InputPart(BaseModel):
    """A part of an item: text, or an image. What OpenAI's own answers carry besides is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    type: str
    text: str | None = None
    image_url: str | None = Field(None, description="data:image/png;base64,…")


class Item(BaseModel):
    """One item of the input: a message, a call of an earlier answer, or what a call gave."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class TextFormat(Strict):
    """What the text is to be, as `response_format` of chat says it."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class FunctionTool(Strict):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class EventOptions(Strict):
    include_obfuscation: bool | None = None


class ResponseRequest(Strict):
    """POST /v1/responses."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: Whole | None = None
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = Field(None, description=LOGPROBS)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    stream_options: EventOptions | None = None
    metadata: dict[str, str] | None = None
    hookmap: Recording | None = Field(None, description="keep activations of this run")
    store_activations: bool | None = None

    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**62), le=2**62)
    stop: str | list[str] | None = None
    min_tokens: Whole | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    background: Any = None
    conversation: Any = None
    max_tool_calls: Any = None
    previous_response_id: Any = None
    prompt: Any = None
    reasoning: Any = None
    truncation: Any = None

    store: Any = None
    user: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def tells_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or self.top_logprobs is not None

    def chat(self) -> ChatRequest:
        """The same as a chat request. Raises ApiError for what is asked and not supported."""
        for name, nothing in _ASKS_NOTHING.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                value = {key: each for key, each in value.items() if each is not None}
            if value is not None and value not in nothing:
                raise bad(f"{name}: this server keeps no responses and does not do it; leave it out.", name)
        if unknown := [each for each in self.include or () if each != LOGPROBS]:
            raise bad(f"include: {unknown[0]!r:.60} is not there; only {LOGPROBS}.", "include")
        shared = {name: getattr(self, name) for name in _SHARED}
        return ChatRequest.model_construct(
            **shared,
            messages=self._messages(),
            max_tokens=self.max_output_tokens,
            logprobs=self.tells_logprobs or None,
            tools=[_tool(tool) for tool in self.tools] if self.tools else None,
            response_format=_format(self.text.format) if self.text and self.text.format else None,
        )

    def _messages(self) -> list[Message]:
        found = [Message(role="system", content=self.instructions)] if self.instructions else []
        items = [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for number, item in enumerate(items):
            where = f"input.{number}"
            if item.type == "message":
                if item.role is None:
                    raise bad(f"{where}.role: a message has one.", f"{where}.role")
                found.append(Message(role=item.role, content=_content(item.content, where)))
            elif item.type == "function_call":
                function = {"name": item.name, "arguments": item.arguments or ""}
                call = {"id": item.call_id, "type": "function", "function": function}
                before = found.pop() if found and found[-1].role == "assistant" else Message(role="assistant")
                found.append(before.model_copy(update={"tool_calls": [*(before.tool_calls or ()), call]}))
            elif item.type == "function_call_output":
                content = _content(item.output, where)
                found.append(Message(role="tool", content=content, tool_call_id=item.call_id))
            else:
                raise bad(
                    f"{where}.type: {item.type!r:.40}; this server reads message, function_call and "
                    "function_call_output.",
                    f"{where}.type",
                )
        if not found:
            raise bad("input: expected a text, or a list of items; got nothing.", "input")
        return found


def renamed(error: ApiError) -> ApiError:
    """The error about a chat request, in the words of the request that it was made from."""
    message, param = str(error), error.param
    for old, new in _OF_CHAT.items():
        message = new + message[len(old) :] if message.startswith(old) else message.replace(f" {old}.", f" {new}.")
        param = new + param[len(old) :] if param and param.startswith(old) else param
    return ApiError(error.status, message, param=param, code=error.code, headers=error.headers)


def _content(content: str | Sequence[InputPart] | None, where: str) -> str | list[Part]:
    if content is None or isinstance(content, str):
        return content or ""
    found = list[Part]()
    for number, part in enumerate(content):
        if part.type in ("input_text", "output_text") and part.text is not None:
            found.append(Part(type="text", text=part.text))
        elif part.type == "input_image" and part.image_url is not None:
            found.append(Part(type="image_url", image_url=ImageURL(url=part.image_url)))
        else:
            place = f"{where}.content.{number}"
            raise bad(f"{place}: this server reads input_text and output_text, and input_image by its URL.", place)
    return found


def _tool(tool: FunctionTool) -> Tool:
    return Tool(type="function", function=Function.model_validate(tool.model_dump(exclude={"type"}, exclude_none=True)))


def _format(asked: TextFormat) -> dict[str, Any]:
    if asked.type != "json_schema":
        return {"type": asked.type}
    return {"type": asked.type, asked.type: asked.model_dump(by_alias=True, exclude_none=True, exclude={"type"})}
