"""POST /v1/completions: texts or token ids -> prompts, and the answer as OpenAI writes it."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from hookmap.loading.prompts import Prompt, encode, text_of
from hookmap.services.server.errors import bad
from hookmap.services.server.jobs import Job, Result
from hookmap.services.server.requests import CompletionRequest
from hookmap.services.server.streaming import extras, made, reason_of, summaries, usage_of
from hookmap.services.server.text import RowText
from hookmap.services.server.tokens import LEAST, Token


def prompts_of(asked: CompletionRequest, tokenizer: Any) -> tuple[Prompt, ...]:
    """The prompts of a request, with the tokenizer's own special tokens. Raises TokenizerError, ApiError."""
    if not asked.prompt:
        raise bad("prompt: expected a text, token ids, or a list of such; got nothing.", "prompt")
    return encode(asked.prompt, tokenizer, chat=False)


class NullableLogprobs(Logprobs):
    """Logprobs that may contain null, for the first token of an echo, as OpenAI and vLLM send them."""

    token_logprobs: list[float | None] | None = None  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None] | None = None  # type: ignore[assignment]


class TextChoice(CompletionChoice):
    """A choice whose logprobs may contain null, as OpenAI and vLLM send them."""

    logprobs: NullableLogprobs | None = None


class TextCompletion(Completion):
    """A completion whose logprobs may contain null."""

    choices: list[TextChoice]  # type: ignore[assignment]


class CompletionWire:
    """Writes completions. See `streaming.Wire`."""

    def __init__(self, asked: CompletionRequest, job: Job, model: str, tokenizer: Any) -> None:
        self._texts = [RowText(tokenizer, job.stop) for _ in job.prompts]
        echoed = job.prompts if asked.echo else ()
        self._echoed = [prompt.text or text_of(tokenizer, prompt.token_ids) for prompt in echoed]
        self._offsets = [0] * len(job.prompts)
        self._job, self._tokenizer, self._logprobs = job, tokenizer, asked.logprobs is not None
        self._usage = bool(asked.stream_options and asked.stream_options.include_usage)

        self._head: dict[str, Any] = {"id": f"cmpl-{job.id}", "created": int(time.time()), "model": model}

    def opening(self) -> Iterator[TextCompletion]:
        """The prompt of each choice, where an echo is asked for."""
        for number, prompt in enumerate(self._echoed):
            yield self._chunk(number, prompt)

    def piece(self, token: Token) -> TextCompletion | None:
        """A chunk with the text that this token completes; with logprobs or a summary every token has a chunk."""
        text = "" if token.prompt else self._texts[token.row].add(token.id)
        more = summaries(self._job, [token], partial(text_of, self._tokenizer))
        if not text and not self._logprobs and not more:
            return None
        chunk = self._chunk(token.row, text, logprobs=self._told([token]) if self._logprobs else None)
        return chunk.model_copy(update=more)

    def closing(self, result: Result) -> Iterator[TextCompletion]:
        """The rest of each choice and why it ended, then usage. The last chunk says what was recorded."""
        chunks = []
        for number, text in enumerate(self._texts):
            rest = text.end()
            chunks.append(self._chunk(number, rest, self._reason(number, result)))
        if self._usage:
            usage = usage_of(self._job, result)
            chunks.append(TextCompletion(**self._head, object="text_completion", choices=[], usage=usage))
        chunks[-1] = chunks[-1].model_copy(update=extras(result))
        yield from chunks

    def whole(self, result: Result, tokens: list[Token]) -> TextCompletion:
        """The answer with every choice, prompt after prompt."""
        choices = []
        for number, row in enumerate(self._texts):
            text = row.whole(result.new[number])
            text = self._echoed[number] + text if self._echoed else text
            own = [token for token in tokens if token.row == number]
            logprobs = self._told(own) if self._logprobs else None
            reason: Any = self._reason(number, result)
            choices.append(TextChoice(index=number, text=text, finish_reason=reason, logprobs=logprobs))
        more = {**summaries(self._job, tokens, partial(text_of, self._tokenizer)), **extras(result)}
        usage = usage_of(self._job, result)
        return TextCompletion(**self._head, object="text_completion", choices=choices, usage=usage, **more)

    def _chunk(self, row: int, text: str, reason: str | None = None, logprobs: Any = None) -> TextCompletion:
        # The reason is null until the last chunk, as OpenAI sends it.
        choice = made(TextChoice, index=row, text=text, finish_reason=reason, logprobs=logprobs)
        return made(TextCompletion, **self._head, object="text_completion", choices=[choice])

    def _reason(self, number: int, result: Result) -> str:
        new = result.new[number]
        return reason_of(self._job, self._texts[number], new) if new else "length"  # it was only read

    def _told(self, tokens: list[Token]) -> NullableLogprobs:
        decode = partial(text_of, self._tokenizer)
        texts, offsets = [decode([token.id]) for token in tokens], []
        for token, text in zip(tokens, texts, strict=True):
            offsets.append(self._offsets[token.row])
            self._offsets[token.row] += len(text)
        logprobs = [None if token.logprob is None else max(LEAST, token.logprob) for token in tokens]
        tops: list[dict[str, float] | None] = []
        for token, text, logprob in zip(tokens, texts, logprobs, strict=True):
            likeliest = {decode([id]): max(LEAST, value) for id, value in reversed(token.top)}
            tops.append(None if logprob is None else likeliest | {text: logprob})
        return NullableLogprobs(tokens=texts, token_logprobs=logprobs, top_logprobs=tops, text_offset=offsets)
