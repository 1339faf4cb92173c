"""Recording a request: what it keeps, into a session's folder or the answer itself, and what the answer says of it."""

import base64
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import safetensors.torch

from hookmap.activations import Activation, Sample, Sink, call_of
from hookmap.capture.estimate import check_room, in_words
from hookmap.capture.options import RowOptions, options_of
from hookmap.capture.rows import RowSelection, refuse_nowhere, row_selection
from hookmap.errors import StoreError
from hookmap.loading.prompts import Prompt, text_of
from hookmap.maps.selectors import Selector
from hookmap.model import HookedModel
from hookmap.services.server.errors import ApiError, bad, blaming, unkept
from hookmap.services.server.requests import Recording, Sampling
from hookmap.services.server.sessions import Session, Sessions, about_of
from hookmap.services.server.settings import Settings
from hookmap.stores import open_store
from hookmap.stores.background import BackgroundWriter
from hookmap.stores.interface import Store
from hookmap.stores.ledger import tensor_name
from hookmap.stores.manifest import manifest_of_run
from hookmap.stores.memory import MemoryStore
from hookmap.stores.whole_writer import WholeWriter
from hookmap.vllm.model import VllmModel

log = logging.getLogger("hookmap.server")


@dataclass(frozen=True)
class RecordingPlan:
    """What one request records."""

    selectors: tuple[Selector, ...]
    selection: RowSelection
    matching: frozenset[int]
    inline: bool
    bytes: int
    """at most"""


def plan(
    asked: Sampling,
    hm: HookedModel,
    settings: Settings,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sessions: Sessions | None = None,
) -> RecordingPlan | None:
    """What the request records, None for nothing.

    Raises SelectionError, and ApiError: 413 where it is too much, 507 or 503 where `sessions` have no room for it.
    """
    field = asked.hookmap
    if field is None:
        if not asked.store_activations:
            return None
        field = Recording.model_validate({})
    if field.return_ == "none":
        return None
    what = _given(field, settings)
    rows = field.model_dump(include=set(options_of(RowOptions)))
    chosen = blaming("hookmap", row_selection, rows)
    selectors = blaming("hookmap", hm.selectors, what)
    if not selectors:
        raise bad("hookmap: no point of any layer is selected.", "hookmap.points")
    expected = blaming("hookmap", partial(hm.estimate, list(prompts), **what, max_new_tokens=max_new_tokens), rows)
    inline, of_request = field.return_ == "inline", min(settings.request_bytes, settings.total_bytes)
    name, most = ("an answer", settings.inline_bytes) if inline else ("a request", of_request)
    if expected.bytes > most:
        raise ApiError(
            413,
            f"this request keeps {expected}, and {name} may keep {in_words(most)} ({most} bytes; asked: "
            f"{expected.bytes}). Ask for fewer points, layers, positions or tokens"
            + (", or return: store." if inline else "."),
            param="hookmap",
            code="activations_too_large",
        )
    if inline:
        check_room(expected, None)
    elif sessions is not None:
        sessions.check_room(expected.bytes)
    matching = blaming("hookmap.positions", partial(hm.matching, chosen))
    blaming("hookmap.positions", partial(refuse_nowhere, matching, [prompt.token_ids for prompt in prompts]))
    return RecordingPlan(selectors, chosen, matching, inline, expected.bytes)


def _given(field: Recording, settings: Settings) -> dict[str, Any]:
    points = settings.points if field.points is None else field.points
    layers = settings.layers if field.layers is None else field.layers
    if isinstance(field.points, Mapping) and field.layers is None:
        layers = "all"  # it names them itself
    if isinstance(points, Mapping) and field.points is None and field.layers is not None:
        points = list(points)  # the server's own points on the layers of the request
    calls = settings.calls if field.calls is None else field.calls
    listed = [list(each) if isinstance(each, tuple) else each for each in (layers, calls)]
    return {"layers": listed[0], "calls": listed[1], "points": points}


class SessionRecorder:
    """A Recorder that writes a session's folder."""

    def __init__(
        self,
        plan: RecordingPlan,
        sessions: Sessions,
        hm: HookedModel,
        model: str,
        settings: Mapping[str, Any],
        tells_tokens: bool = False,
    ):
        """`model`: its served name. `settings`: what the manifest says of the run.

        `tells_tokens`: whether the answer lists the tokens of each sample.
        """
        self.selectors, self.selection, self.matching = plan.selectors, plan.selection, plan.matching
        self._plan, self._sessions, self._model = plan, sessions, model
        self._hm, self._settings, self._tells_tokens = hm, settings, tells_tokens
        self._session: Session | None = None
        self._folder = Path()
        self._writer: BackgroundWriter | None = None
        self._failed: dict[str, Any] | None = None
        """the error that the answer names in place of its session"""

    def begin(self) -> Sink:
        """Make the session. Raises ApiError where there is no room, StoreError where its folder cannot be made."""
        manifest = manifest_of_run(
            [selector.key for selector in self.selectors],
            model=self._model,
            architecture=self._hm.map.architecture,
            architecture_map=self._hm.document,
            settings={**self._settings, **({"kept": chosen} if (chosen := self.selection.settings()) else {})},
        )
        self._session, self._folder = self._sessions.begin(self._model, self._plan.bytes, about_of(manifest))
        self._writer = BackgroundWriter(WholeWriter(self._folder, manifest))
        return _Forgiving(self._writer, self._fail)

    def end(self, samples: Sequence[Sample], lost: Mapping[str, int]) -> dict[str, Any]:
        """Close the session, which can be read from now on. Where the disk refused it, what is returned says so."""
        assert self._writer is not None and self._session is not None
        engine = "vllm" if isinstance(self._hm, VllmModel) else "hooks"
        try:
            self._writer.note({"engine": engine, "why": "served", **_overflow(self.selection, lost)})
            self._writer.close(finished=True)
            meta = described(open_store(self._folder), f"/v1/activations/sessions/{self._session.id}")
            meta |= _overflow(self.selection, lost)
            self._sessions.end(self._session)
        except (StoreError, OSError) as error:
            self._fail(error)
        if self._failed is not None:
            self.drop()
            return {"session_id": None, "return": "store", "samples": [], "tensors": [], "error": self._failed}
        if self._tells_tokens:
            _add_tokens(meta, samples, self._hm.tokenizer)
        return {"session_id": self._session.id, "return": "store", **meta}

    def drop(self) -> None:
        """Remove the session."""
        if self._writer is not None:
            self._writer.__exit__(RuntimeError, None, None)
        if self._session is not None:
            self._sessions.drop(self._session)

    def _fail(self, error: Exception) -> None:
        """The disk has refused something: the answer goes on without its session."""
        if self._failed is None:
            log.error("a session of %s cannot be written", self._model, exc_info=error)
            self._failed = unkept(error).body()["error"]


class _Forgiving:
    """A sink before another one; what that one raises of the disk is told once, and later rows go nowhere."""

    def __init__(self, sink: Sink, fail: Callable[[Exception], None]) -> None:
        self._sink: Sink | None = sink
        self._fail = fail

    def write(self, activation: Activation) -> None:
        self._to(lambda sink: sink.write(activation))

    def finish(self, sample: Sample) -> None:
        self._to(lambda sink: sink.finish(sample))

    def abandon(self) -> None:
        """See Sink."""
        self._to(lambda sink: sink.abandon())

    def _to(self, call: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            call(self._sink)
        except (StoreError, OSError) as error:
            self._sink = None
            self._fail(error)


class InlineRecorder:
    """A Recorder whose rows are sent in the answer."""

    def __init__(self, plan: RecordingPlan, tokenizer: Any) -> None:
        self.selectors, self.selection, self.matching = plan.selectors, plan.selection, plan.matching
        self._tokenizer = tokenizer
        self._store = MemoryStore(selector.key for selector in plan.selectors)

    def begin(self) -> Sink:
        """A store in memory."""
        return self._store

    def end(self, samples: Sequence[Sample], lost: Mapping[str, int]) -> dict[str, Any]:
        """The answer's metadata, with a safetensors document in base64 for each choice."""
        meta = described(self._store, None) | _overflow(self.selection, lost)
        _add_tokens(meta, self._store.samples, self._tokenizer)
        for sample, told in zip(samples, meta["samples"], strict=True):
            told["safetensors"] = base64.b64encode(as_safetensors(self._store, sample.sample)).decode("ascii")
        return {"session_id": None, "return": "inline", **meta}

    def drop(self) -> None:
        """Memory is freed with the job."""


def _overflow(selection: RowSelection, lost: Mapping[str, int]) -> dict[str, Any]:
    """Which rows became infinite in the dtype that is kept; {} where none did."""
    return {"overflow": {"dtype": selection.dtype, "rows": dict(lost)}} if lost else {}


def as_safetensors(store: Store, sample: int) -> bytes:
    """Every tensor of one sample, named as in the shards: `resid_mid.8`."""
    return bytes(
        safetensors.torch.save({tensor_name(key): store.read(sample, *key).contiguous() for key in store.keys})
    )


def _add_tokens(meta: dict[str, Any], samples: Sequence[Sample], tokenizer: Any) -> None:
    """Say of each sample what its rows are of: `token_ids`, and each token's text as `token_texts`."""
    for sample, told in zip(sorted(samples, key=lambda each: each.sample), meta["samples"], strict=True):
        told |= tokens_of(sample, tokenizer)


def tokens_of(sample: Sample, tokenizer: Any) -> dict[str, Any]:
    """The tokens of a sample, so that its rows can be aligned without a tokenizer. A row's token is at its position."""
    texts = [text_of(tokenizer, [token]) for token in sample.token_ids] if tokenizer is not None else None
    return {"token_ids": list(sample.token_ids), "token_texts": texts}


def described(store: Store, where: str | None) -> dict[str, Any]:
    """`samples` and `tensors` of an answer's `activations_meta`. `where`: the path of the session."""
    samples = [
        {
            "choice": sample.sample,
            "prompt_tokens": sample.prompt_tokens,
            "tokens": len(sample.token_ids),
            "rows": sample.rows,
            "positions": sample.positions,
        }
        for sample in store.samples
    ]
    tensors = []
    for sample in store.samples:
        for key in store.keys:
            no_rows = range(1 if sample.positions == "mean" else 0)
            empty = store.rows_at(sample.sample, key, no_rows)
            shape = [sample.rows, *empty.shape[1:]]
            query = {"point": key[0], "layer": key[1], "call": call_of(key), "choice": sample.sample}
            link = urlencode({name: value for name, value in query.items() if value is not None})
            tensors.append(
                {
                    "point": key[0],
                    "layer": key[1],
                    **({} if call_of(key) is None else {"call": call_of(key)}),
                    "choice": sample.sample,
                    "shape": shape,
                    "dtype": str(empty.dtype).removeprefix("torch."),
                    "bytes": math.prod(shape) * empty.dtype.itemsize,
                    "where": "inline" if where is None else f"{where}/tensors?{link}",
                }
            )
    return {"samples": samples, "tensors": tensors}
