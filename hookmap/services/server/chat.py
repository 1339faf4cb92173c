"""POST /v1/chat/completions: messages -> a prompt, and the answer as OpenAI writes it."""

import inspect
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob

from hookmap.errors import TokenizerError
from hookmap.loading.chat_template import Templating
from hookmap.loading.pictures import Limits
from hookmap.loading.prompts import Prompt, templated, text_of
from hookmap.model import HookedModel
from hookmap.services.server.errors import bad
from hookmap.services.server.jobs import Job, Result
from hookmap.services.server.requests import ChatRequest, Message, Part
from hookmap.services.server.spelling import RowBytes, Spelling
from hookmap.services.server.streaming import Nameless, extras, made, prompt_logprobs, reason_of, summaries, usage_of
from hookmap.services.server.text import RowText
from hookmap.services.server.tokens import LEAST, Token
from hookmap.services.server.tool_calls import Call, ToolText, reads_calls, template_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""of images, as OpenAI takes them"""


def prompt_of(asked: ChatRequest, hm: HookedModel, pixels: int, tokenizer: Any) -> Prompt:
    """The prompt that the model's chat template makes of the messages. Raises TokenizerError, ApiError.

    `pixels`: the most that the images of the request may have together. `tokenizer`: the model's, or a copy.
    """
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
    images = sum(_is_image(part) for message in asked.messages for part in _parts(message))
    limits = Limits(files=False, most_pixels=pixels // max(1, images), formats=FORMATS)
    messages = [_message(message, place) for place, message in enumerate(asked.messages)]
    try:
        return templated(messages, 0, tokenizer, how, hm.reader, limits)
    except TokenizerError as error:
        of_template = str(error).startswith("chat_template_kwargs")
        code = "image_refused" if images else type(error).__name__
        raise bad(str(error), "chat_template_kwargs" if of_template else "messages", code) from error


def _parts(message: Message) -> Sequence[Part]:
    return message.content if isinstance(message.content, list) else ()


def _is_image(part: Part) -> bool:
    return part.type == "image_url" and part.image_url is not None


def _message(message: Message, place: int) -> dict[str, Any]:
    """A message as chat templates take it: its text one string, the role `developer` as `system`. Raises ApiError.

    `place`: of the message in the request.
    """
    content: Any = message.content
    if content is None and message.role in ("system", "developer", "user"):
        where = f"messages.{place}.content"
        raise bad(f"{where}: expected a text, or parts; only an assistant's message may have none.", where)
    if (
        message.images
        or message.audio
        or any(not _is_image(p) and (p.type, p.text) != ("text", p.text or "") for p in _parts(message))
    ):
        raise bad("messages: this server reads text, and images as parts of type image_url.", "messages")
    if any(map(_is_image, _parts(message))):
        content = [_part(part) for part in _parts(message)]
    elif isinstance(content, list):
        content = "\n".join(part.text or "" for part in content)
    found: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    found["content"] = content or ""
    found |= message.model_dump(include={"name", "tool_call_id"}, exclude_none=True)
    if message.tool_calls:
        found["tool_calls"] = with_arguments(message.tool_calls)
    return found


def _part(part: Part) -> dict[str, Any]:
    if part.image_url is None:
        return {"type": "text", "text": part.text}
    return {"type": "image", "url": part.image_url.url}


def check_template(tools: Sequence[Any], tokenizer: Any) -> None:
    """Raises ApiError where the chat template takes no tools: it would drop them silently."""
    if tools and "tools" not in template_of(tokenizer):
        raise bad("tools: this model's chat template takes none.", "tools")


def with_arguments(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls of an earlier answer as chat templates take them: arguments as an object, not as JSON. Raises ApiError."""
    found = []
    for call in calls:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad("messages: expected tool_calls with function.name and function.arguments.", "messages")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise bad("messages: function.arguments of a tool call is not JSON.", "messages") from None
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found


class ChoiceText:
    """The text and the tool calls of one choice, as its tokens come."""

    def __init__(self, tokenizer: Any, job: Job, tools: bool) -> None:
        self.text, self.calls = RowText(tokenizer, job.stop), ToolText(tools)

    def add(self, token: int) -> str:
        return self.calls.add(self.text.add(token))

    def end(self) -> tuple[str, tuple[Call, ...]]:
        before = self.calls.add(self.text.end())
        rest, calls = self.calls.end()
        return before + rest, calls


class RowLogprobs:
    """The logprobs of the tokens of one row, one after the other, as OpenAI writes them."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling, self._bytes = spelling, RowBytes(spelling)

    def of(self, token: Token) -> ChatCompletionTokenLogprob:
        """Those of the next token, and of the likeliest in its place."""
        tops = [TopLogprob(**self._token(id, logprob)) for id, logprob in token.top]
        own = self._token(token.id, token.logprob or 0.0)
        self._bytes.add(token.id)
        return ChatCompletionTokenLogprob(**own, top_logprobs=tops)

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        own = self._bytes.of(id)
        told = None if own is None else list(own)
        return {"token": self._spelling.text(id), "logprob": max(LEAST, logprob), "bytes": told}


class ChatWire(Nameless):
    """Writes chat completions. See `streaming.Wire`."""

    def __init__(self, asked: ChatRequest, job: Job, model: str, tokenizer: Any) -> None:
        tools = bool(asked.tools) and asked.tool_choice != "none" and reads_calls(tokenizer)
        self._rows = [ChoiceText(tokenizer, job, tools) for _ in job.prompts]
        self._job, self._tokenizer, self._logprobs = job, tokenizer, bool(asked.logprobs)
        spelling = Spelling(tokenizer)
        self._told = [RowLogprobs(spelling) for _ in job.prompts]
        self._usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self._ids, self._of_prompt, self._spelling = bool(asked.return_token_ids), asked.prompt_logprobs, spelling
        self._head: dict[str, Any] = {"id": f"chatcmpl-{job.id}", "created": int(time.time()), "model": model}

    def opening(self) -> Iterator[ChatCompletionChunk]:
        """The role of each choice."""
        prompt = {"prompt_token_ids": list(self._job.prompts[0].token_ids)} if self._ids else {}
        for row in range(len(self._rows)):
            yield self._chunk(row, ChoiceDelta(role="assistant", content="")).model_copy(update=prompt)

    def piece(self, token: Token) -> Sequence[ChatCompletionChunk]:
        """A chunk with the text that this token completes; with logprobs or a summary every token has a chunk."""
        text = self._rows[token.row].add(token.id)
        logprobs = ChoiceLogprobs(content=[self._told[token.row].of(token)], refusal=None) if self._logprobs else None
        more = summaries(self._job, [token], partial(text_of, self._tokenizer))
        if not text and logprobs is None and not more and not self._ids:
            return ()
        chunk = self._chunk(token.row, made(ChoiceDelta, content=text), logprobs=logprobs, ids=[token.id])
        return (chunk.model_copy(update=more),)

    def closing(self, result: Result) -> Iterator[ChatCompletionChunk]:
        """The rest of each choice and why it ended, then usage. The last chunk says what was recorded."""
        chunks = []
        for number, row in enumerate(self._rows):
            text, calls = row.end()
            if text:
                chunks.append(self._chunk(number, ChoiceDelta(content=text)))
            if calls:
                told = [{"index": index, **_call(call)} for index, call in enumerate(calls)]
                chunks.append(self._chunk(number, ChoiceDelta.model_validate({"tool_calls": told})))
            reason = "tool_calls" if calls else reason_of(self._job, row.text, result.new[number])
            chunks.append(self._chunk(number, ChoiceDelta(), reason))
        if self._usage:
            usage = usage_of(self._job, result)
            chunks.append(ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=[], usage=usage))
        chunks[-1] = chunks[-1].model_copy(update=extras(result))
        yield from chunks

    def whole(self, result: Result, tokens: list[Token]) -> ChatCompletion:
        """The answer with every choice."""
        choices = [self._choice(number, result, tokens) for number in range(len(self._rows))]
        more = {**summaries(self._job, tokens, partial(text_of, self._tokenizer)), **extras(result)}
        if self._ids:
            more["prompt_token_ids"] = list(self._job.prompts[0].token_ids)
        if self._of_prompt is not None:
            read = [token for token in tokens if token.prompt and token.row == 0]
            more["prompt_logprobs"] = prompt_logprobs(read, self._of_prompt, self._spelling)
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
        told = [self._told[number].of(token) for token in tokens if token.row == number and not token.prompt]
        more: dict[str, Any] = {"token_ids": list(new)} if self._ids else {}
        return Choice(
            index=number,
            finish_reason="tool_calls" if calls else reason_of(self._job, row.text, new),
            message=ChatCompletionMessage.model_validate(message),
            logprobs=ChoiceLogprobs(content=told, refusal=None) if self._logprobs else None,
            **more,
        )

    def _chunk(
        self,
        row: int,
        delta: ChoiceDelta,
        reason: str | None = None,
        logprobs: Any = None,
        ids: Sequence[int] = (),
    ) -> ChatCompletionChunk:
        more = {"token_ids": list(ids)} if self._ids else {}
        choice = made(ChunkChoice, index=row, delta=delta, finish_reason=reason, logprobs=logprobs, **more)
        return made(ChatCompletionChunk, **self._head, object="chat.completion.chunk", choices=[choice])


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
