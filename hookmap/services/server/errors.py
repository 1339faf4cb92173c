"""Errors as OpenAI's clients read them: {"error": {message, type, param, code}} and a status."""

import gc
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from hookmap.errors import HookmapError, StoreError

log = logging.getLogger("hookmap.server")
_T = TypeVar("_T")

NOT_FINITE = "not_finite"
"""the code of answers to requests whose scores are no numbers"""
_NO_NUMBERS = "probability tensor contains either"
"""in torch's message when a distribution with NaN is drawn from"""
_SEE = re.compile("See what there is: hookmap show .*")


class ApiError(HookmapError):
    """An error for the client: its HTTP status, and OpenAI's fields."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        # The command line's hint names the model's folder.
        told = _SEE.sub("See what there is: GET /v1/model/structure", str(self)).encode("utf-8", "replace").decode()
        return {"error": {"message": told, "type": kind_of(self.status), "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


class Told(BaseModel):
    """An error as JSON."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer with an error status."""

    error: Told


DOCUMENTED: Mapping[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be done as it is."},
    "5XX": {"model": ErrorBody, "description": "The server cannot do it now; 503 says when to try again."},
}
"""the error answers of every route, in its OpenAPI document"""


def kind_of(status: int) -> str:
    """OpenAI's `type` of an error with this status."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def blaming(param: str, call: Callable[..., _T], fields: Mapping[str, Any] | None = None) -> _T:
    """`call(**fields)`; what hookmap refuses is refused by the field of the request that is at fault.

    That is `param`, and of its own `fields` the first one without which the call succeeds. Raises ApiError 400.
    """
    given = dict(fields or {})
    try:
        return call(**given)
    except ApiError:
        raise
    except HookmapError as error:
        fault = next((name for name in given if _succeeds(call, {**given}, name)), None)
        raise bad(str(error), f"{param}.{fault}" if fault else param, type(error).__name__) from error


def _succeeds(call: Callable[..., Any], given: dict[str, Any], without: str) -> bool:
    del given[without]
    try:
        call(**given)
    except HookmapError:
        return False
    return True


def missing(message: str, code: str = "not_found", param: str | None = None) -> ApiError:
    """404: there is no such thing."""
    return ApiError(404, message, param=param, code=code)


def cancelled() -> ApiError:
    """499: the client has left."""
    return ApiError(499, "the client closed the connection.", code="cancelled")


def unloading() -> ApiError:
    """503: the model is being unloaded."""
    return ApiError(503, "this model is being unloaded.", code="model_unloading")


def not_finite(interventions: Sequence[str] = (), param: str | None = None) -> ApiError:
    """400 where these interventions, in words, leave scores that are no numbers; 500 where the model itself does."""
    if interventions:
        return bad(
            f"with {' and '.join(interventions)} the model's scores are not all numbers: what is written is too large "
            "for its dtype. Make it smaller.",
            param,
            NOT_FINITE,
        )
    return ApiError(
        500,
        "the model's own scores for this text are not all numbers: it overflows in its dtype. The server may serve it "
        "in another one: hookmap serve --dtype float32",
        code=NOT_FINITE,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, so that a smaller request may succeed."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in _first_line(error)


def failed(error: BaseException, ids: Iterable[str], again: bool = False) -> ApiError:
    """The error for the clients of these requests, whose run failed. Logs the reason, and frees the run's memory.

    `again`: the rows run again in smaller batches, so that no client is told yet.
    """
    told, names = of_exception(error), ", ".join(ids)
    if again:
        log.warning("request %s: out of memory together; going on with half of them", names)
    elif told.status >= 500:
        log.error("request %s: %s", names, told, exc_info=None if told.code == "out_of_memory" else error)
    # The traceback holds the tensors of the run that failed.
    error.__traceback__ = None
    error.__context__ = error.__cause__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return told


def of_exception(error: BaseException) -> ApiError:
    """The error for a client whose request failed with this exception."""
    if isinstance(error, ApiError):
        return error
    if is_out_of_memory(error):
        return ApiError(
            503,
            "out of memory on this request; the server goes on. Ask for fewer tokens, choices or points. "
            f"({_first_line(error) or type(error).__name__})",
            code="out_of_memory",
            headers={"Retry-After": "1"},
        )
    if _NO_NUMBERS in _first_line(error):
        return not_finite()
    if isinstance(error, StoreError):  # it names folders, and commands that are not the client's
        return ApiError(
            500, "a session cannot be written or read; the server's log has the reason.", code="store_failed"
        )
    if isinstance(error, HookmapError):
        return ApiError(500, str(error), code=type(error).__name__)
    return ApiError(500, "the server failed on this request; its log has the reason.", code="internal_error")


def unkept(error: BaseException) -> ApiError:
    """What an answer says whose session the disk refused: the system's reason, and no folder's name."""
    cause = error if isinstance(error, OSError) else error.__cause__
    why = (cause.strerror if isinstance(cause, OSError) else None) or "the server's log has the reason"
    return ApiError(507, f"the rows could not be kept: {why}. The answer itself is whole.", code="store_failed")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def install(app: FastAPI) -> None:
    """Answer every exception of a route in the form of `ApiError`."""

    @app.exception_handler(ApiError)
    async def api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(StoreError)
    async def store(_: Request, error: StoreError) -> JSONResponse:
        log.error("a session fails", exc_info=error)
        return of_exception(error).response()

    @app.exception_handler(HookmapError)
    async def ours(_: Request, error: HookmapError) -> JSONResponse:  # admission: the request names what is not there
        return bad(str(error), code=type(error).__name__).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "nothing").partition(";")[0].lower()
        if not kind.endswith("json") and any(each["loc"] == ("body",) for each in error.errors()):
            message = f"expected the header Content-Type: application/json, found {kind}"
            return bad(message, code="invalid_request").response()
        problems = [(_place(each), _told(each)) for each in error.errors()]
        message = "\n".join(f"{place}: {told}" if place else told for place, told in problems[:10])
        return bad(message, param=problems[0][0] or None, code="invalid_request").response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        told = str(error.detail)
        if told == "Not Found":  # starlette's own, of a path without a route
            told = f"there is nothing at {request.url.path}; the routes: {request.base_url}openapi.json"
        if error.status_code == 405 and (known := (error.headers or {}).get("Allow")):
            told = f"{request.method} is not understood at {request.url.path}; expected {known}"
        return ApiError(error.status_code, told, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def other(_: Request, error: Exception) -> JSONResponse:
        log.error("unforeseen", exc_info=error)
        return of_exception(error).response()


def _place(problem: Mapping[str, Any]) -> str:
    """`messages.0.content` for pydantic's ("body", "messages", 0, "content"); "" where the body is not JSON."""
    where = () if problem["type"] == "json_invalid" else problem["loc"]
    return ".".join(str(part) for part in where[1:] if not str(part)[:1].isupper())


def _told(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return "unknown field; docs/server.md lists those that are known"
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem.get('ctx', {}).get('error', '')}"
    if problem["loc"] == ("body",) and problem["type"] in ("missing", "model_attributes_type"):
        return "expected a JSON object as the body"
    return str(problem["msg"])
