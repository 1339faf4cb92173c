"""The one place that leans on nnsight's inside: a cache that passes values on, what another kept, a user's edits.

`tracer.cache()` keeps every value of every step until the run ends. nnsight has no public way to be shown values as
they pass, so this subclasses its `Cache` and registers with the running trace, as `tracer.cache()` does (0.8).
"""

import ast
import hashlib
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import nnsight
import torch
from nnsight.intervention.cache import Cache
from nnsight.intervention.interleaver import Mediator
from torch import nn

Seen = Callable[[str, str, Any], None]
"""(module path in nnsight's tree, "input" or "output", value); an input's value is (args, kwargs)"""


class PassingCache(Cache):  # type: ignore[misc]  # nnsight is not typed
    """Shows `seen` each of `locations`, (nnsight path, side), whenever the model passes it."""

    def __init__(self, locations: set[tuple[str, str]], seen: Seen) -> None:
        super().__init__(None, modules=[])
        self._locations = locations
        self._seen = seen

    def subscriptions(self) -> dict[str, tuple[str, str]]:
        return {f"{path}.{side}": (path, side) for path, side in self._locations}

    def observe_selected(self, selected: tuple[str, str], value: Any) -> None:
        self._seen(selected[0], selected[1], value)


def attach(cache: PassingCache) -> None:
    """Register with the trace whose block is running; call before any value is read."""
    Mediator.current("hookmap").caches.append(cache)


def visits(cache: Any, path: str, side: str) -> list[Any]:
    """What `tracer.cache()` kept of a module, visit by visit; an input's value is (args, kwargs).

    nnsight's own view of a cache that came back from elsewhere finds every module but the root.
    """
    return [getattr(entry, "output" if side == "output" else "inputs") for entry in cache._cache.entries[path]]


def tree_over(module: nn.Module, given: nnsight.Envoy | None) -> nnsight.NNsight:
    """A tree of our own over `module`, under the same paths as the user's tree, if there is one."""
    return nnsight.NNsight(module) if given is None else nnsight.NNsight(module, path=given.path)


def adopt_edits(tree: nnsight.NNsight, given: nnsight.Envoy | None) -> None:
    """Let the run apply what the user stored on `given` with `edit(inplace=True)`: that is the model they opened."""
    if given is not None:
        tree._edits = list(given._edits)


def stored_edits(given: nnsight.Envoy | None) -> list[str]:
    """A digest of each edit stored on `given`: its code, and the numbers, texts and tensors that it names."""
    return [_digest(edit) for edit in getattr(given, "_edits", ())]


def _digest(edit: Mediator) -> str:
    digest = hashlib.sha256()
    digest.update((edit.code.co_code.hex() if edit.node is None else ast.unparse(edit.node)).encode())
    for name in sorted(set(_names(edit.code))):
        try:
            value = edit.lcls[name]
        except (KeyError, NameError):
            continue
        digest.update(f"{name} {type(value).__qualname__} ".encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, int | float | complex | str | bytes | tuple | list | range | slice):
            digest.update(repr(value).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _names(code: CodeType) -> Iterator[str]:
    """That the code reads, inner functions included."""
    yield from (*code.co_names, *code.co_freevars)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
