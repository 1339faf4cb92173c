"""Captures through plain PyTorch hooks, which are registered for a run and removed after it. Nothing is wrapped.

A hook ignores the passes of other threads, so that captures on several threads can share one model.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from hookmap.capture.engines.observation import Observer, Side, Watch
from hookmap.capture.engines.parameters import parameters_of
from hookmap.capture.engines.taps import Taps
from hookmap.capture.interventions.edits import Editor
from hookmap.capture.interventions.writable import MODES, Mode, mode_of
from hookmap.errors import CaptureError
from hookmap.loading import generation as gen
from hookmap.loading.modules import accepted
from hookmap.loading.operations import Forward, showing
from hookmap.loading.wrappers import generate_of, hooked_forward, runner_of
from hookmap.maps.selectors import Selector
from hookmap.maps.terms import Term


class _SawAllError(Exception):
    """Ends a forward pass when the observer has seen everything that it needs."""


class HooksEngine:
    """Captures through forward hooks."""

    name = "hooks"

    def __init__(self, module: nn.Module, root: nn.Module) -> None:
        """`module`: what map paths start from. `root`: the model in it that `generate` calls, often the same."""
        self.module = module
        self.root = root
        self.runner = runner_of(module)
        # PEFT's wrappers change the inner model while they run.
        self.exclusive = self.runner is not root
        # accelerate moves weights back after a module's forward, which a pass that ends early would skip.
        self.ends_early = not any(hasattr(part, "_hf_hook") for part in module.modules())

    def generate(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None = None) -> torch.Tensor:
        """See `Engine.generate`. Raises CaptureError where a selector's module is not in the model."""
        with hooked_forward(self.runner, self.root), self._watching(observer, editor, generating=True):
            return generate_of(self.runner, self.root)(**inputs)

    def forward(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None = None) -> None:
        """See `Engine.forward`; the pass ends when the last selector is complete."""
        early = self.ends_early and not (editor is not None and editor.counts)
        watching = self._watching(observer, editor, ends_early=early)
        with hooked_forward(self.runner, self.root), watching, contextlib.suppress(_SawAllError), torch.no_grad():
            call(self.runner, inputs)

    def differentiate(self, observer: Observer, inputs: dict[str, Any], editor: Editor | None, taps: Taps) -> None:
        """One forward pass, to its end, with autograd's graph from the first tap on."""
        watching = self._watching(observer, editor, taps=taps)
        with hooked_forward(self.runner, self.root), watching, torch.enable_grad():
            call(self.runner, inputs)

    def tensors(self, terms: Sequence[Term], inputs: Mapping[str, Any]) -> dict[Term, torch.Tensor]:
        """What one forward pass shows at each of these places, as it lies there: a copy.

        Raises CaptureError where there is no such tensor, or where a place without a call is passed several times.
        """
        found: dict[Term, list[torch.Tensor]] = {}
        forwards: dict[nn.Module, Forward] = {}

        def keep(term: Term, args: Any, kwargs: Any, output: Any) -> None:
            found.setdefault(term, []).append(term.resolve(args, kwargs, output).detach().clone())

        with contextlib.ExitStack() as hooks:
            for term in terms:
                module = module_at(self.module, self.root, term.module)
                if not term.is_inside:
                    hooks.callback(register(module, term.side, partial(keep, term)))
                else:
                    forwards.setdefault(module, Forward(term.module)).add(term, term.side, [partial(keep, term)])
            hooks.enter_context(showing(forwards, lambda: True))
            with hooked_forward(self.runner, self.root), torch.no_grad():
                call(self.runner, inputs)
        if several := [term for term, seen in found.items() if len(seen) > 1 and term.call is None]:
            raise CaptureError(
                f"{several[0]} is passed {len(found[several[0]])} times in one forward pass: it has no one tensor."
            )
        return {term: seen[term.call or 0] for term, seen in found.items() if len(seen) > (term.call or 0)}

    def watching(self, observer: Observer, editor: Editor | None = None) -> contextlib.AbstractContextManager[None]:
        """Inside, the passes of the model on this thread are shown to the observer while it looks, and edited.

        The caller runs the model, and says which logits it computes.
        """
        return self._watching(observer, editor, generating=None)

    @contextlib.contextmanager
    def _watching(
        self,
        observer: Observer,
        editor: Editor | None,
        ends_early: bool = False,
        generating: bool | None = False,
        taps: Taps | None = None,
    ) -> Iterator[None]:
        also = () if taps is None else taps.observers
        observers = (observer, *(() if editor is None else editor.observers), *also)
        for each in observers:
            each.parameter_at = parameters_of(self.module)
        observer.steps.may_wait = editor is None and taps is None and generating is True
        with contextlib.ExitStack() as hooks:
            hooks.callback(register(self.root, "input", partial(self._begin, observers, editor, generating)))
            edited = (*(() if editor is None else editor.boundaries), *(() if taps is None else taps.boundaries))
            watched = [boundary for each in observers if each not in also for boundary in each.boundaries]
            operations = {} if editor is None else editor.operations
            operations |= {path: term for each in observers for path, term in each.operations.items()}
            forwards: dict[nn.Module, Forward] = {}
            for path, side in dict.fromkeys((*watched, *edited)):
                if (term := operations.get(path)) is not None:
                    module = module_at(self.module, self.root, term.module)
                    calls = list(_calls_at(path, side, observer, editor, False, taps))
                    forwards.setdefault(module, Forward(term.module)).add(term, side, calls)
                    continue
                module = module_at(self.module, self.root, path)
                # Hooks run in the order of registration: each sees what the ones before it passed on.
                for call in _calls_at(path, side, observer, editor, ends_early, taps):
                    hooks.callback(register(module, side, call))
            looked = [observer, *([] if editor is None or editor.watching is None else [editor.watching])]
            end = partial(_end_pass, looked) if ends_early else _go_on
            hooks.enter_context(showing(forwards, lambda: observer.looks, end))
            yield

    def _begin(
        self,
        observers: Sequence[Observer],
        editor: Editor | None,
        generating: bool | None,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> Any:
        """The model is called with these arguments; what it gets in their place. `generating`: see `logits_of_pass`."""
        if not observers[0].looks:
            return None
        for each in observers:
            each.begin_pass(args, kwargs)
        if editor is not None:
            editor.begin_pass(args, kwargs)
        logits = {} if generating is None else logits_of_pass(self.root, generating, *observers)
        return (args, {**kwargs, **logits}, output) if logits else None


def _calls_at(
    path: str, side: Side, observer: Observer, editor: Editor | None, ends_early: bool, taps: Taps | None
) -> Iterator["_Call"]:
    """What is called at one boundary, in order: the watcher of old values, the edits with their watchers and taps."""
    before, watching = (None, None) if editor is None else (editor.before, editor.watching)
    observers = [each for each in (observer, watching) if each is not None]
    then_end = partial(_then_end, observers) if ends_early else _as_it_is if taps is None else _without_graph
    if before is not None and (path, side) in before.boundaries:
        yield before.watcher(path, side)
    after = [each for each in observers if (path, side) in each.boundaries]
    if editor is None or (path, side) not in editor.boundaries:
        yield from (then_end(each.watcher(path, side)) for each in after)
        editor = None
    for mode in MODES:
        if editor is not None:
            yield from _edits(editor, observer, after, path, side, mode, then_end)
        if taps is not None:
            yield from taps.at(path, side, mode)


def _then_end(observers: Sequence[Observer], watch: Watch) -> Watch:
    """The watcher, which ends the pass when the observers have seen all selectors."""

    def watch_and_end(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        watch(args, kwargs, output)
        _end_pass(observers)

    return watch_and_end


def _end_pass(observers: Sequence[Observer]) -> None:
    if all(observer.saw_all and observer.looks for observer in observers):
        raise _SawAllError


def _go_on() -> None:
    pass


def _as_it_is(watch: Watch) -> Watch:
    return watch


def _without_graph(watch: Watch) -> Watch:
    return torch.no_grad()(watch)


def _edits(
    editor: Editor,
    observer: Observer,
    after: Sequence[Observer],
    path: str,
    side: Side,
    mode: Mode,
    then_end: Callable[[Watch], Watch],
) -> Iterator["_Call"]:
    """The edits and watchers of one boundary in one mode: the stream is seen before a branch's input is replaced.

    One tensor may be two points: the input of a norm, or of an MLP, may be the stream and also what the branch reads.
    `after`: those that watch it.
    """
    if editor.writes(path, side, mode):
        yield partial(_written, editor, observer, path, side, mode)
    for each in after:
        yield then_end(each.watcher(path, side, partial(_is_written, mode)))


def _is_written(mode: str, selector: Selector) -> bool:
    return mode_of(selector) == mode


def _written(
    editor: Editor, observer: Observer, path: str, side: Side, mode: str, args: Any, kwargs: Any, output: Any
) -> Any:
    if not observer.looks:
        return None
    given = (args, kwargs, output)
    passed = editor.write(path, side, mode, given)
    return None if passed is given else passed


_Call = Callable[[Sequence[Any], Mapping[str, Any], Any], Any]


def register(module: nn.Module, side: Side, call: _Call) -> Callable[[], None]:
    """Register a hook at a boundary, for passes of this thread. Returns what removes it."""
    if side == "input":
        return module.register_forward_pre_hook(_on_input(call), with_kwargs=True).remove
    return module.register_forward_hook(_on_output(call)).remove


def _on_input(call: _Call) -> Any:
    me, thread = threading.get_ident(), threading.get_ident

    # PyTorch stores separately that a hook takes kwargs: while another thread adds or removes it, they may be missing.
    def hook(_: nn.Module, args: Any, kwargs: Any = None) -> Any:
        if thread() != me:
            return None
        passed = call(args, kwargs, None)
        return None if passed is None else passed[:2]

    return hook


def _on_output(call: _Call) -> Any:
    me, thread = threading.get_ident(), threading.get_ident

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        if thread() != me:
            return None
        passed = call((), {}, output)
        return None if passed is None else passed[2]

    return hook


def call(runner: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Run one forward pass with the inputs that `runner` accepts, under its own parameter names."""
    runner(**{parameter: inputs[name] for name, parameter in accepted(runner, inputs).items()})


def logits_of_pass(root: nn.Module, generating: bool, *observers: Observer) -> dict[str, Any]:
    """The argument that makes the pass which has begun compute only the logits that are kept, because logits are large.

    `observers`: all of the run; where several read logits, they read the same, or every one.

    It is passed to the model itself, whose `prepare_inputs_for_generation` may have set another value.
    """
    parameter = gen.logits_parameter(root)
    if parameter is None or len(observers[0].columns) == 1:  # of one column there is nothing to leave out
        return {}
    scattered = "Tensor" in str(parameter.annotation)
    asked = {each.reads_logits: each.logits(generating, scattered) for each in observers}
    columns = asked[True] if True in asked else asked[False]
    return {parameter.name: gen.which_logits(columns, len(observers[0].columns))}


def module_at(module: nn.Module, root: nn.Module, path: str) -> nn.Module:
    """The module at a selector's path. Raises CaptureError where there is none."""
    if not path:
        return root
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise CaptureError(
            f"{type(module).__name__} has no module {path!r}: {error}. "
            "The map is another model's: run `hookmap discover` on this one."
        ) from error
