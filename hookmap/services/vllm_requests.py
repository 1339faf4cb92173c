"""A request of `vllm serve` with a `hookmap` field: checked, run by vLLM beside others, and recorded."""

import asyncio
import json
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import GenerationConfig

from hookmap.capture.interventions.documents import Intervention, fingerprint
from hookmap.capture.options import RowOptions, options_of
from hookmap.capture.rows import RowSelection, row_selection
from hookmap.errors import CaptureError, HookmapError
from hookmap.loading import configs
from hookmap.loading.checkpoints import load_tokenizer
from hookmap.loading.memory import MemoryUse
from hookmap.loading.prompts import Prompt, text_of
from hookmap.services.server.editing import planned, read
from hookmap.services.server.errors import bad
from hookmap.services.server.recording import InlineRecorder, RecordingPlan, SessionRecorder, plan
from hookmap.services.server.requests import Recording, Sampling
from hookmap.services.server.sessions import SERVED, Sessions
from hookmap.services.server.settings import Settings
from hookmap.services.server.watched_run import Gathered
from hookmap.vllm.engine import asked_of
from hookmap.vllm.model import VllmModel, without_weights
from hookmap.vllm.plugin import settings_of
from hookmap.vllm.run import Serving, VllmGenerating
from hookmap.vllm.shared_engine import SharedEngine
from hookmap.vllm.spec import NAME

SWITCH = """vllm serve MODEL --additional-config '{"hookmap": {"serving": {"sessions": "FOLDER"}}}'"""


@dataclass
class Served:
    """What the requests of one server share."""

    hm: VllmModel
    name: str
    settings: Settings
    sessions: Sessions | None


class _NoSessions:
    def folder(self, id: str) -> Path:
        raise bad(f"source.store: this server keeps no sessions. Its operator can: {SWITCH}", "hookmap.interventions")


class Asked:
    """One request, from its check until its answer."""

    def __init__(
        self, served: Served, field: str, recording: Recording, changes: tuple[Intervention, ...], model: str
    ) -> None:
        """`field`: what the client calls its field. `model`: what it calls the model, or an adapter of it."""
        self.mark = secrets.token_hex(16)
        self.field, self.plan = field, None if not changes else f"{NAME}-{self.mark}"
        self.begun = self.ended = False
        self._served, self._recording, self._changes, self._model = served, recording, changes, model
        self._new: dict[int, list[int]] = {}
        self._taken: list[tuple[str | None, list[int], dict[str, Any]]] = []

    def begin(self, prompt: Any, parameters: Any) -> tuple[Any, Any]:
        """The prompt and the parameters as vLLM is to run them. Raises HookmapError."""
        self.begun = True
        hm, count = self._served.hm, parameters.n or 1
        if "prompt_token_ids" not in prompt or prompt.get("type", "token") != "token":
            raise bad(f"{self.field}: only prompts of text and of token ids are captured.", self.field)
        if count > 1 and self._changes:
            raise bad(f"{self.field}.interventions: one choice for each request, so that n is 1.", self.field)
        ids = tuple(prompt["prompt_token_ids"])
        text = prompt.get("prompt") or text_of(hm.tokenizer, ids)
        self._prompts = (Prompt(text, ids),) * count
        most = parameters.max_tokens or 1
        asked = Sampling.model_validate({"hookmap": self._recording})
        self._kept: RecordingPlan | None = plan(asked, hm, self._served.settings, self._prompts, most)
        self._run = VllmGenerating(
            hm.engine_of_vllm,  # type: ignore[arg-type]  # no engine of the hooks' kind
            hm.tokenizer,
            self._kept.selectors if self._kept else (),
            self._prompts,
            self._kept.selection if self._kept else RowSelection(),
            self._kept.matching if self._kept else frozenset(),
            None,
            MemoryUse(),
            max_new_tokens=most,
            config=GenerationConfig(),
        )
        serving = Serving(self._run, Gathered())
        if self.plan is not None:
            serving.name = self.plan
            self._run.edits = planned(hm, self._changes, self._prompts[:1], most).edits
            hm.engine_of_vllm.refuse_untapped([edit.selector.key for edit in self._run.edits])
            hm.engine_of_vllm.plan(self.plan, self._run.edits)
        spec = serving.spec(0)
        parameters = parameters.clone()
        parameters.extra_args = {**parameters.extra_args, NAME: spec.model_dump(mode="json", exclude_defaults=True)}
        parameters.skip_reading_prefix_cache = True
        if (salt := spec.salt(len(ids))) is not None:
            prompt = {**prompt, "cache_salt": salt + (prompt.get("cache_salt") or "")}
        self._parameters = parameters
        return prompt, parameters

    def note(self, output: Any) -> None:
        """vLLM's output has come."""
        from vllm.sampling_params import RequestOutputKind

        for each in output.outputs:
            mine = self._new.setdefault(each.index, [])
            if self._parameters.output_kind != RequestOutputKind.DELTA:
                mine.clear()
            mine.extend(each.token_ids)

    @property
    def engine(self) -> SharedEngine:
        """Where it runs."""
        engine = self._served.hm.engine_of_vllm
        assert isinstance(engine, SharedEngine)
        return engine

    def taking(self, name: str) -> tuple[Any, ...]:
        """Arguments of `hookmap_take`."""
        counts = [len(p.token_ids) + max(0, len(self._new.get(i, ())) - 1) for i, p in enumerate(self._prompts)]
        return asked_of({name: counts}), True

    def end(self, ranks: list[Any]) -> None:
        """All has been generated. `ranks`: what `hookmap_take` gave. Raises CaptureError for what went wrong."""
        self.ended = True
        self._taken = self._served.hm.engine_of_vllm.taken(ranks)
        if wrong := [error for error, _, _ in self._taken if error is not None]:
            raise CaptureError("; ".join(dict.fromkeys(wrong)))

    def recorded(self) -> dict[str, Any]:
        """Write the rows where they are wanted. Returns `activations_meta`. Raises HookmapError."""
        if self._kept is None:
            return {"session_id": None, "return": "none", "samples": [], "tensors": []}
        recorder = self._recorder(self._kept)
        try:
            sink = Gathered(recorder.begin())
            serving = Serving(self._run, sink)
            for number, (_, positions, rows) in enumerate(self._taken):
                serving.hold(number, self._new[number], positions, rows)
            serving.flush()
            meta = recorder.end(sink.samples, self._run.lost)
        except BaseException:
            recorder.drop()
            raise
        if not self._kept.inline:
            for each in meta["tensors"]:
                del each["where"]  # no route of vLLM's reads it
        return meta

    def _recorder(self, kept: RecordingPlan) -> InlineRecorder | SessionRecorder:
        if kept.inline:
            return InlineRecorder(kept, self._served.hm.tokenizer)
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens", "stop")
        told: dict[str, Any] = {"sampling": {name: getattr(self._parameters, name) for name in names}}
        if self._changes:
            told["interventions"] = fingerprint(self._changes)
        if self._recording.label:
            told[SERVED] = {"label": self._recording.label}
        assert self._served.sessions is not None
        return SessionRecorder(kept, self._served.sessions, self._served.hm, self._model, told)


MARKED: dict[str, Asked] = {}
"""requests that are being answered, by their marks; a mark is no name that a client could guess"""
_SERVED: dict[int, Served] = {}
_OPENING = threading.Lock()


def admitted(llm: Any, loop: asyncio.AbstractEventLoop, request: Any, field: tuple[str, Any]) -> Asked:
    """Check a request before vLLM reads it. `field`: its name and its value. Raises ApiError with all that is wrong."""
    name, given = field
    if NAME not in (llm.vllm_config.additional_config or {}):
        raise bad(f"{name}: this server does not capture. Its operator can switch it on: {SWITCH}", name)
    try:
        recording = Recording.model_validate_json(given if isinstance(given, str) else json.dumps(given))
    except ValidationError as error:
        told = [f"{'.'.join(map(str, (name, *each['loc'])))}: {each['msg']}" for each in error.errors()]
        raise bad("; ".join(told), name) from error
    with _OPENING:
        if id(llm) not in _SERVED:
            _SERVED[id(llm)] = _opened(llm, loop)
    served = _SERVED[id(llm)]
    problems = list[str]()
    if recording.summary is not None:
        problems.append(f"{name}.summary: vLLM sends no figures of tokens; keep the rows.")
    if getattr(request, "use_beam_search", False):
        problems.append("use_beam_search: rows of beams are not kept.")
    prompts = getattr(request, "prompt", None)
    if isinstance(prompts, list) and len(prompts) > 1 and not isinstance(prompts[0], int):
        problems.append(f"prompt: with {name}, one prompt for each request.")
    if recording.return_ == "store" and served.sessions is None:
        problems.append(f"{name}.return: this server keeps no sessions; ask for inline, or: {SWITCH}")
    changes: tuple[Intervention, ...] = ()
    try:
        sessions: Any = served.sessions or _NoSessions()
        changes = read(recording.interventions or [], served.hm, sessions, served.settings.functions)
    except HookmapError as error:
        problems.append(f"{name}.interventions: {error}")
    try:
        row_selection(**recording.model_dump(include=set(options_of(RowOptions))))
        # all positions of one token: what depends on the prompt is told when it is known
        early = recording.model_copy(update={"positions": "all"})
        kept = plan(Sampling.model_validate({"hookmap": early}), served.hm, served.settings, [Prompt("", (0,))], 1)
        served.hm.engine_of_vllm.refuse_untapped([selector.key for selector in kept.selectors] if kept else [])
    except HookmapError as error:
        problems.append(f"{name}: {error}")
    if problems:
        raise bad("; ".join(problems), name)
    return Asked(served, name, recording, changes, getattr(request, "model", None) or served.name)


def _opened(llm: Any, loop: asyncio.AbstractEventLoop) -> Served:
    model = llm.vllm_config.model_config
    loads = {"trust_remote_code": model.trust_remote_code, "revision": model.revision}
    config = configs.load_config(model.model, **loads)
    module = without_weights(model.model, config, llm.vllm_config, loads)
    tokenizer = load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code)
    hm = VllmModel(SharedEngine(llm, loop, module), tokenizer, model.model)
    engine = settings_of({NAME: llm.vllm_config.additional_config[NAME]})
    own = engine.serving
    settings = Settings(
        root=Path(own.sessions or "."),
        functions=tuple(engine.functions),
        request_bytes=own.request_bytes,
        total_bytes=own.max_bytes,
        inline_bytes=own.inline_bytes,
        max_age=own.max_age,
    )
    sessions = None
    if own.sessions is not None:
        sessions = Sessions(settings.root, settings.total_bytes, settings.max_age, most=own.max_sessions)
    served = model.served_model_name
    return Served(hm, served if isinstance(served, str) else served[0], settings, sessions)
