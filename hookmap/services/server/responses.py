"""POST /v1/responses: the answer as OpenAI writes it there, built from the events that a stream of it sends."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict

from hookmap.loading.prompts import text_of
from hookmap.services.server.chat import ChoiceText, RowLogprobs
from hookmap.services.server.errors import ApiError
from hookmap.services.server.jobs import Job, Result
from hookmap.services.server.response_requests import ResponseRequest
from hookmap.services.server.spelling import Spelling
from hookmap.services.server.streaming import extras, reason_of, summaries, usage_of
from hookmap.services.server.tokens import Token
from hookmap.services.server.tool_calls import Call, reads_calls


class Answered(BaseModel):
    """The answer: OpenAI's fields, and `session_id` and `activations_meta` where rows are kept."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: str
    created_at: int
    status: str
    output: list[dict[str, Any]]


class Event(BaseModel):
    """One event of a stream."""

    model_config = ConfigDict(extra="allow")
    type: str
    sequence_number: int


class ResponseWire:
    """Writes responses. See `streaming.Wire`."""

    named = True

    def __init__(self, asked: ResponseRequest, job: Job, model: str, tokenizer: Any) -> None:
        tools = bool(asked.tools) and asked.tool_choice != "none" and reads_calls(tokenizer)
        self._text = ChoiceText(tokenizer, job, tools)
        self._logprobs = RowLogprobs(Spelling(tokenizer)) if asked.tells_logprobs else None
        self._job, self._decode = job, partial(text_of, tokenizer)
        self._sent = 0
        self._said, self._told = "", list[dict[str, Any]]()
        """the message's text so far, and its tokens' logprobs"""
        self._output = list[dict[str, Any]]()
        """the items so far; the message is the first, once it has begun"""
        self._head: dict[str, Any] = {
            "id": f"resp_{job.id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": _format(asked)},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [_tool(tool.model_dump(exclude_none=True)) for tool in asked.tools or ()],
            "top_p": asked.top_p,
            "truncation": "disabled",
        }

    def opening(self) -> Iterator[Event]:
        """That the response is there."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))

    def piece(self, token: Token) -> Sequence[Event]:
        """The text that a token completes; with logprobs or a summary every token has an event."""
        if token.prompt:
            return ()
        text = self._text.add(token.id)
        told = [self._logprobs.of(token).model_dump()] if self._logprobs else []
        for each in (each for one in told for each in (one, *one["top_logprobs"])):
            each["bytes"] = each["bytes"] or []
        more = summaries(self._job, [token], self._decode)
        return list(self._delta(text, told, more)) if text or told or more else ()

    def closing(self, result: Result) -> Iterator[Event]:
        """The rest of the text, the calls, and the whole response."""
        text, calls = self._text.end()
        if text or not (calls or self._output):
            yield from self._delta(text, [], {})
        cut = not calls and reason_of(self._job, self._text.text, result.new[0]) == "length"
        status = "incomplete" if cut else "completed"
        if self._output:
            yield from self._end_message(status)
        for call in calls:
            yield from self._call(call)
        usage = usage_of(self._job, result)
        counted = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }
        more = {"usage": counted, "incomplete_details": {"reason": "max_output_tokens"} if cut else None}
        response = self._response(status, **more, completed_at=None if cut else int(time.time()), **extras(result))
        yield self._event(f"response.{status}", response=response)

    def failing(self, error: ApiError) -> Event:
        """See `Wire`."""
        told = error.body()["error"]
        return self._event("error", **{name: told[name] for name in ("code", "message", "param")}, error=told)

    def whole(self, result: Result, tokens: list[Token]) -> Answered:
        """What the last event of a stream says."""
        for token in tokens or [Token(0, id) for id in result.new[0]]:
            self.piece(token)
        *_, last = self.closing(result)
        more = summaries(self._job, tokens, self._decode)
        return Answered.model_validate({**last.model_dump()["response"], **more})

    def _delta(self, text: str, told: list[dict[str, Any]], more: dict[str, Any]) -> Iterator[Event]:
        if not self._output:
            item = {"type": "message", "role": "assistant", "content": [], "status": "in_progress"}
            self._output.append({"id": f"msg_{self._job.id}", **item})
            yield self._event("response.output_item.added", output_index=0, item=self._output[0])
            yield self._event("response.content_part.added", **self._place, part=self._part())
        self._said += text
        self._told += told
        yield self._event("response.output_text.delta", **self._place, delta=text, logprobs=told, **more)

    def _end_message(self, status: str) -> Iterator[Event]:
        place = self._place
        yield self._event("response.output_text.done", **place, text=self._said, logprobs=self._told)
        yield self._event("response.content_part.done", **place, part=self._part())
        self._output[0] = {**self._output[0], "content": [self._part()], "status": status}
        yield self._event("response.output_item.done", output_index=0, item=self._output[0])

    def _call(self, call: Call) -> Iterator[Event]:
        number, id = len(self._output), f"fc_{call.id.removeprefix('call_')}"
        item = {"type": "function_call", "id": id, "call_id": call.id, "name": call.name, "arguments": ""}
        place = {"item_id": id, "output_index": number}
        begun = {**item, "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=number, item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        told = {"name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", **place, **told)
        self._output.append({**item, "arguments": call.arguments, "status": "completed"})
        yield self._event("response.output_item.done", output_index=number, item=self._output[number])

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[0]["id"], "output_index": 0, "content_index": 0}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self._said, "annotations": [], "logprobs": list(self._told)}

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        return {**self._head, "status": status, "output": list(self._output), "incomplete_details": None, **more}

    def _event(self, type: str, **fields: Any) -> Event:
        event = Event(type=type, sequence_number=self._sent, **fields)
        self._sent += 1
        return event


def _format(asked: ResponseRequest) -> dict[str, Any]:
    found = asked.text.format if asked.text else None
    return {"type": "text"} if found is None else found.model_dump(by_alias=True, exclude_none=True)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"parameters": None, "strict": None, **tool}
