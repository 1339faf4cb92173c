"""Plain PyTorch hooks, there during a run and gone after it. The leanest way to watch: nothing is wrapped.

A hook looks at nothing but its own thread's run, so that captures on several threads share one model without a lock.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hookmap.engines.observation import Observer, Watch
from hookmap.errors import CaptureError


class _SawAllError(Exception):
    """Ends a forward pass of which nothing more is needed."""


class HooksEngine:
    """Captures through forward hooks."""

    name = "hooks"
    alone = False

    def __init__(self, module: nn.Module, root: nn.Module) -> None:
        """`module`: what map paths start from. `root`: the model in it that `generate` calls, often the same."""
        self.module = module
        self.root = root
        # accelerate moves weights back after a module's forward: a pass that ends early would leave them.
        self._ends_early = not any(hasattr(part, "_hf_hook") for part in module.modules())

    def generate(self, observer: Observer, inputs: dict[str, Any]) -> torch.Tensor:
        """See `Engine.generate`. Raises CaptureError where a selector's module is not in the model."""
        with self._watching(observer):
            sequences: torch.Tensor = self.root.generate(**inputs)  # type: ignore[operator]
            return sequences

    def forward(self, observer: Observer, inputs: dict[str, Any]) -> None:
        """See `Engine.forward`; the pass ends where the last selector is complete."""
        with self._watching(observer, ends_early=self._ends_early), contextlib.suppress(_SawAllError), torch.no_grad():
            self.root(**inputs)

    @contextlib.contextmanager
    def _watching(self, observer: Observer, ends_early: bool = False) -> Iterator[None]:
        me, thread = threading.get_ident(), threading.get_ident
        with contextlib.ExitStack() as hooks:

            def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
                if thread() == me:
                    observer.begin_pass(args, kwargs)

            def on_input(watch: Watch) -> Any:
                def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                    if thread() == me:
                        watch(args, kwargs, None)
                        if ends_early and observer.saw_all:
                            raise _SawAllError

                return hook

            def on_output(watch: Watch) -> Any:
                def hook(_: nn.Module, args: Any, output: Any) -> None:
                    if thread() == me:
                        watch((), {}, output)
                        if ends_early and observer.saw_all:
                            raise _SawAllError

                return hook

            hooks.callback(self.root.register_forward_pre_hook(begin, with_kwargs=True).remove)
            for path, side in observer.boundaries:
                module, watch = module_at(self.module, self.root, path), observer.watcher(path, side)
                if side == "input":
                    hooks.callback(module.register_forward_pre_hook(on_input(watch), with_kwargs=True).remove)
                else:
                    hooks.callback(module.register_forward_hook(on_output(watch)).remove)
            yield


def module_at(module: nn.Module, root: nn.Module, path: str) -> nn.Module:
    """The module that a selector names. Raises CaptureError where there is none."""
    if not path:
        return root
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise CaptureError(
            f"{type(module).__name__} has no module {path!r}: {error}. "
            "The map is another model's: run `hookmap discover` on this one."
        ) from error
