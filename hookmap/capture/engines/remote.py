"""Captures on a model that runs on a server: nnsight's remote execution (NDIF), or its local simulation.

Only module paths are sent, and only the saved values come back. They are then replayed to the observer, pass by pass.
So all rows of a batch are in memory at once, and a sample that has ended costs until the whole batch has ended.
"""

from collections.abc import Iterator
from typing import Any

import nnsight
import torch
from torch import nn

from hookmap.capture.engines.hooks import module_at
from hookmap.capture.engines.nnsight_internals import calls_in, paths_in, stored_edits
from hookmap.capture.engines.observation import Observer, Side
from hookmap.capture.interventions.edits import Editor
from hookmap.errors import CaptureError, InterventionError
from hookmap.loading import generation as gen


class RemoteEngine:
    """Runs an nnsight model whose weights are on a server. It takes no seed: the server has generators of its own."""

    name = "remote"
    exclusive = True

    def __init__(self, module: nn.Module, root: nn.Module, given: Any, remote: bool | str) -> None:
        """`given`: the nnsight model around `module`. `remote`: True (NDIF), the URL of a server, or "local"."""
        self.module = module
        self.root = self.runner = root
        self._given = given
        self._remote = remote
        self._paths = paths_in(given)

    @property
    def stored_edits(self) -> list[str]:
        """A digest of each edit that is stored in the model."""
        return stored_edits(self._given)

    def generate(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None = None) -> torch.Tensor:
        """See `Engine.generate`. Raises CaptureError where the server fails or did not run every module asked for."""
        _refuse(editor)
        [finished] = inputs.pop("stopping_criteria")
        parameter = gen.logits_parameter(self.root)
        if parameter is not None and observer.reads_logits:
            inputs[parameter.name] = 0  # transformers computes only the last logits of a prompt, unless told
        sequences, calls = self._run(observer, inputs, generate=True)
        fed, width = 0, inputs["input_ids"].shape[1]
        ended = torch.zeros(len(sequences), dtype=torch.bool)
        for tokens in _replay(calls, observer):
            fed += tokens
            if fed >= width:
                ended |= finished(sequences[:, : fed + 1], None)
            if ended.all():
                break
        made: torch.Tensor = sequences[:, : fed + 1]
        return made

    def forward(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None = None) -> None:
        """See `Engine.forward`; the pass runs to its end."""
        _refuse(editor)
        parameter = gen.logits_parameter(self.root)
        if parameter is not None and not observer.reads_logits:
            inputs[parameter.name] = 1
        _, calls = self._run(observer, inputs, generate=False)
        for _ in _replay(calls, observer):
            pass

    def _run(self, observer: Observer, inputs: dict[str, Any], generate: bool) -> tuple[Any, "_Calls"]:
        if observer.operations:
            raise CaptureError(
                f"{', '.join(observer.operations)}: a server shows modules and not the operations in them. Open the "
                "model here, or name a module's input or output."
            )
        paths: dict[tuple[str, Side], str] = {
            (path, side): self._paths[id(module_at(self.module, self.root, path))] for path, side in observer.boundaries
        }
        fed = self._paths[id(self.root.get_input_embeddings())]  # type: ignore[operator]
        of_outputs = sorted({path for (_, side), path in paths.items() if side == "output"})
        of_inputs = sorted({fed, *(path for (_, side), path in paths.items() if side == "input")})
        try:
            run = _generated if generate else _passed
            result, outputs, entered = run(self._given, inputs, of_outputs, of_inputs, self._remote)
        except Exception as error:  # of nnsight, of the server as text, or of the connection
            why = f"{type(error).__name__}: {error}"
            if self._remote == "local":
                raise CaptureError(f"this run failed in nnsight's simulation: {why}") from error
            where = f"on {self._remote}" if isinstance(self._remote, str) else "on NDIF, as nnsight is set up"
            raise CaptureError(
                f"this run failed {where}: {why}\nWhat NDIF has: nnsight.ndif.status(). Another server: --address URL; "
                "here, with the weights: --address local"
            ) from error
        return result, _Calls(outputs, entered, fed, paths)


class _Calls:
    """The input or output of each module, call by call."""

    def __init__(self, outputs: Any, entered: Any, fed: str, paths: dict[tuple[str, Side], str]) -> None:
        """outputs, entered: what nnsight's caches kept. fed: the path of the module that reads the token ids."""
        self.fed: list[torch.Tensor] = [
            [*args, *kwargs.values()][0] for args, kwargs in calls_in(entered, fed, "input")
        ]
        self.of = {
            (path, side): calls_in(outputs if side == "output" else entered, there, side)
            for (path, side), there in paths.items()
        }


def _replay(seen: _Calls, observer: Observer) -> Iterator[int]:
    """Show the observer each forward pass; yields how many tokens it was fed."""
    count = len(seen.fed)
    for (path, side), values in seen.of.items():
        if len(values) % count:
            raise CaptureError(f"{path}.{side} was seen {len(values)} times in {count} forward passes.")
    watches = [(side, observer.watcher(path, side), values) for (path, side), values in seen.of.items()]
    for number, tokens in enumerate(seen.fed):
        observer.begin_pass((), {"input_ids": tokens})
        for side, watch, values in watches:
            calls = len(values) // count
            for value in values[number * calls : (number + 1) * calls]:
                args, kwargs = value if side == "input" else ((), {})
                watch(args, kwargs, value)
        yield tokens.shape[1]


def _refuse(editor: Editor | None) -> None:
    if editor is not None:
        raise InterventionError("interventions are not written on a remote model: open it here.")


# nnsight sends the source of these blocks: they must hold no return, yield or try, and nothing of this package.


def _generated(model: Any, inputs: dict[str, Any], of_outputs: list[str], of_inputs: list[str], remote: Any) -> Any:
    with model.generate(inputs, remote=remote) as tracer:
        outputs = nnsight.save(tracer.cache(modules=of_outputs))
        entered = nnsight.save(tracer.cache(modules=of_inputs, include_output=False, include_inputs=True))
        result = nnsight.save(tracer.result)
    return result, outputs, entered


def _passed(model: Any, inputs: dict[str, Any], of_outputs: list[str], of_inputs: list[str], remote: Any) -> Any:
    with model.trace(inputs, remote=remote) as tracer:
        outputs = nnsight.save(tracer.cache(modules=of_outputs))
        entered = nnsight.save(tracer.cache(modules=of_inputs, include_output=False, include_inputs=True))
    return None, outputs, entered
