"""The local engine: one `generate` inside one nnsight trace, over the weights that are already there.

What nnsight does not do by itself and this does: one lock around every run on the same weights (a trace serves
whatever runs meanwhile, whichever thread it is on), and nothing of the caller's frame inside the trace: the block is
in a function of its own, and selectors reach it as data.
"""

import threading
import weakref
from typing import Any

import nnsight
import torch
from torch import nn

from hookmap import skeleton
from hookmap.engines._nnsight_sink import PassingCache, adopt_edits, attach, tree_over
from hookmap.engines.observation import Observer
from hookmap.errors import CaptureError

_locks: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def lock_of(module: nn.Module) -> "threading.RLock":
    """The lock that every forward pass on these weights has to hold while captures may run on other threads."""
    with _locks_guard:
        return _locks.setdefault(module, threading.RLock())


class NNsightEngine:
    """Captures through nnsight. Wraps `module` at the first run; the wrappers stay and do nothing outside a run."""

    def __init__(self, module: nn.Module, root: nn.Module, given: nnsight.Envoy | None = None) -> None:
        """`module`: what map paths start from. `root`: the model in it that `generate` calls, often the same.

        `given`: the nnsight model that the module came in; its stored edits apply.
        """
        self.module = module
        self.root = root
        self._given = given
        self._tree: nnsight.NNsight | None = None

    @property
    def device(self) -> torch.device:
        """Where token ids are fed."""
        return skeleton.device_of(self.root.get_input_embeddings())  # type: ignore[operator]

    @property
    def vocabulary(self) -> int:
        """How many token ids the model can be fed."""
        return len(self.root.get_input_embeddings().weight)  # type: ignore[operator]

    def generate(self, observer: Observer, inputs: dict[str, Any]) -> torch.Tensor:
        """See `Engine.generate`. Raises CaptureError where a selector's module is not in the model."""
        with lock_of(self.module):
            if self._tree is None:
                self._tree = tree_over(self.module, self._given)
            adopt_edits(self._tree, self._given)
            return _traced_generate(self._tree, self.root, self._cache(self._tree, observer), inputs)

    def _cache(self, tree: nnsight.NNsight, observer: Observer) -> PassingCache:
        # By identity and not by name: a module that the tree reaches by two paths has one location, and a module
        # may be called like something that nnsight serves (BERT's `output`).
        paths = {id(envoy._module): envoy.path for envoy in tree.modules()}
        root = paths[id(self.root)]
        wanted: dict[tuple[str, str], list[str]] = {}
        for module, side in observer.boundaries:
            wanted.setdefault((paths[id(self._find(module))], side), []).append(module)

        def seen(path: str, side: str, value: Any) -> None:
            if path == root and side == "input":
                observer.begin_pass(*value)
            args, kwargs = value if side == "input" else ((), {})
            for module in wanted.get((path, side), ()):
                observer.see(module, "input" if side == "input" else "output", args, kwargs, value)

        return PassingCache({*wanted, (root, "input")}, seen)

    def _find(self, path: str) -> nn.Module:
        if not path:
            return self.root
        try:
            return self.module.get_submodule(path)
        except AttributeError as error:
            raise CaptureError(
                f"{type(self.module).__name__} has no module {path!r}: {error}. "
                "The map is another model's: run `hookmap discover` on this one."
            ) from error


def _traced_generate(
    tree: nnsight.NNsight, root: nn.Module, cache: PassingCache, inputs: dict[str, Any]
) -> torch.Tensor:
    def generate(_: None) -> Any:
        return root.generate(**inputs)  # type: ignore[operator]  # nn.Module's attributes are typed as tensors

    # nnsight recompiles this block from the source of this file: no return, yield, try or break in it.
    with tree.trace(None, fn=generate) as tracer:
        attach(cache)
        sequences = nnsight.save(tracer.result)
    found: torch.Tensor = sequences
    return found
