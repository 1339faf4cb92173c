"""POST /v1/chat/completions: messages -> a prompt, and the answer as OpenAI writes it."""

import inspect
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob

from hookmap.loading.chat_template import Templating
from hookmap.loading.generation import end_tokens
from hookmap.loading.prompts import Prompt, templated, text_of
from hookmap.services.server.errors import bad
from hookmap.services.server.jobs import Job, Result
from hookmap.services.server.requests import ChatRequest, Message
from hookmap.services.server.streaming import extras, made, summaries, usage_of
from hookmap.services.server.text import RowText
from hookmap.services.server.tokens import LEAST, Token
from hookmap.services.server.tool_calls import Call, ToolText, check_template, reads_calls, with_arguments


def prompt_of(asked: ChatRequest, tokenizer: Any) -> Prompt:
    """The messages through the model's chat template. Raises TokenizerError, ApiError."""
    tools = [] if asked.tool_choice == "none" else asked.tools or []
    check_template(tools, tokenizer)
    options = dict(asked.chat_template_kwargs or {})
    own = inspect.signature(type(tokenizer).apply_chat_template).parameters if tokenizer is not None else {}
    if wrong := [name for name in options if name in own or not name.isidentifier()]:
        raise bad(f"chat_template_kwargs: {', '.join(wrong)} cannot be given.", "chat_template_kwargs")
    if tools:
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    goes_on = bool(asked.continue_final_message)
    begins = not goes_on if asked.add_generation_prompt is None else asked.add_generation_prompt
    how = Templating(True, begins, goes_on, options, generates=True)
    return templated([_message(message) for message in asked.messages], 0, tokenizer, how)


def _message(message: Message) -> dict[str, Any]:
    """As templates read it: text is one string, and a developer is a system."""
    content = message.content
    if message.images or message.audio:
        raise bad("messages: this server reads text only.", "messages")
    if isinstance(content, list):
        if any(part.type != "text" or part.text is None for part in content):
            raise bad("messages: this server reads text only.", "messages")
        content = "\n".join(part.text or "" for part in content)
    found: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    found["content"] = content or ""
    found |= message.model_dump(include={"name", "tool_call_id"}, exclude_none=True)
    if message.tool_calls:
        found["tool_calls"] = with_arguments(message.tool_calls)
    return found


class _Row:
    """One choice, as its text comes."""

    def __init__(self, tokenizer: Any, job: Job, tools: bool) -> None:
        self._tokenizer, self._job, self._tools = tokenizer, job, tools
        self._ends = end_tokens(job.config)
        self.text, self.calls = RowText(tokenizer, job.stop), ToolText(tools)

    def add(self, token: int) -> str:
        return self.calls.add(self.text.add(token))

    def end(self) -> tuple[str, tuple[Call, ...]]:
        before = self.calls.add(self.text.end())
        rest, calls = self.calls.end()
        return before + rest, calls

    def reason(self, tokens: tuple[int, ...]) -> str:
        """Why it ended: `stop`, or `length`."""
        ended = self.text.stopped or (tokens and tokens[-1] in self._ends) or len(tokens) < self._job.max_new_tokens
        return "stop" if ended else "length"


class ChatWire:
    """Writes chat completions. See `streaming.Wire`."""

    def __init__(self, asked: ChatRequest, job: Job, model: str, tokenizer: Any) -> None:
        tools = bool(asked.tools) and asked.tool_choice != "none" and reads_calls(tokenizer)
        self._rows = [_Row(tokenizer, job, tools) for _ in job.prompts]
        self._job, self._tokenizer, self._logprobs = job, tokenizer, bool(asked.logprobs)
        self._usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self._head: dict[str, Any] = {"id": f"chatcmpl-{job.id}", "created": int(time.time()), "model": model}

    def opening(self) -> Iterator[ChatCompletionChunk]:
        """Each choice's role."""
        for row in range(len(self._rows)):
            yield self._chunk(row, ChoiceDelta(role="assistant", content=""))

    def piece(self, token: Token) -> ChatCompletionChunk | None:
        """The text that a token makes certain; with logprobs or a summary each token has a chunk."""
        text = self._rows[token.row].add(token.id)
        logprobs = ChoiceLogprobs(content=[self._told(token)], refusal=None) if self._logprobs else None
        more = summaries(self._job, [token], partial(text_of, self._tokenizer))
        if not text and logprobs is None and not more:
            return None
        chunk = self._chunk(token.row, made(ChoiceDelta, content=text), logprobs=logprobs)
        return chunk.model_copy(update=more)

    def closing(self, result: Result) -> Iterator[ChatCompletionChunk]:
        """The rest of each choice and why it ended, then usage. What was kept stands in the last chunk."""
        chunks = []
        for number, row in enumerate(self._rows):
            text, calls = row.end()
            if text:
                chunks.append(self._chunk(number, ChoiceDelta(content=text)))
            if calls:
                told = [{"index": index, **_call(call)} for index, call in enumerate(calls)]
                chunks.append(self._chunk(number, ChoiceDelta.model_validate({"tool_calls": told})))
            reason = "tool_calls" if calls else row.reason(result.new[number])
            chunks.append(self._chunk(number, ChoiceDelta(), reason))
        if self._usage:
            usage = usage_of(self._job, result)
            chunks.append(ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=[], usage=usage))
        chunks[-1] = chunks[-1].model_copy(update=extras(result))
        yield from chunks

    def whole(self, result: Result, tokens: list[Token]) -> ChatCompletion:
        """Every choice."""
        choices = [self._choice(number, result, tokens) for number in range(len(self._rows))]
        more = {**summaries(self._job, tokens, partial(text_of, self._tokenizer)), **extras(result)}
        usage = usage_of(self._job, result)
        return ChatCompletion(**self._head, object="chat.completion", choices=choices, usage=usage, **more)

    def _choice(self, number: int, result: Result, tokens: list[Token]) -> Choice:
        row, new = self._rows[number], result.new[number]
        text = "".join(row.add(token) for token in new)
        rest, calls = row.end()
        text += rest
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text if text.strip() else None, "tool_calls": [_call(call) for call in calls]}
        told = [self._told(token) for token in tokens if token.row == number]
        return Choice(
            index=number,
            finish_reason="tool_calls" if calls else row.reason(new),  # type: ignore[arg-type]
            message=ChatCompletionMessage.model_validate(message),
            logprobs=ChoiceLogprobs(content=told, refusal=None) if self._logprobs else None,
        )

    def _chunk(
        self, row: int, delta: ChoiceDelta, reason: str | None = None, logprobs: Any = None
    ) -> ChatCompletionChunk:
        choice = made(ChunkChoice, index=row, delta=delta, finish_reason=reason, logprobs=logprobs)
        return made(ChatCompletionChunk, **self._head, object="chat.completion.chunk", choices=[choice])

    def _told(self, token: Token) -> ChatCompletionTokenLogprob:
        tops = [TopLogprob(**self._token(id, logprob)) for id, logprob in token.top]
        return ChatCompletionTokenLogprob(**self._token(token.id, token.logprob or 0.0), top_logprobs=tops)

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        text = text_of(self._tokenizer, [id])
        return {"token": text, "logprob": max(LEAST, logprob), "bytes": list(text.encode())}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
