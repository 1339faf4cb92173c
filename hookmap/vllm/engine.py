"""vLLM's engine as hookmap drives it: requests go in, their texts and rows come out. In this process or in workers."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load
from torch import nn

from hookmap import errors
from hookmap.activations import Key, key_of
from hookmap.capture.interventions.edits import Edit
from hookmap.errors import CaptureError, InterventionError, SelectionError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import parse
from hookmap.stores.ledger import tensor_name
from hookmap.vllm.alive import wake_when_dead
from hookmap.vllm.in_process import end, runs_here
from hookmap.vllm.places import Place
from hookmap.vllm.plans import Functions, to_wire
from hookmap.vllm.spec import NAME, RequestSpec
from hookmap.vllm.stages import Taken, joined, weights_of_all

HEALTH = "check_health"
"""a method of vLLM's workers that does nothing: one that has died does not answer"""


@dataclass(frozen=True)
class Ended:
    """A request that has ended."""

    name: str
    tokens: tuple[int, ...]
    """what it generated"""


def asked_of(rows: Mapping[str, Sequence[int]]) -> str:
    """The argument of `hookmap_take`. `rows`: of each request, how many tokens of each of its sequences have rows."""
    return json.dumps([[name, list(counts)] for name, counts in rows.items()])


class VllmEngine:
    """An `LLM` of vLLM with hookmap's worker. One run at a time."""

    name = "vllm"
    exclusive = True
    engines = 1
    """of data parallel; each has the whole model, and some of the requests"""

    def __init__(self, llm: Any, module: nn.Module) -> None:
        """`module`: the model as transformers has it, without weights: its config and generation settings."""
        self.module = self.root = self.runner = module
        self.lock = threading.Lock()
        self._llm = llm
        self._closed = self._watched()
        self._packed = self._in_processes()
        """whether the workers are in other processes"""
        described = [[*map(json.loads, workers)] for workers in self._everywhere("hookmap_describe")]
        if wrong := [each["error"] for workers in described for each in workers if "error" in each]:
            kind, message = wrong[0]
            raise getattr(errors, kind, CaptureError)(message)
        workers = described[0]
        said = workers[0]
        stages = sorted({each["stage"] for each in workers})
        self._stages = [[n for n, each in enumerate(workers) if each["stage"] == stage] for stage in stages]
        """the workers of one engine by the stages of the pipeline, each in the order of its ranks"""
        self.map: ArchitectureMap = parse(said["map"])
        self.why_not_written: dict[Key, str | None] = {key_of(*key): why for key, why, _, _ in said["places"]}
        self._shared = {tensor_name(key_of(*key)): Place((), parts=p, copies=c) for key, _, p, c in said["places"]}
        """how the ranks of tensor parallelism share each point"""
        self._split = frozenset.intersection(*(frozenset(map(_key, each["elsewhere"])) for each in workers))
        """points that no stage of the pipeline has as a whole"""
        tapped = None if said["tapped"] is None else [_key(key) for each in workers for key in each["tapped"]]
        self.tapped: frozenset[Key] | None = None if tapped is None else frozenset(tapped)
        """points that the compiled model can capture; None: all of them"""
        self.weights = weights_of_all([workers[ranks[0]]["weights"] for ranks in self._stages])
        self.version: str = said["vllm"]
        self.runner_name: str = said["runner"]
        together, self.step_tokens = said["batch"]
        """tokens of a step, at most"""
        self.in_flight: int = together * self.engines
        """requests that run together, at most"""
        handed = len(workers) == self.engines == 1 and not self._packed and said["process"] == os.getpid()
        self.functions = Functions(frozenset(said["functions"]), handed)
        model, cache = self._config().model_config, self._config().cache_config
        self.longest: int = model.max_model_len
        self.reads_text: bool = not model.skip_tokenizer_init
        """whether it has a tokenizer, and finds stop strings"""
        decides = {name: getattr(cache, name) for name in ("mamba_cache_dtype", "mamba_ssm_cache_dtype")}
        decides |= {"kv_cache_dtype": cache.cache_dtype, "disable_sliding_window": model.disable_sliding_window}
        decides["logits_processors"] = [str(each) for each in model.logits_processors or ()]
        self.settings = {name: value for name, value in decides.items() if value not in ("auto", "float32", False, [])}
        """of vLLM's, those that change the model's numbers, and neither its weights nor its config"""

    def channel(self, told: Callable[[str, Any], None]) -> "VllmEngine":
        """Where one run adds its requests. `told`: called with each output, where the engine tells of them."""
        return self

    def call(self, method: str, *arguments: Any) -> Any:
        """The first answer that says something; all workers do it. Raises CaptureError where an engine has died."""
        answers = [answer for workers in self._everywhere(method, *arguments) for answer in workers]
        return next((answer for answer in answers if answer), answers[0])

    def _everywhere(self, method: str, *arguments: Any) -> list[list[Any]]:
        """The answers of all workers of each engine."""
        return [self._each(method, *arguments)]

    def _each(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all workers of the first engine."""
        with self._alive():
            found: list[Any] = self._llm.collective_rpc(method, args=arguments)
        return found

    def _of(self, request: str, method: str, *arguments: Any) -> list[Any]:
        """The answers of all workers of the engine that has this request."""
        return self._each(method, *arguments)

    def plan(self, name: str, edits: Sequence[Edit]) -> None:
        """Give workers the interventions of a run, which requests name. Raises InterventionError."""
        if (why := self.call("hookmap_plan", name, *to_wire(edits, self.functions))) is not None:
            raise InterventionError(why)

    def add(self, name: str, tokens: Sequence[int], parameters: Any, spec: RequestSpec) -> None:
        """Put a request in the queue. Raises CaptureError where vLLM refuses it."""
        from vllm.exceptions import VLLMValidationError

        prompt = prepared(tokens, parameters, spec)
        with self._alive():
            try:
                self._llm.llm_engine.add_request(name, prompt, parameters)
            except (ValueError, VLLMValidationError) as error:
                raise CaptureError(f"vLLM refuses this request: {error}") from error

    def step(self) -> list[Ended]:
        """Run a step, or wait for one. Returns the requests that have ended."""
        with self._alive():
            outputs = self._llm.llm_engine.step()
        return [Ended(output.request_id, tuple(output.outputs[0].token_ids)) for output in outputs if output.finished]

    def take(self, wanted: Sequence[tuple[str, int]]) -> list[Taken]:
        """What each request that has ended left. `wanted`: its name, and how many of its tokens have rows."""
        return self.taken(
            self._each("hookmap_take", asked_of({name: [tokens] for name, tokens in wanted}), self._packed)
        )

    def taken(self, of_ranks: Sequence[Any]) -> list[Taken]:
        """What the workers of one engine have answered to `hookmap_take`, with the parts of all joined."""
        read: Any = load if self._packed else dict
        return [
            joined([[answers[n] for n in ranks] for ranks in self._stages], self._shared, read)
            for answers in zip(*of_ranks, strict=True)
        ]

    def row(self, request: str, position: int) -> dict[str, torch.Tensor]:
        """What is kept of one token of a request that runs, by the names of tensors; nothing where none is."""
        answers = self._of(request, "hookmap_row", request, position)
        held = [(None, [position], rows) for rows in answers]
        return joined([[held[n] for n in ranks] for ranks in self._stages], self._shared, load)[2]

    def unembed(self, rows: bytes) -> bytes:
        """See `HookmapWorker.hookmap_unembed`."""
        found: bytes = next(answer for answer in self._each("hookmap_unembed", rows) if answer)
        return found

    def drop(self, names: Sequence[str]) -> None:
        """Abort requests and forget their rows."""
        if names:
            with self._alive():
                self._llm.llm_engine.abort_request(list(names))
            self.call("hookmap_drop", list(names))

    def refuse_untapped(self, keys: Sequence[Key]) -> None:
        """Raises SelectionError for points that no worker has, and that the compiled model was not given taps for."""
        if split := [tensor_name(key) for key in keys if key in self._split]:
            raise SelectionError(
                f"{', '.join(split)}: a sum of tensors that are in different stages of the pipeline. Open the model "
                "with pipeline_parallel_size=1; tensor_parallel_size shares it in another way."
            )
        if self.tapped is not None and (lacking := [tensor_name(key) for key in keys if key not in self.tapped]):
            raise SelectionError(
                f"{', '.join(lacking[:8])}{', …' if len(lacking) > 8 else ''}: this model was compiled without taps "
                "there. Open it with taps={point: layers} that names them, or with eager=True for all points."
            )

    def close(self) -> None:
        """End the engine and its workers."""
        self._closed.set()
        end(self._llm.llm_engine.engine_core)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Inside, an engine that has died is a CaptureError."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._closed.is_set():
            raise CaptureError("this model does not run any more: it was closed. Open it again.")
        try:
            yield
        except Exception as error:
            if not isinstance(error, EngineDeadError) and self._answers_health():
                raise
            raise CaptureError(
                "vLLM's engine has died, and the requests that ran with it. Open the model again; a capture in a "
                "folder goes on with resume=True."
            ) from error

    def _answers_health(self) -> bool:
        """Whether all workers still answer. Where one has died, what asked for it got an error of any type."""
        try:
            self._llm.collective_rpc(HEALTH)
        except Exception:  # EngineDeadError, or the executor's RuntimeError
            return False
        return True

    def _watched(self) -> threading.Event:
        return wake_when_dead(self._llm.llm_engine.engine_core)

    def _in_processes(self) -> bool:
        return not runs_here(self._llm.llm_engine.engine_core)

    def _config(self) -> Any:
        return self._llm.llm_engine.vllm_config


def prepared(tokens: Sequence[int], parameters: Any, spec: RequestSpec) -> dict[str, Any]:
    """The prompt of a request that asks for `spec`, which is put into its parameters."""
    prompt: dict[str, Any] = {"prompt_token_ids": list(tokens)}
    if spec.points or spec.edits is not None:
        parameters.extra_args = {NAME: spec.model_dump(mode="json", exclude_defaults=True)}
        parameters.skip_reading_prefix_cache = True
    if (salt := spec.salt(len(tokens))) is not None:
        prompt["cache_salt"] = salt
    return prompt


def _key(plain: Sequence[Any]) -> Key:
    return key_of(*plain)
