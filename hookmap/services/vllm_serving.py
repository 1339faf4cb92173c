"""The entry point for `vllm serve`: its chat and completions understand a `hookmap` field. Nothing of it is ignored.

vLLM's own routes stay: a request with the field is checked before vLLM reads it, marked, and known again in
`AsyncLLM.generate`; its answer gets `activations_meta`. A request without the field passes through.
"""

import asyncio
import contextlib
import functools
import importlib
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from hookmap.errors import CaptureError, HookmapError
from hookmap.vllm.spec import NAME

SERVED = (
    ("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat", "create_chat_completion"),
    ("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion", "create_completion"),
)
"""where vLLM answers the requests that may have the field"""
REFUSING = (
    ("vllm.entrypoints.openai.chat_completion.batch_serving", "OpenAIServingChatBatch", "create_batch_chat_completion"),
    ("vllm.entrypoints.openai.responses.serving", "OpenAIServingResponses", "create_responses"),
    ("vllm.entrypoints.anthropic.serving", "AnthropicServingMessages", "create_messages"),
    ("vllm.entrypoints.generate.generative_scoring.serving", "ServingGenerativeScoring", "create_generative_scoring"),
    ("vllm.entrypoints.generate.structured_decisions.serving", "ServingStructuredDecisions", "create_decision"),
)
"""those that must not ignore it"""
LOOK = 0.2
"""seconds after which a request that waits for the workers looks whether the engine lives"""
_SEE = re.compile(r"\s*See what there is: hookmap show .*")
ELSEWHERE = f"{NAME}: activations are kept and edited on /v1/chat/completions and /v1/completions only."


def register() -> None:
    """Prepare vLLM's API server, where one starts in this process. May be called any number of times."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    made = EngineArgs.create_engine_config
    if getattr(made, "_hookmap_serving", False):
        return

    @functools.wraps(made)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if UsageContext.OPENAI_API_SERVER in (*args, *kwargs.values()):
            if NAME in (self.additional_config or {}) and (count := getattr(self, "_api_process_count", 1)) > 1:
                raise CaptureError(
                    f"--api-server-count {count}: one process counts and deletes the sessions, which all of them would "
                    "write. vLLM starts as many as engines unless told: add --api-server-count 1."
                )
            install()
        return made(self, *args, **kwargs)

    create_engine_config._hookmap_serving = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def install() -> None:
    """Wrap what answers requests, and what runs them."""
    from vllm.v1.engine.async_llm import AsyncLLM

    if hasattr(AsyncLLM.generate, "plain"):
        return
    plain = AsyncLLM.generate

    @functools.wraps(plain)
    def generate(self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> Any:
        mark = (getattr(sampling_params, "extra_args", None) or {}).get(NAME)
        if mark is None:
            return plain(self, prompt, sampling_params, request_id, **kwargs)
        return _captured(plain, self, mark, prompt, sampling_params, request_id, kwargs)

    generate.plain = plain  # type: ignore[attr-defined]
    AsyncLLM.generate = generate
    AsyncLLM.shutdown = _shutting_down(AsyncLLM.shutdown)
    for places, wrap in ((SERVED, _answering), (REFUSING, _refusing)):
        for module, name, method in places:
            kind = getattr(importlib.import_module(module), name)
            setattr(kind, method, wrap(getattr(kind, method)))


def _shutting_down(shutdown: Callable[..., None]) -> Callable[..., None]:
    """Requests that run end with the engine: vLLM 0.32 leaves them waiting, and its server waits for them."""
    from vllm.v1.engine.exceptions import EngineDeadError  # not in `shut_down`: Python may be ending then

    @functools.wraps(shutdown)
    def shut_down(self: Any, *args: Any, **kwargs: Any) -> None:
        shutdown(self, *args, **kwargs)
        handler = getattr(self, "output_handler", None)
        if handler is not None and NAME in (self.vllm_config.additional_config or {}):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                handler.get_loop().call_soon_threadsafe(self.output_processor.propagate_error, EngineDeadError())

    return shut_down


def field_of(request: Any) -> tuple[str, Any] | None:
    """The client's field, with what it holds; None where there is none, or null. Raises ApiError for two of them."""
    from hookmap.services.server.errors import bad

    own, vllms = (getattr(request, "model_extra", None) or {}), (getattr(request, "vllm_xargs", None) or {})
    if own.get("store_activations"):
        told = f"store_activations: a field of hookmap's own server; here {NAME}: {{}} keeps the stream of all layers."
        raise bad(told, "store_activations")
    if own.get(NAME) is not None and vllms.get(NAME) is not None:
        raise bad(f"{NAME} and vllm_xargs.{NAME}: give one of them.", NAME)
    if own.get(NAME) is not None:
        return NAME, own[NAME]
    return (f"vllm_xargs.{NAME}", vllms[NAME]) if vllms.get(NAME) is not None else None


def _answering(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    async def answer(self: Any, request: Any, raw_request: Any = None) -> Any:
        from hookmap.services.vllm_requests import MARKED, admitted

        try:
            if (field := field_of(request)) is None:
                return await create(self, request, raw_request)
            asked = await asyncio.to_thread(admitted, self.engine_client, asyncio.get_running_loop(), request, field)
        except HookmapError as error:
            return _error(self, error)
        request.vllm_xargs = {**(request.vllm_xargs or {}), NAME: asked.mark}
        MARKED[asked.mark] = asked
        streams = False
        try:
            found = await create(self, request, raw_request)
            streams = hasattr(found, "__aiter__")
            if streams:
                return _streamed(self, found, asked)
            if asked.ended:
                meta = await asyncio.to_thread(asked.recorded)
                found.session_id, found.activations_meta = meta["session_id"], meta
            return found
        except HookmapError as error:
            return _error(self, error)
        finally:
            if not streams:
                MARKED.pop(asked.mark, None)

    return answer


async def _streamed(serving: Any, chunks: AsyncIterator[str], asked: Any) -> AsyncIterator[str]:
    """The stream with a chunk more before its end, which says what was recorded."""
    from hookmap.services.vllm_requests import MARKED

    head: dict[str, Any] = {}
    try:
        async for chunk in chunks:
            if not head and chunk.startswith("data: {"):
                first = json.loads(chunk.removeprefix("data: "))
                head = {name: first[name] for name in ("id", "object", "created", "model") if name in first}
            if chunk.startswith("data: [DONE]") and asked.ended:
                try:
                    meta = await asyncio.to_thread(asked.recorded)
                    told = {**head, "choices": [], "session_id": meta["session_id"], "activations_meta": meta}
                except HookmapError as error:
                    told = _error(serving, error).model_dump()
                yield f"data: {json.dumps(told)}\n\n"
            yield chunk
    finally:
        MARKED.pop(asked.mark, None)


def _refusing(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    async def answer(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if field_of(request) is not None:
                return self.create_error_response(ELSEWHERE, param=NAME)
        except HookmapError as error:
            return _error(self, error)
        return await create(self, request, *args, **kwargs)

    return answer


async def _captured(
    plain: Callable[..., Any], llm: Any, mark: Any, prompt: Any, parameters: Any, name: str, kwargs: dict[str, Any]
) -> AsyncIterator[Any]:
    """The outputs of a request that `_answering` has marked; its rows are taken before the last of them."""
    from vllm.exceptions import VLLMValidationError

    from hookmap.services.vllm_requests import MARKED

    asked = MARKED.get(mark) if isinstance(mark, str) else None
    if asked is None or asked.begun:
        raise VLLMValidationError(ELSEWHERE, parameter=NAME)
    try:
        prompt, parameters = await asyncio.to_thread(asked.begin, prompt, parameters)
    except HookmapError as error:
        raise VLLMValidationError(_SEE.sub("", str(error)), parameter=asked.field) from error
    name = f"{name}-{mark}"  # a client may give two requests one id
    where = asked.engine.chosen(name, kwargs.get("data_parallel_rank"))
    try:
        async for output in plain(llm, prompt, parameters, name, **{**kwargs, **where}):
            asked.note(output)
            if output.finished:
                try:
                    asked.end(await _answered(llm, asked.engine.of(name, "hookmap_take", *asked.taking(name))))
                except HookmapError as error:
                    raise VLLMValidationError(str(error), parameter=asked.field) from error
            yield output
    finally:
        asked.engine.left(where)
        _LEFT.add(task := asyncio.ensure_future(_forget(llm, name, asked)))
        task.add_done_callback(_LEFT.discard)


_LEFT: set[Any] = set()
"""tasks that must not be collected while they run"""


async def _forget(llm: Any, name: str, asked: Any) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    with contextlib.suppress(EngineDeadError):  # nothing is left to forget
        if not asked.ended:
            await llm.abort(name)
            await _answered(llm, asked.engine.of(name, "hookmap_drop", [name]))
        if asked.plan is not None:
            await _answered(llm, asked.engine.everywhere("hookmap_forget", asked.plan))
    asked.engine.forget([name])


async def _answered(llm: Any, answers: Coroutine[Any, Any, Any]) -> Any:
    """What the workers answer. Raises EngineDeadError where the engine has ended: vLLM itself waits for ever then."""
    from vllm.v1.engine.exceptions import EngineDeadError

    asking = asyncio.ensure_future(answers)
    try:
        while not (await asyncio.wait({asking}, timeout=LOOK))[0]:
            if llm.engine_core.resources.engine_dead:
                raise EngineDeadError
        return asking.result()
    finally:
        asking.cancel()


def _error(serving: Any, error: HookmapError) -> Any:
    """vLLM's own answer for an error."""
    from http import HTTPStatus

    status = HTTPStatus(getattr(error, "status", 400))
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    told = _SEE.sub("", str(error))  # it names the model's folder, and a command that is not the client's
    return serving.create_error_response(told, kind, status, getattr(error, "param", None) or NAME)
