"""Captures on a model that somebody else runs: nnsight's remote execution (NDIF), or its simulation here.

Only names go there, and only what is saved comes back; then the run is told to the observer as if it happened now. So
the rows of a batch are in memory at once, and a row that has ended still costs until the whole batch has.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import nnsight
import torch
from torch import nn

from hookmap.engines.editing import Editor
from hookmap.engines.hooks import module_at
from hookmap.engines.observation import Observer, Watch
from hookmap.errors import CaptureError, InterventionError


class RemoteEngine:
    """Runs an nnsight model that has no weights here. Draws with no seed: the generators are another machine's."""

    name = "remote"
    alone = True

    def __init__(self, module: nn.Module, root: nn.Module, given: Any, remote: bool | str) -> None:
        """`given`: the nnsight model around `module`. `remote`: True (NDIF), the URL of a server, or "local"."""
        self.module = module
        self.root = root
        self._given = given
        self._remote = remote
        self._paths = {id(envoy._module): envoy.path for envoy in given.modules()}

    def generate(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None = None) -> torch.Tensor:
        """See `Engine.generate`. Raises CaptureError where the server fails, or did not run what was asked."""
        _refuse(editor)
        [finished] = inputs.pop("stopping_criteria")
        sequences, visits = self._run(observer, inputs, generate=True)
        fed, width = 0, inputs["input_ids"].shape[1]
        for told in _passes(visits, observer):
            fed += told
            if fed >= width and finished(sequences[:, : fed + 1], None).all():
                break
        return sequences[:, : fed + 1]

    def forward(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None = None) -> None:
        """See `Engine.forward`; the pass runs to its end."""
        _refuse(editor)
        _, visits = self._run(observer, inputs, generate=False)
        for _ in _passes(visits, observer):
            pass

    def _run(self, observer: Observer, inputs: dict[str, Any], generate: bool) -> tuple[Any, "_Visits"]:
        paths = {
            (path, side): self._paths[id(module_at(self.module, self.root, path))]
            for path, side in observer.boundaries
        }
        fed = self._paths[id(self.root.get_input_embeddings())]  # type: ignore[operator]
        outputs = sorted({path for (_, side), path in paths.items() if side == "output"})
        entered = sorted({fed, *(path for (_, side), path in paths.items() if side == "input")})
        try:
            run = _generated if generate else _passed
            result, left, came = run(self._given, inputs, outputs, entered, self._remote)
        except Exception as error:  # nnsight's own, the server's in words, a connection's
            where = "in nnsight's simulation" if self._remote == "local" else "remotely"
            raise CaptureError(f"this run failed {where}: {type(error).__name__}: {error}") from error
        return result, _Visits(left, came, fed, paths)


class _Visits:
    """What each module was given and gave, each time that it was called."""

    def __init__(self, left: Any, came: Any, fed: str, paths: dict[tuple[str, str], str]) -> None:
        self.fed = [_first(args, kwargs) for args, kwargs in _all(came[fed].inputs, len(came[fed]))]
        self.of = {
            (path, side): _all(left[there].output, len(left[there]))
            if side == "output"
            else _all(came[there].inputs, len(came[there]))
            for (path, side), there in paths.items()
        }


def _passes(visits: _Visits, observer: Observer) -> Iterator[int]:
    """Tell the observer each forward pass; how many tokens each was fed."""
    count = len(visits.fed)
    watches: list[tuple[str, Watch, Sequence[Any]]] = []
    for (path, side), values in visits.of.items():
        if len(values) % count:
            raise CaptureError(f"{path}.{side} was seen {len(values)} times in {count} forward passes.")
        watches.append((side, observer.watcher(path, side), values))  # type: ignore[arg-type]
    for number, tokens in enumerate(visits.fed):
        observer.begin_pass((), {"input_ids": tokens})
        for side, watch, values in watches:
            calls = len(values) // count
            for value in values[number * calls : (number + 1) * calls]:
                if side == "output":
                    watch((), {}, value)
                else:
                    watch(*value, None)
        yield tokens.shape[1]


def _all(values: Any, visits: int) -> Sequence[Any]:
    """nnsight gives the one visit bare, and several as a list."""
    return [values] if visits == 1 else values


def _first(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return [*args, *kwargs.values()][0]


def _refuse(editor: Editor | None) -> None:
    if editor is not None:
        raise InterventionError("interventions are not written on a remote model: open it here.")


# nnsight ships the source of these blocks: no return, yield or try inside, and nothing of this package.


def _generated(model: Any, inputs: dict[str, Any], outputs: list[str], entered: list[str], remote: Any) -> Any:
    with model.generate(inputs, remote=remote) as tracer:
        left = tracer.cache(modules=outputs).save()
        came = tracer.cache(modules=entered, include_output=False, include_inputs=True).save()
        result = tracer.result.save()
    return result, left, came


def _passed(model: Any, inputs: dict[str, Any], outputs: list[str], entered: list[str], remote: Any) -> Any:
    with model.trace(inputs, remote=remote) as tracer:
        left = tracer.cache(modules=outputs).save()
        came = tracer.cache(modules=entered, include_output=False, include_inputs=True).save()
    return None, left, came


__all__ = ["RemoteEngine", "nnsight"]
