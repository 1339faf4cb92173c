"""Every route of the server. What a route does beyond reading and answering is in the file that is named after it."""

import asyncio
import contextlib
import dataclasses
import io
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from starlette.types import Scope

from hookmap._version import __version__
from hookmap.errors import SelectionError
from hookmap.loading.prompts import Prompt
from hookmap.maps.tree import tree
from hookmap.services.server import errors, page, tokenizing, vectors
from hookmap.services.server.admission import admit
from hookmap.services.server.archives import zipped
from hookmap.services.server.chat import ChatWire, prompt_of
from hookmap.services.server.completions import CompletionWire, TextCompletion, prompts_of
from hookmap.services.server.downloads import download_of
from hookmap.services.server.editing import described as described_edits
from hookmap.services.server.editing import planned, read
from hookmap.services.server.embeddings import MOST, EmbeddingRequest, Embeddings, EmbeddingWire
from hookmap.services.server.embeddings import prompts_of as embedded_texts
from hookmap.services.server.errors import ApiError, bad, missing
from hookmap.services.server.guard import Guard
from hookmap.services.server.jobs import Job
from hookmap.services.server.metrics import Metrics
from hookmap.services.server.models import Loaded, Models
from hookmap.services.server.passing import in_passing
from hookmap.services.server.ranges import DOCUMENTED as RANGED
from hookmap.services.server.ranges import ranged
from hookmap.services.server.recording import described, tokens_of
from hookmap.services.server.requests import ChatRequest, CompletionRequest, Sampling
from hookmap.services.server.response_requests import ResponseRequest, renamed
from hookmap.services.server.responses import Answered, ResponseWire
from hookmap.services.server.sessions import Sessions
from hookmap.services.server.settings import Settings
from hookmap.services.server.streaming import answer
from hookmap.services.server.summaries import offered
from hookmap.services.server.text import Cutter
from hookmap.stores.ledger import tensor_name
from hookmap.vllm.model import VllmModel

_SWEEP = 60.0
"""seconds between looks at the age of sessions"""


class Named(BaseModel):
    """The body of POST /models/load and /models/unload."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str


class Defaults(BaseModel):
    """The body of PUT /v1/interventions."""

    model_config = ConfigDict(extra="forbid", strict=True)
    interventions: list[dict[str, Any]]
    model: str | None = None


def make_app(settings: Settings, models: Models, sessions: Sessions) -> FastAPI:
    """The ASGI application. It closes `models` and `sessions` when it is shut down."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(sessions))
        yield
        sweeping.cancel()
        await asyncio.to_thread(models.close)
        sessions.close()

    # The pages at /docs load scripts from elsewhere.
    app = FastAPI(
        title="hookmap",
        version=__version__,
        lifespan=lifespan,
        responses=dict(errors.DOCUMENTED),
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(_known_query)],
    )
    metrics = Metrics(models, sessions)

    def done(scope: Scope, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "other")
        metrics.requests.labels(path, status).inc()
        metrics.seconds.labels(path).observe(seconds)

    app.add_middleware(Guard, settings=settings, done=done)
    errors.install(app)
    page.install(app)
    tokenizing.install(app, settings, models)
    vectors.install(app, settings.vectors)
    _generation(app, settings, models, sessions)
    _sessions(app, models, sessions)
    _models(app, models)
    _interventions(app, models, sessions)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server is up, its version and the loaded models; needs no key."""
        return {"status": "ok", "version": __version__, "models": [loaded.name for loaded in models.all]}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics_text() -> Response:
        """Counts, times and memory, as Prometheus reads them."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _known_query(request: Request) -> None:
    """Raises ApiError for a parameter that the route does not read: a misspelt one would silently change nothing."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    if unknown := [name for name in request.query_params if name not in known]:
        there = f"it knows {', '.join(sorted(known))}" if known else "it takes none"
        raise bad(f"{', '.join(unknown)}: unknown query parameter of {request.url.path}; {there}.", unknown[0])


async def _sweep(sessions: Sessions) -> None:
    while True:
        await asyncio.sleep(_SWEEP)
        await asyncio.to_thread(sessions.sweep)


def _answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """How a route documents its answers: in one piece, or a stream of chunks."""
    return {200: {"model": model, "content": {"text/event-stream": {}}}}


def _generation(app: FastAPI, settings: Settings, models: Models, sessions: Sessions) -> None:
    async def job_of(
        asked: Sampling, request: Request, model: Loaded, prompts: Callable[[Any], Sequence[Prompt]]
    ) -> Job:
        id, defaults = request.scope["request_id"], models.interventions_of(model)

        def read(tokenizer: Any) -> Job:
            return admit(asked, id, model, prompts(tokenizer), settings, sessions, defaults)

        return await model.encoding.run(asked.characters, read, asked.reads)

    @app.post("/v1/chat/completions", responses=_answers(ChatCompletion))
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """An answer to messages, in one piece or as a stream; the `hookmap` field keeps and edits activations."""
        model = models.get(asked.model)

        def prompts(tokenizer: Any) -> Sequence[Prompt]:
            return [prompt_of(asked, model.hm, settings.image_pixels, tokenizer)]

        job = await job_of(asked, request, model, prompts)
        wire = ChatWire(asked, job, model.name, model.hm.tokenizer)
        return await answer(request, model.scheduler, job, wire, bool(asked.stream))

    @app.post("/v1/completions", responses=_answers(TextCompletion))
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """What follows each prompt, in one piece or as a stream; the `hookmap` field keeps and edits activations."""
        model = models.get(asked.model)
        job = await job_of(asked, request, model, lambda tokenizer: prompts_of(asked, tokenizer))
        wire = CompletionWire(asked, job, model.name, model.hm.tokenizer)
        return await answer(request, model.scheduler, job, wire, bool(asked.stream))

    @app.post("/v1/responses", responses=_answers(Answered))
    async def responses(asked: ResponseRequest, request: Request) -> Response:
        """An answer to items, in one piece or as events; nothing of it is kept but what the `hookmap` field names."""
        model, chat = models.get(asked.model), asked.chat()

        def prompts(tokenizer: Any) -> Sequence[Prompt]:
            return [prompt_of(chat, model.hm, settings.image_pixels, tokenizer)]

        try:
            job = await job_of(chat, request, model, prompts)
        except ApiError as error:
            raise renamed(error) from None
        wire = ResponseWire(asked, job, model.name, model.hm.tokenizer)
        return await answer(request, model.scheduler, job, wire, bool(asked.stream))

    @app.post("/v1/embeddings", response_model=Embeddings)
    async def embeddings(asked: EmbeddingRequest, request: Request) -> Response:
        """A vector of each text: one row of a named point, over its tokens or of its last one."""
        model = models.get(asked.model)
        reading, limits = asked.reading(model.hm), dataclasses.replace(settings, max_choices=MOST)

        def read(tokenizer: Any) -> Job:
            prompts = embedded_texts(asked, tokenizer)
            defaults = models.interventions_of(model)
            return admit(reading, request.scope["request_id"], model, prompts, limits, sessions, defaults)

        try:
            job = await model.encoding.run(asked.characters, read, "input")
        except ApiError as error:
            raise asked.blamed(error) from None
        return await answer(request, model.scheduler, job, EmbeddingWire(asked, job, model.name), streams=False)


def _sessions(app: FastAPI, models: Models, sessions: Sessions) -> None:
    @app.get("/v1/activations/sessions")
    async def listed(
        label: str | None = None,
        metadata: Annotated[list[str] | None, Query(description="KEY:VALUE; all of them, where given often")] = None,
        order: Literal["asc", "desc"] = "asc",
        after: str | None = None,
        limit: Annotated[int | None, Query(ge=1, le=2**31)] = None,
    ) -> dict[str, Any]:
        """Sessions, oldest first unless `order` is desc, of this label and these metadata; `after`: an id."""
        found = [each for each in sessions.all() if each.about.fits(label, metadata or ())]
        found = found[:: -1 if order == "desc" else 1]
        if after is not None:
            ids = [each.id for each in found]
            if after not in ids:
                raise missing("after: no session of this list has this id.", "session_not_found")
            found = found[ids.index(after) + 1 :]
        shown = [session.described() for session in found[:limit]]
        return {"object": "list", "data": shown, "has_more": len(shown) < len(found)}

    @app.get("/v1/activations/sessions/{id}")
    @app.get("/v1/activations/session/{id}")
    async def one(id: str) -> dict[str, Any]:
        """A session: its tensors, texts and tokens."""
        session = sessions.get(id)
        if not session.finished:
            return session.described()
        return await asyncio.to_thread(_described, sessions, id, models.tokenizer_of)

    @app.delete("/v1/activations/sessions/{id}")
    @app.delete("/v1/activations/session/{id}")
    async def delete(id: str) -> dict[str, Any]:
        """Removes a session and its folder."""
        await asyncio.to_thread(sessions.delete, id)
        return {"id": id, "object": "activations.session", "deleted": True}

    @app.get(
        "/v1/activations/sessions/{id}/archive",
        response_class=StreamingResponse,
        responses={200: {"content": {"application/zip": {}}}},
    )
    async def archive(id: str) -> Response:
        """The whole session as a zip file of its folder."""
        folder = sessions.folder(id)
        headers = {"Content-Disposition": f'attachment; filename="{folder.name}.zip"'}
        return StreamingResponse(zipped(folder, folder.name), media_type="application/zip", headers=headers)

    @app.get("/v1/activations/sessions/{id}/tensors", response_class=Response, responses=RANGED)
    @app.get("/v1/activations/session/{id}/tensors", response_class=Response, responses=RANGED)
    async def tensors(
        id: str,
        request: Request,
        point: str,
        layer: int | None = None,
        call: int | None = None,
        choice: int = Query(0, ge=0, le=2**31),
        start: int | None = Query(None, ge=-(2**31), le=2**31),
        stop: int | None = Query(None, ge=-(2**31), le=2**31),
    ) -> Response:
        """Rows of one tensor, those of the tokens start to stop - 1, as safetensors; HTTP ranges are understood."""
        tokens = None if start is None and stop is None else slice(start, stop)
        read = partial(_download, sessions, id, (point, layer, call), choice, tokens, request.headers)
        return await asyncio.to_thread(in_passing, read)


def _described(sessions: Sessions, id: str, tokenizer_of: Callable[[str | None], Any]) -> dict[str, Any]:
    with sessions.reading(id) as store:
        session = sessions.get(id)
        meta = described(store, f"/v1/activations/sessions/{session.id}")
        stop, tokenizer = store.manifest.settings.get("stop") or (), tokenizer_of(session.model)
        for sample, told in zip(store.samples, meta["samples"], strict=True):
            text = Cutter(stop)  # as it was answered; the tokens behind the stop string were generated, too
            told |= {"prompt": sample.prompt, "text": text.add(sample.text) + text.end()}
            told |= tokens_of(sample, tokenizer)
    return {**session.described(), **meta}


def _download(
    sessions: Sessions,
    id: str,
    where: tuple[str, int | None, int | None],
    choice: int,
    tokens: slice | None,
    headers: Mapping[str, str],
) -> Response:
    try:
        with sessions.reading(id) as store:
            point, layer, call = where
            file = download_of(store, choice, point, layer, tokens, call)
            name = f"{id}.{choice}.{tensor_name(file.key)}.safetensors"
            return ranged(file, headers, name, f"{name} {tokens}")
    except SelectionError as error:
        raise ApiError(404, str(error), code="not_captured") from error


def _models(app: FastAPI, models: Models) -> None:
    @app.get("/v1/models")
    async def listed() -> dict[str, Any]:
        """The models that are loaded."""
        return {"object": "list", "data": [_model(loaded) for loaded in models.all]}

    @app.get("/v1/models/{id:path}")
    async def one(id: str) -> dict[str, Any]:
        """One loaded model."""
        return _model(models.get(id))

    @app.get("/v1/model/structure")
    async def structure(model: str | None = None) -> Response:
        """The map, the tree of modules and the points of a model; of the first one, where none is named."""
        loaded = models.get(model)
        return JSONResponse(await asyncio.to_thread(_structure, loaded))

    @app.post("/models/load")
    async def load(asked: Named) -> dict[str, Any]:
        """Loads a model that `--allow` names; needs the admin key."""
        return _model(await asyncio.to_thread(models.load, asked.model))

    @app.post("/models/unload")
    async def unload(asked: Named) -> dict[str, Any]:
        """Lets go of a model and its memory; needs the admin key."""
        models.get(asked.model)
        await asyncio.to_thread(models.unload, asked.model)
        return {"id": asked.model, "object": "model", "unloaded": True}


def _interventions(app: FastAPI, models: Models, sessions: Sessions) -> None:
    def told(loaded: Loaded) -> dict[str, Any]:
        return {"object": "list", "model": loaded.name, "data": described_edits(models.interventions_of(loaded))}

    @app.get("/v1/interventions")
    async def defaults(model: str | None = None) -> dict[str, Any]:
        """The interventions of requests that bring none."""
        return told(models.get(model))

    @app.put("/v1/interventions")
    async def set_defaults(asked: Defaults) -> dict[str, Any]:
        """Those of every request to this model that brings none of its own; an empty list takes them away."""
        loaded = models.get(asked.model)
        found = read(asked.interventions, loaded.hm, sessions, models.functions)
        await asyncio.to_thread(in_passing, partial(planned, loaded.hm, found, (), 0))
        models.interventions[loaded.name] = asked.interventions
        return told(loaded)


def _model(loaded: Loaded) -> dict[str, Any]:
    found = Model(id=loaded.name, created=loaded.created, object="model", owned_by="hookmap")
    return {**found.model_dump(exclude_unset=True), "max_model_len": loaded.context}


def _structure(loaded: Loaded) -> dict[str, Any]:
    """The map, the tree as text, and the points that a capture of every layer gives."""
    modules = {path: type(module).__name__ for path, module in loaded.hm.model.named_modules()}
    here = loaded.hm.map.model_copy(update={"model_id": loaded.name})  # not the folder it came from
    drawn = io.StringIO()
    screen = Console(width=1000, file=drawn, color_system=None)
    screen.print(tree(here, modules))
    return {
        "model": loaded.name,
        "points": list(dict.fromkeys(selector.point for selector in here.selectors())),
        "layers": here.num_layers,
        "summary": offered(here),
        "places": page.places(here),
        "heads": here.num_heads,
        "reads_prompt": not isinstance(loaded.hm, VllmModel),
        "map": here.to_document(),
        "tree": drawn.getvalue(),
    }
