"""Everything that uses nnsight's private classes (of 0.8), in one module that only the nnsight engines import.

`tracer.cache()` keeps every value of every step until the run ends. nnsight has no public way to observe values as
they pass, so this subclasses its `Cache` and registers it with the running trace, as `tracer.cache()` does.
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

Observe = Callable[[str, str, Any], None]
"""(module path in nnsight's tree, "input" or "output", value); an input's value is (args, kwargs)"""


class PassingCache(Cache):  # type: ignore[misc]  # nnsight is not typed
    """Calls `observe` whenever the model passes one of `locations`, (nnsight path, side)."""

    def __init__(self, locations: set[tuple[str, str]], observe: Observe) -> None:
        super().__init__(None, modules=[])
        self._locations = locations
        self._observe = observe

    def subscriptions(self) -> dict[str, tuple[str, str]]:
        return {f"{path}.{side}": (path, side) for path, side in self._locations}

    def observe_selected(self, selected: tuple[str, str], value: Any) -> None:
        self._observe(selected[0], selected[1], value)


def attach(cache: PassingCache) -> None:
    """Register with the running trace. Call it before the block reads any value."""
    Mediator.current("hookmap").caches.append(cache)


def calls_in(cache: Any, path: str, side: str) -> list[Any]:
    """What `tracer.cache()` kept of each call of a module; an input's value is (args, kwargs).

    nnsight's own view of a cache that came back from a server does not find the root module.
    """
    return [getattr(entry, "output" if side == "output" else "inputs") for entry in cache._cache.entries[path]]


def paths_in(tree: nnsight.Envoy) -> dict[int, str]:
    """The id of each module -> its path in nnsight's tree.

    By identity, not by name: a module that the tree reaches by two paths has one location, and a module may have the
    name of something that nnsight serves (BERT's `output`).
    """
    return {id(envoy._module): envoy.path for envoy in tree.modules()}


def tree_over(module: nn.Module, given: nnsight.Envoy | None) -> nnsight.NNsight:
    """A new tree over `module`, with the same paths as the user's tree, if there is one."""
    return nnsight.NNsight(module) if given is None else nnsight.NNsight(module, path=given.path)


def adopt_edits(tree: nnsight.NNsight, given: nnsight.Envoy | None) -> None:
    """Make the run apply the edits that the user stored on `given` with `edit(inplace=True)`."""
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
    """The names that the code reads, inner functions included."""
    yield from (*code.co_names, *code.co_freevars)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
