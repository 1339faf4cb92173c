"""From a job's events to an HTTP answer: one JSON document, or a stream of chunks.

A client that leaves cancels its job. Nothing is sent before the first token, so that an earlier error has a status.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import CompletionUsage
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from hookmap.loading.generation import end_tokens
from hookmap.services.server.errors import ApiError, ErrorBody, cancelled
from hookmap.services.server.jobs import Event, Job, Queue, Result
from hookmap.services.server.spelling import Spelling
from hookmap.services.server.text import RowText
from hookmap.services.server.tokens import LEAST, Token

Made = TypeVar("Made", bound=BaseModel)


class Wire(Protocol):
    """How one of OpenAI's routes writes an answer."""

    named: bool
    """whether each chunk is an event named by its `type`; else the chunks are nameless, and [DONE] ends them"""

    def opening(self) -> Iterator[BaseModel]:
        """The chunks before the first token."""

    def piece(self, token: Token) -> Sequence[BaseModel]:
        """The chunks that a token makes."""

    def closing(self, result: Result) -> Iterator[BaseModel]:
        """The chunks after the last token."""

    def failing(self, error: ApiError) -> BaseModel:
        """The last chunk of a stream that fails."""

    def whole(self, result: Result, tokens: list[Token]) -> BaseModel:
        """The answer in one piece. `tokens`: all that the job sent."""


class Nameless:
    """A `Wire` as chat and completions have it."""

    named = False

    def failing(self, error: ApiError) -> ErrorBody:
        """See `Wire`."""
        return ErrorBody.model_validate(error.body())


async def answer(request: Request, scheduler: Queue, job: Job, wire: Wire, streams: bool) -> Response:
    """Run the job and answer. Raises ApiError."""
    events: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    told = (job.top_logprobs, job.prompt_logprobs, job.summary)
    wants_tokens = streams or any(each is not None for each in told)

    def emit(event: Event) -> None:
        if wants_tokens or not isinstance(event, list):
            loop.call_soon_threadsafe(events.put_nowait, event)

    job.emit = emit
    scheduler.submit(job)
    tokens: list[Token] = []
    try:
        event = await _event(events, request)
        if streams and not isinstance(event, ApiError):
            return _Stream(job, _chunks(event, events, wire))
        while isinstance(event, list):
            tokens += event
            event = await _event(events, request)
    except BaseException:
        job.cancelled.set()
        raise
    if isinstance(event, ApiError):
        raise event
    tokens.sort(key=lambda token: token.row)  # of one choice they stay in order
    return JSONResponse(wire.whole(event, tokens).model_dump(mode="json", exclude_unset=True))


async def _event(events: "asyncio.Queue[Event]", request: Request) -> Event:
    """The next event. Raises ApiError where the client leaves before it."""
    event, leaving = asyncio.ensure_future(events.get()), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({event, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if event.done():
            return event.result()
        raise cancelled()
    finally:
        event.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(event: Event, events: "asyncio.Queue[Event]", wire: Wire) -> AsyncIterator[str]:
    for chunk in wire.opening():
        yield _written(chunk, wire)
    while isinstance(event, list):
        for token in event:
            for piece in wire.piece(token):
                yield _written(piece, wire)
        event = await events.get()
    for chunk in (wire.failing(event),) if isinstance(event, ApiError) else wire.closing(event):
        yield _written(chunk, wire)
    if not wire.named:
        yield "data: [DONE]\n\n"


def made(kind: type[Made], **fields: Any) -> Made:
    """A part of a chunk, not validated: openai's own constructor looks at every field, for every token."""
    return BaseModel.model_construct.__func__(kind, **fields)  # type: ignore[attr-defined,no-any-return]


def _written(chunk: BaseModel, wire: Wire) -> str:
    name = f"event: {chunk.type}\n" if wire.named else ""  # type: ignore[attr-defined]
    return f"{name}data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


class _Stream(StreamingResponse):
    """A stream of server-sent events that cancels its job however it ends, also before its first chunk.

    sse-starlette would not do: when imported it replaces uvicorn's handling of signals, and by default it ends streams
    at SIGTERM that should be answered to their end.
    """

    def __init__(self, job: Job, chunks: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancelled.set()


def summaries(job: Job, tokens: Sequence[Token], decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """`activations_summary` of a chunk or a whole answer, with an entry for each token; {} where none was asked for."""
    if job.summary is None:
        return {}
    told = []
    for token in tokens:
        if token.figures is not None:
            prompt = job.prompts[token.row].token_ids
            told += job.summary.told(token.row, token.id, token.figures, prompt, decode)
    return {"activations_summary": told}


def prompt_logprobs(tokens: Sequence[Token], count: int, spelling: Spelling) -> list[dict[str, Any] | None]:
    """Of each token of a prompt, as vLLM writes it: by id, the token itself and the `count` likeliest."""
    found = list[dict[str, Any] | None]()
    for token in tokens:
        if token.logprob is None:
            found.append(None)
            continue
        likely: dict[int, tuple[float, int | None]] = {token.id: (token.logprob, token.rank)}
        likely |= {id: (logprob, place) for place, (id, logprob) in enumerate(token.top[:count], 1)}
        found.append(
            {
                str(id): {"logprob": max(LEAST, logprob), "rank": rank, "decoded_token": spelling.text(id)}
                for id, (logprob, rank) in likely.items()
            }
        )
    return found


def reason_of(job: Job, text: RowText, new: tuple[int, ...]) -> Literal["stop", "length"]:
    """Why a choice of these new tokens ended."""
    ended = text.stopped or (new and new[-1] in end_tokens(job.config)) or len(new) < job.max_new_tokens
    return "stop" if ended else "length"


def extras(result: Result) -> dict[str, Any]:
    """The fields of an answer that are not OpenAI's; {} for a request that records nothing."""
    if result.meta is None:
        return {}
    return {"session_id": result.meta["session_id"], "activations_meta": result.meta}


def usage_of(job: Job, result: Result) -> CompletionUsage:
    """The tokens of each prompt, counted once, and of every choice."""
    prompt = sum(len(prompt.token_ids) for prompt in job.prompts[:: job.choices])
    completion = sum(map(len, result.new))
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
