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
from hookmap.vllm.places import Place
from hookmap.vllm.plans import Functions, to_wire
from hookmap.vllm.spec import NAME, RequestSpec


@dataclass(frozen=True)
class Ended:
    """A request that has ended."""

    name: str
    tokens: tuple[int, ...]
    """what it generated"""


Taken = tuple[str | None, list[int], dict[str, torch.Tensor]]
"""what went wrong, the positions kept, and rows by the names of tensors"""


def asked_of(rows: Mapping[str, Sequence[int]]) -> str:
    """The argument of `hookmap_take`. `rows`: of each request, how many tokens of each of its sequences have rows."""
    return json.dumps([[name, list(counts)] for name, counts in rows.items()])


class VllmEngine:
    """An `LLM` of vLLM with hookmap's worker. One run at a time."""

    name = "vllm"
    exclusive = True

    def __init__(self, llm: Any, module: nn.Module) -> None:
        """`module`: the model as transformers has it, without weights: its config and generation settings."""
        self.module = self.root = self.runner = module
        self.lock = threading.Lock()
        self._llm = llm
        self._closed = self._watched()
        self._packed = self._in_processes()
        """whether the workers are in other processes"""
        said, *others = map(json.loads, self._each("hookmap_describe"))
        if "error" in said:
            kind, message = said["error"]
            raise getattr(errors, kind, CaptureError)(message)
        self.map: ArchitectureMap = parse(said["map"])
        self.why_not_written: dict[Key, str | None] = {key_of(*key): why for key, why, _, _ in said["places"]}
        self._shared = {tensor_name(key_of(*key)): Place((), parts=p, copies=c) for key, _, p, c in said["places"]}
        """how the ranks of tensor parallelism share each point"""
        self.tapped: frozenset[Key] | None = None if said["tapped"] is None else frozenset(map(_key, said["tapped"]))
        """points that the compiled model can capture; None: all of them"""
        self.weights: dict[str, Any] = said["weights"]
        self.version: str = said["vllm"]
        self.runner_name: str = said["runner"]
        self.in_flight, self.step_tokens = said["batch"]
        """requests that run together, and tokens of a step, at most"""
        handed = not others and not self._packed and said["process"] == os.getpid()
        self.functions = Functions(frozenset(said["functions"]), handed)
        self.longest: int = self._config().model_config.max_model_len

    def channel(self, told: Callable[[str, Any], None]) -> "VllmEngine":
        """Where one run adds its requests. `told`: called with each output, where the engine tells of them."""
        return self

    def call(self, method: str, *arguments: Any) -> Any:
        """The answer of the first worker; all do it. Raises CaptureError where vLLM's engine has died."""
        return self._each(method, *arguments)[0]

    def _each(self, method: str, *arguments: Any) -> list[Any]:
        with self._alive():
            found: list[Any] = self._llm.collective_rpc(method, args=arguments)
        return found

    def plan(self, name: str, edits: Sequence[Edit]) -> None:
        """Give workers the interventions of a run, which requests name. Raises InterventionError."""
        wrong = [why for why in self._each("hookmap_plan", name, *to_wire(edits, self.functions)) if why is not None]
        if wrong:
            raise InterventionError(wrong[0])

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
        """What workers have answered to `hookmap_take`, with the parts of all ranks joined."""
        read: Any = load if self._packed else dict
        found = []
        for ranks in zip(*of_ranks, strict=True):
            error = next((error for error, _, _ in ranks if error is not None), None)
            parts = [read(rows) if rows else {} for _, _, rows in ranks]
            rows = (
                {} if error else {name: self._shared[name].whole([each[name] for each in parts]) for name in parts[0]}
            )
            found.append((error, ranks[0][1], rows))
        return found

    def drop(self, names: Sequence[str]) -> None:
        """Abort requests and forget their rows."""
        if names:
            with self._alive():
                self._llm.llm_engine.abort_request(list(names))
            self.call("hookmap_drop", list(names))

    def refuse_untapped(self, keys: Sequence[Key]) -> None:
        """Raises SelectionError for points that the compiled model was not given taps for."""
        if self.tapped is not None and (lacking := [tensor_name(key) for key in keys if key not in self.tapped]):
            raise SelectionError(
                f"{', '.join(lacking[:8])}{', …' if len(lacking) > 8 else ''}: this model was compiled without taps "
                "there. Open it with taps={point: layers} that names them, or with eager=True for all points."
            )

    def close(self) -> None:
        """End the engine and its workers."""
        self._closed.set()
        self._llm.llm_engine.engine_core.shutdown()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        with alive(self._closed):
            yield

    def _watched(self) -> threading.Event:
        return wake_when_dead(self._llm.llm_engine.engine_core)

    def _in_processes(self) -> bool:
        return not hasattr(self._llm.llm_engine.engine_core, "engine_core")

    def _config(self) -> Any:
        return self._llm.llm_engine.vllm_config


@contextmanager
def alive(closed: threading.Event) -> Iterator[None]:
    """Inside, an engine that has died is a CaptureError, and nobody needs to watch it any more."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        closed.set()
        raise CaptureError(
            "vLLM's engine has died, and the requests that ran with it. Open the model again; a capture in a "
            "folder goes on with resume=True."
        ) from error


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
