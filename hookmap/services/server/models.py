"""The loaded models: for each, one copy of the weights and one thread."""

import gc
import logging
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hookmap.capture.padding import whole_batch_limit
from hookmap.demo import MODEL_PATH
from hookmap.errors import ModelError
from hookmap.loading.encoder_decoder import is_encoder_decoder
from hookmap.loading.modules import why_it_generates_nothing
from hookmap.model import HookedModel
from hookmap.model import open as open_model
from hookmap.services.server.batch_limits import BatchLimits
from hookmap.services.server.editing import Documents
from hookmap.services.server.encoding import Encoding
from hookmap.services.server.errors import ApiError, missing
from hookmap.services.server.jobs import Queue
from hookmap.services.server.joining import why_no_joins
from hookmap.services.server.passing import in_passing
from hookmap.services.server.scheduler import Scheduler
from hookmap.services.server.settings import Settings
from hookmap.services.server.vllm_scheduler import VllmScheduler
from hookmap.vllm.model import VllmModel, open_on_vllm

log = logging.getLogger("hookmap.server")


@dataclass(frozen=True)
class Loaded:
    """A model that is being served."""

    name: str
    hm: HookedModel
    scheduler: Queue
    created: int
    context: int | None
    """the most tokens of a prompt and its completion; None: no limit is known"""
    encoding: Encoding


class Models:
    """Loads, finds and unloads models."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loaded: dict[str, Loaded] = {}
        self.functions = settings.functions
        self.interventions: dict[str, Documents] = {}
        """used for requests that give none, by the model's name"""
        self._names: dict[str, str] = {}
        self._changing = threading.Lock()

    @property
    def all(self) -> tuple[Loaded, ...]:
        """The loaded models, in the order they were loaded."""
        return tuple(self._loaded.values())

    def get(self, name: str | None) -> Loaded:
        """The loaded model of this name, or the first one for None. Raises ApiError 404."""
        if name is None and self._loaded:
            return next(iter(self._loaded.values()))
        found = self._loaded.get(name or "")
        if found is None:
            loaded = ", ".join(self._loaded) or "none"
            raise missing(f"the model {name!r} is not loaded. Loaded: {loaded}.", "model_not_found", "model")
        return found

    def interventions_of(self, loaded: Loaded) -> Documents:
        """The interventions of requests that give none."""
        return self.interventions.get(loaded.name, ())

    def tokenizer_of(self, name: str | None) -> Any:
        """The tokenizer of a loaded model; None where none of this name is loaded."""
        found = self._loaded.get(name or "")
        return None if found is None else found.hm.tokenizer

    def add(self, name: str, hm: HookedModel) -> Loaded:
        """Serve an open model. Raises ModelError for one that continues no text."""
        why = why_it_generates_nothing(hm.root)
        if why is None and is_encoder_decoder(hm.root):
            why = f"{type(hm.root).__name__} is an encoder-decoder: what it generates continues no prompt"
        if why is not None:
            raise ModelError(f"{why}, and the server's answers do. Capture it without the server: hookmap capture")
        scheduler = self._on_vllm(name, hm) if isinstance(hm, VllmModel) else self._in_batches(name, hm)
        loaded = Loaded(name, hm, scheduler, int(time.time()), context_of(hm), Encoding(hm.tokenizer, context_of(hm)))
        self._loaded[name] = loaded
        return loaded

    def open(self, source: str) -> HookedModel:
        """Open a model as the settings say. Raises ModelError."""
        if self._settings.engine == "vllm":
            return open_on_vllm(source, shared=True, functions=self.functions, **self._settings.loads)
        return in_passing(lambda: open_model(source, **self._settings.loads))

    def _on_vllm(self, name: str, hm: VllmModel) -> Queue:
        log.info("%s: requests join vLLM's batches, up to %d", name, hm.engine_of_vllm.in_flight)
        return VllmScheduler(hm, self._settings.queue)

    def _in_batches(self, name: str, hm: HookedModel) -> Queue:
        batch = self._settings.batch
        padded, joins = 0, False
        if batch > 1:
            log.info("%s: trying whether prompts may share a batch", name)
            why, alone = in_passing(lambda: (hm.why_no_pads, why_no_joins(hm)))
            padded = 0 if why else whole_batch_limit(hm.root.config) or sys.maxsize
            joins = alone is None
            how = "join the batch that runs" if joins else f"share batches that wait together, for {alone}"
            log.info("%s: requests %s%s", name, how, f"; of one length: {why}" if why else "")
        limits = BatchLimits(batch, self._settings.batch_tokens, context_of(hm), padded)
        return Scheduler(name, hm, self._settings.queue, limits, joins)

    def load(self, source: str) -> Loaded:
        """Open an allowed model, unless it is loaded already. Raises ApiError, ModelError.

        `source`: as `--allow` names it, or what clients call it.
        """
        allowed = next((each for each in self._settings.allow if source in (each, self.called(each))), None)
        if allowed is None:
            raise ApiError(403, "this model is not on the server's list: --allow MODEL", code="model_not_allowed")
        name = self.called(allowed)
        with self._changing:  # two requests for one model load it once
            if name in self._loaded:
                return self._loaded[name]
            return self.add(name, self.open(allowed))

    def called(self, source: str, name: str | None = None) -> str:
        """What clients call a model of this source. `name`: what they call it from now on."""
        if name is not None:
            self._names[source] = name
        return self._names.get(source) or name_of(source)

    def unload(self, name: str) -> None:
        """Let the waiting requests of a model run, then free its weights. Raises ApiError 404."""
        with self._changing:
            loaded = self.get(name)
            loaded.scheduler.close(self._settings.drain)
            if isinstance(loaded.hm, VllmModel):
                loaded.hm.close()
            del self._loaded[name]
            del loaded
            self.interventions.pop(name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """End the thread of every model; requests that still wait are cancelled."""
        for loaded in self.all:
            loaded.scheduler.close(0.0)
            if isinstance(loaded.hm, VllmModel):
                loaded.hm.close()


def name_of(source: str) -> str:
    """What clients call a model: its hub id, or the last part of a folder's path."""
    path = Path(source)
    if path == MODEL_PATH:
        return "hookmap-demo"
    return path.resolve().name if path.exists() else source


def context_of(hm: HookedModel) -> int | None:
    """The most tokens that the model takes; None: no limit is known."""
    if isinstance(hm, VllmModel):
        return hm.engine_of_vllm.longest
    config: Any = hm.root.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    told = getattr(hm.tokenizer, "model_max_length", None)
    limits = [limit for limit in (most, told) if isinstance(limit, int) and 0 < limit < 10**9]
    return min(limits, default=None)
