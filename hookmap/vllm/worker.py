"""The worker of vLLM that captures: attached when its model has loaded, asked by name through `collective_rpc`.

Arguments and results are plain JSON data and bytes, so that they pass between processes without pickle.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load, save
from vllm import __version__ as vllm_version
from vllm.config import CompilationMode
from vllm.platforms import current_platform

from hookmap.activations import Key
from hookmap.capture.engines.parameters import parameters_of
from hookmap.errors import CaptureError, HookmapError, SelectionError
from hookmap.loading.weights import weights_of
from hookmap.maps.selectors import select
from hookmap.stores.ledger import tensor_name
from hookmap.vllm.buffer import Chosen
from hookmap.vllm.discover import discover
from hookmap.vllm.places import ModelPlaces, Place
from hookmap.vllm.plans import Functions, from_wire
from hookmap.vllm.plugin import DEFAULT_TAPS
from hookmap.vllm.rows import StepRows, check_positions, rows_of
from hookmap.vllm.session import Session
from hookmap.vllm.spec import NAME
from hookmap.vllm.stages import Stage, make_room_for_what_comes_in
from hookmap.vllm.taps import Taps

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Base
else:
    from vllm.v1.worker.gpu_worker import Worker as _Base

FINAL_NORM: Key = ("final_norm", None)
CHECKED_STEPS = 64
"""steps of a device whose positions are held against the runner's; on a CPU all are, at no cost"""


class HookmapWorker(_Base):  # type: ignore[misc]  # vLLM is not typed
    """vLLM's own worker of this platform, with hookmap's methods beside its own."""

    _found: ModelPlaces
    _rows: StepRows
    _session: Session
    _stage: Stage
    _elsewhere: frozenset[Key]
    _taps: Taps

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model as vLLM does, then find its points and put hooks on them, before anything is compiled."""
        super().load_model(*args, **kwargs)
        self._problem: HookmapError | None = None
        try:
            self._attach()
        except HookmapError as error:  # told by `hookmap_describe`: here it would be lost in the log of a process
            self._problem = error

    def _attach(self) -> None:
        runner = self.model_runner
        model = runner.get_model()
        rows = self._rows = rows_of(runner, vllm_version)
        compiled = self.vllm_config.compilation_config.mode != CompilationMode.NONE
        self._found = discover(self.vllm_config)
        found = self._found.map
        self._stage = Stage.of(model, found)
        elsewhere = self._elsewhere = self._stage.elsewhere(self._found)
        here = {key: place for key, place in self._found.places.items() if key not in elsewhere}
        self._taps = Taps(model, replace(self._found, places=here), compiled)
        make_room_for_what_comes_in(runner)
        if compiled:
            asked = self.vllm_config.additional_config[NAME]["taps"]
            points = asked or {name: "all" for name in DEFAULT_TAPS if name in found.points}
            self._taps.tap({selector.key for selector in select(found, points)} - elsewhere)
        most = self.vllm_config.additional_config[NAME]["untaken_bytes"]
        self._session = Session(rows, found, self._taps, self._tap, parameters_of(model), most, elsewhere)
        self._taps.handler = self._session
        _watch(rows, self._session)

    def _tap(self, keys: Any) -> None:
        if lacking := sorted(tensor_name(key) for key in set(keys) - self._taps.tapped):
            if self._taps.compiled:
                raise CaptureError(
                    f"{', '.join(lacking)}: this model was compiled without it. Open it with taps= that names it, or "
                    "with eager=True for all points."
                )
            self._taps.tap(keys)

    @property
    def _functions(self) -> list[str]:
        """Those that may be imported here."""
        found: list[str] = self.vllm_config.additional_config[NAME]["functions"]
        return found

    def hookmap_describe(self) -> str:
        """The map, and what each point is, as JSON; or what went wrong when the model was loaded."""
        if self._problem is not None:
            return json.dumps({"error": [type(self._problem).__name__, str(self._problem)]})
        places = self._found.places
        return json.dumps(
            {
                "map": self._found.map.to_document(),
                "places": [
                    [list(key), place.why_not_written or _shared(place), place.parts, place.copies]
                    for key, place in places.items()
                ],
                "tapped": [list(key) for key in self._taps.tapped] if self._taps.compiled else None,
                "stage": self._stage.number,
                "elsewhere": [list(key) for key in self._elsewhere],
                "weights": weights_of(self.model_runner.get_model()),
                "vllm": vllm_version,
                "runner": f"model runner {self._rows.name} ({type(self.model_runner).__name__})",
                "process": os.getpid(),
                "functions": self._functions,
                "batch": [self.scheduler_config.max_num_seqs, self.scheduler_config.max_num_batched_tokens],
            }
        )

    def hookmap_plan(self, name: str, document: str, tensors: bytes) -> str | None:
        """Keep the interventions of a run until `hookmap_forget`. Returns why it cannot."""
        try:
            plan = from_wire(document, tensors, self._found.map, Functions(frozenset(self._functions)))
        except HookmapError as error:
            return str(error)
        self._session.plans[name] = plan
        return None

    def hookmap_forget(self, name: str) -> None:
        """The run with this plan is over."""
        self._session.plans.pop(name, None)

    def hookmap_take(self, requests: str, packed: bool) -> list[Any]:
        """Of each request that has ended: [error or None, positions, rows], one for each of its sequences.

        `requests`: JSON, a list of [the name it was added under, how many tokens of each sequence have rows].
        `packed`: rows as safetensors bytes; otherwise as tensors by name, for a client in this process.
        """
        return [
            self._taken(name, tokens, packed)
            for request, counts in json.loads(requests)
            for name, tokens in zip(self._session.names(request) or [request], counts, strict=False)
        ]

    def hookmap_unembed(self, rows: bytes) -> bytes:
        """From rows of the last layer's stream: the final norm's, and the logits of these; safetensors in and out.

        b"" in a stage of a pipeline that does not have them. Raises SelectionError where the final norm is not one
        module's output.
        """
        if FINAL_NORM in self._elsewhere:
            return b""
        terms = self._found.places[FINAL_NORM].terms if FINAL_NORM in self._found.places else ()
        if len(terms) != 1 or terms[0].side != "output":
            raise SelectionError("no lens: the final norm of this model is not the output of one module.")
        model = self.model_runner.get_model()
        with torch.inference_mode():
            stream = load(rows)["stream"].to(self.device)
            normed = model.get_submodule(terms[0].module)(stream if terms[0].flat else stream[None])
            normed = normed[0] if isinstance(normed, tuple) or not terms[0].flat else normed
            logits = model.compute_logits(normed)
        found = {"normed": normed} | ({} if logits is None else {"logits": logits.float()})
        data: bytes = save({name: tensor.cpu().contiguous() for name, tensor in found.items()})
        return data

    def hookmap_row(self, request: str, position: int) -> bytes:
        """What is kept of one token of a request that runs, as safetensors; b"" where nothing is."""
        held = next((self._session.requests[name] for name in self._session.names(request)), None)
        if held is None or position not in held.positions:
            return b""
        slot = held.slots[held.positions.index(position)]
        packed: bytes = save({tensor_name(key): self._session.slabs.get(key, Chosen([slot])) for key in held.keys})
        return packed

    def hookmap_drop(self, requests: Sequence[str]) -> None:
        """Forget requests that were aborted, by the names they were added under."""
        for request in requests:
            for name in self._session.names(request):
                self._session.drop(name)

    def _taken(self, name: str, tokens: int, packed: bool) -> list[Any]:
        try:
            positions, rows = self._session.take(name, tokens)
        except HookmapError as error:
            return [str(error), [], b"" if packed else {}]
        named = {tensor_name(key): tensor for key, tensor in rows.items()}
        return [None, positions, save(named) if packed else named]


def _shared(place: Place) -> str | None:
    """Why a point must not be written whose parts are in several ranks."""
    return None if place.parts == 1 else "each rank of tensor parallelism holds a part of it"


def _watch(rows: StepRows, session: Session) -> None:
    """Let the session know of each step."""
    checked = 0

    def begin(positions: torch.Tensor | None) -> None:
        nonlocal checked
        segments = session.begin(rows.segments(), None if positions is None else positions.shape[-1])
        if not segments or positions is None:
            return
        if positions.device.type == "cpu" or checked < CHECKED_STEPS:
            checked += 1
            try:
                check_positions(segments, positions)
            except CaptureError as error:
                session.fail(str(error))

    rows.watch(begin, session.end)
