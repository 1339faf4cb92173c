"""POST /v1/completions: texts or token ids -> prompts, and the answer as OpenAI writes it."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from hookmap.loading.prompts import Prompt, encode, text_of
from hookmap.services.server.errors import bad, blaming
from hookmap.services.server.jobs import Job, Result
from hookmap.services.server.requests import CompletionRequest
from hookmap.services.server.spelling import RowBytes, Spelling
from hookmap.services.server.streaming import Nameless, extras, made, prompt_logprobs, reason_of, summaries, usage_of
from hookmap.services.server.text import RowText
from hookmap.services.server.tokens import LEAST, Token


def prompts_of(asked: CompletionRequest, tokenizer: Any) -> tuple[Prompt, ...]:
    """The prompts of a request, with the tokenizer's own special tokens. Raises TokenizerError, ApiError."""
    if not asked.prompt:
        raise bad("prompt: expected a text, token ids, or a list of such; got nothing.", "prompt")
    return blaming("prompt", lambda: encode(asked.prompt, tokenizer, chat=False))


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


class CompletionWire(Nameless):
    """Writes completions. See `streaming.Wire`."""

    def __init__(self, asked: CompletionRequest, job: Job, model: str, tokenizer: Any) -> None:
        self._texts = [RowText(tokenizer, job.stop) for _ in job.prompts]
        echoed = job.prompts if asked.echo else ()
        self._echoed = [prompt.text or text_of(tokenizer, prompt.token_ids) for prompt in echoed]
        self._spelling = Spelling(tokenizer)
        self._bytes = [RowBytes(self._spelling) for _ in job.prompts]
        self._job, self._tokenizer, self._logprobs = job, tokenizer, asked.logprobs is not None
        self._echoes, self._of_prompt, self._count = asked.echoes_logprobs, asked.prompt_logprobs, asked.logprobs or 0
        self._ids = bool(asked.return_token_ids)
        self._usage = bool(asked.stream_options and asked.stream_options.include_usage)

        self._head: dict[str, Any] = {"id": f"cmpl-{job.id}", "created": int(time.time()), "model": model}

    def opening(self) -> Iterator[TextCompletion]:
        """The prompt of each choice, where an echo or its token ids are asked for."""
        for number in range(len(self._texts)) if self._echoed or self._ids else ():
            yield self._chunk(number, self._echoed[number] if self._echoed else "", begins=True)

    def piece(self, token: Token) -> Sequence[TextCompletion]:
        """A chunk with the text that this token completes; with logprobs or a summary every token has a chunk."""
        text = "" if token.prompt else self._texts[token.row].add(token.id)
        more = summaries(self._job, [token], partial(text_of, self._tokenizer))
        if not text and not self._logprobs and not more and not self._ids:
            return ()
        ids = () if token.prompt else (token.id,)
        chunk = self._chunk(token.row, text, logprobs=self._told([token]) if self._logprobs else None, ids=ids)
        return (chunk.model_copy(update=more),)

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
            every = [token for token in tokens if token.row == number]
            own = [token for token in every if self._echoes or not token.prompt]
            logprobs = self._told(own) if self._logprobs else None
            reason: Any = self._reason(number, result)
            ids = self._token_ids(number, result.new[number], begins=True)
            if self._of_prompt is not None:
                read = [token for token in every if token.prompt]
                ids["prompt_logprobs"] = prompt_logprobs(read, self._of_prompt, self._spelling)
            choices.append(TextChoice(index=number, text=text, finish_reason=reason, logprobs=logprobs, **ids))
        more = {**summaries(self._job, tokens, partial(text_of, self._tokenizer)), **extras(result)}
        usage = usage_of(self._job, result)
        return TextCompletion(**self._head, object="text_completion", choices=choices, usage=usage, **more)

    def _chunk(
        self,
        row: int,
        text: str,
        reason: str | None = None,
        logprobs: Any = None,
        ids: Sequence[int] = (),
        begins: bool = False,
    ) -> TextCompletion:
        # The reason is null until the last chunk, as OpenAI sends it.
        more = self._token_ids(row, ids, begins)
        choice = made(TextChoice, index=row, text=text, finish_reason=reason, logprobs=logprobs, **more)
        return made(TextCompletion, **self._head, object="text_completion", choices=[choice])

    def _token_ids(self, row: int, new: Sequence[int], begins: bool) -> dict[str, Any]:
        """As vLLM's `return_token_ids` writes them; {} where nobody asked."""
        if not self._ids:
            return {}
        prompt = {"prompt_token_ids": list(self._job.prompts[row].token_ids)} if begins else {}
        return {"token_ids": list(new), **prompt}

    def _reason(self, number: int, result: Result) -> str:
        new = result.new[number]
        return reason_of(self._job, self._texts[number], new) if new else "length"  # it was only read

    def _told(self, tokens: list[Token]) -> NullableLogprobs:
        name = self._spelling.name
        offsets, own, tops = list[int](), list[float | None](), list[dict[str, float] | None]()
        for token in tokens:
            row = self._bytes[token.row]
            offsets.append(row.offset)
            if token.prompt:
                row.echo(token.id, self._echoed[token.row])
            else:
                row.add(token.id)
            own.append(None if token.logprob is None else max(LEAST, token.logprob))
            tops.append(None if token.logprob is None else self._likeliest(token))
        names = [name(token.id) for token in tokens]
        return NullableLogprobs(tokens=names, token_logprobs=own, top_logprobs=tops, text_offset=offsets)

    def _likeliest(self, token: Token) -> dict[str, float]:
        """The likeliest tokens and the token itself, each under a name of its own: two may have one text."""
        found, taken = dict[str, float](), dict[str, int]()
        for id, logprob in ((token.id, token.logprob or 0.0), *token.top[: self._count]):
            name = self._spelling.name(id)
            if taken.setdefault(name, id) != id:
                name = f"token_id:{id}"
            found[name] = max(LEAST, logprob)
        return found
