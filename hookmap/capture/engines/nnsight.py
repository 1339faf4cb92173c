"""Captures inside one nnsight trace, over the loaded weights, so that the user's nnsight edits apply.

The traced block is a function of its own, and selectors reach it as data, because nnsight compiles the block from
source. A trace sees every forward pass, on any thread, so a run holds the model exclusively.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import nnsight
import torch
from torch import nn

from hookmap.capture.engines.hooks import HooksEngine, call, logits_of_pass, module_at
from hookmap.capture.engines.nnsight_internals import (
    PassingCache,
    adopt_edits,
    attach,
    paths_in,
    stored_edits,
    tree_over,
)
from hookmap.capture.engines.observation import Observer, Watch
from hookmap.capture.engines.parameters import parameters_of
from hookmap.capture.interventions.edits import Editor
from hookmap.errors import InterventionError
from hookmap.loading.operations import Forward, showing
from hookmap.loading.wrappers import generate_of, hooked_forward, runner_of


class NNsightEngine:
    """Captures through nnsight. Wraps `module` at the first run; the wrappers stay and do nothing between runs."""

    name = "nnsight"
    exclusive = True

    def __init__(self, module: nn.Module, root: nn.Module, given: nnsight.Envoy | None = None) -> None:
        """`module`: what map paths start from. `root`: the model in it that `generate` calls, often the same.

        `given`: the nnsight model that the module came in; its stored edits apply.
        """
        self.module = module
        self.root = root
        self.runner = runner_of(module)
        self._given = given
        self._tree: nnsight.NNsight | None = None

    @property
    def stored_edits(self) -> list[str]:
        """A digest of each edit that is stored in the model."""
        return stored_edits(self._given)

    def generate(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None = None) -> torch.Tensor:
        """See `Engine.generate`. Raises CaptureError where a selector's module is not in the model."""
        if editor is not None and editor.boundaries:
            return self._hooks().generate(observer, inputs, editor)
        generate = generate_of(self.runner, self.root)
        sequences: torch.Tensor = self._traced(observer, editor, lambda: generate(**inputs), generating=True)
        return sequences

    def forward(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None = None) -> None:
        """See `Engine.forward`; nnsight runs the pass to its end."""
        if editor is not None and editor.boundaries:
            return self._hooks().forward(observer, inputs, editor)
        with torch.no_grad():
            self._traced(observer, editor, lambda: call(self.runner, inputs))

    def _hooks(self) -> HooksEngine:
        """What writes: nnsight shows an output before the hooks on it run, and so before what is written there.

        Without stored edits both engines give the same, bit for bit. Raises InterventionError where there are such.
        """
        if self.stored_edits:
            raise InterventionError(
                "edits are stored in this nnsight model, and interventions have no place in their order: give "
                'engine="hooks", which leaves the stored edits out, or write those as interventions: hm.edited([…]).'
            )
        return HooksEngine(self.module, self.root)

    def _traced(
        self, observer: Observer, editor: Editor | None, run: Callable[[], Any], generating: bool = False
    ) -> Any:
        if self._tree is None:
            self._tree = tree_over(self.module, self._given)
        adopt_edits(self._tree, self._given)
        observers = (observer, *(() if editor is None else editor.observers))
        for each in observers:
            each.parameter_at = parameters_of(self.module)
            # A user's edit of the logits expects all of them.
            each.every_logit |= self._given is not None and any(other.reads_logits for other in observers)

        # A plain hook, because a trace cannot replace the input that it shows.
        def begin(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if not observer.looks:
                return None
            for each in observers:
                each.begin_pass(args, kwargs)
            return args, {**kwargs, **logits_of_pass(self.root, generating, *observers)}

        with contextlib.ExitStack() as hooks:
            hooks.callback(self.root.register_forward_pre_hook(begin, with_kwargs=True).remove)
            hooks.enter_context(hooked_forward(self.runner, self.root))
            hooks.enter_context(showing(self._forwards(observers), lambda: observer.looks, any_thread=True))
            return _trace(self._tree, self._cache(self._tree, observers), run)

    def _forwards(self, observers: Sequence[Observer]) -> dict[nn.Module, Forward]:
        """nnsight shows modules; their operations are seen as the hooks engine sees them."""
        found: dict[nn.Module, Forward] = {}
        for observer in observers:
            for path, side in observer.boundaries:
                if (term := observer.operations.get(path)) is not None:
                    module = module_at(self.module, self.root, term.module)
                    found.setdefault(module, Forward(term.module)).add(term, side, [observer.watcher(path, side)])
        return found

    def _cache(self, tree: nnsight.NNsight, observers: Sequence[Observer]) -> PassingCache:
        paths = paths_in(tree)
        wanted: dict[tuple[str, str], list[Watch]] = {}
        for observer in observers:
            for path, side in observer.boundaries:
                if path in observer.operations:
                    continue
                module = module_at(self.module, self.root, path)
                wanted.setdefault((paths[id(module)], side), []).append(observer.watcher(path, side))

        def observe(path: str, side: str, value: Any) -> None:
            args, kwargs = value if side == "input" else ((), {})
            for watch in wanted.get((path, side), ()):
                watch(args, kwargs, value)

        return PassingCache({*wanted}, observe)


def _trace(tree: nnsight.NNsight, cache: PassingCache, run: Callable[[], Any]) -> Any:
    def body(_: None) -> Any:
        return run()

    # nnsight compiles this block from the source of this file: it must hold no return, yield, try or break.
    with tree.trace(None, fn=body) as tracer:
        attach(cache)
        result = nnsight.save(tracer.result)
    return result
