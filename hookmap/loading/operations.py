"""Shows the operations of modules' own forwards: what each reads and gives, as PyTorch dispatches it.

A dispatch mode is on only while the own code of a module runs that somebody watches, and not in the modules inside it
or in hooks. So nothing else pays, and what a hook, an adapter or an edit computes is not counted. It is on in all of a
module whose experts are watched: see `hookmap.loading.expert_rows`.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from hookmap.errors import CaptureError
from hookmap.loading.expert_rows import ExpertRows
from hookmap.maps.terms import Term
from hookmap.wording import counted

Call = Callable[[Sequence[Any], Mapping[str, Any], Any], Any]
"""what is called with args, kwargs and output; see `hookmap.capture.engines.hooks`"""


@dataclass
class _Experts:
    """What is watched of the experts in one module."""

    chosen: Term
    calls: dict[str, list[Call]] = field(default_factory=dict)
    """side of the products -> what is called with the rows"""
    choice: torch.Tensor | None = None
    """of the running pass"""
    rows: ExpertRows | None = None

    def note(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """The router's choice passes."""
        self.choice = self.chosen.resolve(args, kwargs, output).detach()


@dataclass
class Forward:
    """What is watched of one module."""

    path: str
    calls: dict[tuple[str, int], dict[str, list[Call]]] = field(default_factory=dict)
    """(operator, which of that name) -> side -> what is called"""
    operators: set[str] = field(default_factory=set)
    """those of `calls`"""
    visits: dict[str, int] = field(default_factory=dict)
    """operator -> how many of that name every forward has, where that is known or was seen"""
    alone: set[str] = field(default_factory=set)
    """operators that were named without a number"""
    experts: dict[str, _Experts] = field(default_factory=dict)
    """path of a parameter in the module -> what is watched of the experts whose weights it holds"""

    def add(self, term: Term, side: str, calls: list[Call]) -> None:
        """`calls`: what is called at this side of the term's operation, or with the rows of its experts."""
        if term.experts is not None:
            assert term.chosen is not None
            own = self.experts.setdefault(self.inside(term.experts), _Experts(term.chosen))
            own.calls.setdefault(side, []).extend(calls)
            return
        assert term.operation is not None
        self.operators.add(term.operation)
        sides = self.calls.setdefault((term.operation, term.occurrence or 0), {})
        sides.setdefault(side, []).extend(calls)
        if term.visits is not None:
            self.visits.setdefault(term.operation, term.visits)
        if term.occurrence is None:
            self.alone.add(term.operation)

    def inside(self, path: str) -> str:
        """The path from this module on."""
        return path.removeprefix(self.path).lstrip(".")

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> list[ExpertRows]:
        """The module is called. What follows its experts' rows."""
        for parameter, own in self.experts.items():
            own.rows = ExpertRows(module, parameter, args, kwargs)
        return [own.rows for own in self.experts.values() if own.rows is not None]

    def end(self) -> None:
        """The forward is over: show the experts' rows. Raises CaptureError; see `ExpertRows.rows`."""
        for own in self.experts.values():
            if own.choice is None:
                raise CaptureError(f"{own.chosen}: the router's choice was not seen before {self.path} ended.")
            assert own.rows is not None
            for side, calls in own.calls.items():
                found = own.rows.rows(side, own.choice)
                for call in calls:
                    call((found,), {}, found)
            own.choice = own.rows = None

    def check(self, counts: Mapping[str, int]) -> None:
        """The forward is over. Raises CaptureError where an operator ran another number of times than expected."""
        for operator, number in self.calls:
            seen, expected = counts.get(operator, 0), self.visits.get(operator)
            name = self.path or "the model"
            if seen <= number:
                raise CaptureError(
                    f"the forward of {name} has no {operator}#{number}: it ran {counted(seen, 'operation')} of that "
                    f"name. {_what_ran(counts)} See all: hookmap show MODEL --operations --layers N"
                )
            if seen > 1 and operator in self.alone:
                raise CaptureError(
                    f"the forward of {name} has {seen} operations {operator}: say which, {operator}#0 to "
                    f"{operator}#{seen - 1}. See them: hookmap show MODEL --operations --layers N"
                )
            if expected not in (None, seen):
                raise CaptureError(
                    f"{operator} ran {counted(seen, 'time')} in the forward of {name}, expected {expected}: which of "
                    "them is meant cannot be told where their number changes. Name another operation, or a module's "
                    "input or output."
                )
            self.visits[operator] = seen


def _what_ran(counts: Mapping[str, int]) -> str:
    fused = [name for name in counts if name.startswith("_scaled_dot_product") or "flash" in name]
    if fused:
        return (
            f"One fused operation ({fused[0]}) computes the attention here, and shows no scores: load the model with "
            'attn_implementation="eager".'
        )
    return f"There are {', '.join(counts)}." if counts else "There are none in it, outside of the modules in it."


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts and shows the operations of the module whose own code runs."""

    def __init__(
        self, forwards: Mapping[nn.Module, Forward], looks: Callable[[], bool], then: Callable[[], None]
    ) -> None:
        """`looks`: whether the model runs for the capture now. `then`: is called when a watched module has ended."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._forwards, self._looks, self._then = forwards, looks, then
        self._frames: list[tuple[Forward, dict[str, int]] | None] = []
        """of each hooked module that runs: what is watched of it and what was counted; None for nothing"""
        self._rows: list[list[ExpertRows]] = []
        """of each module that runs whose experts are watched"""
        self._on = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would enter and leave its compiler around each operation, which costs more than all else here."""
        return False

    def pause(self) -> None:
        """A module begins, or its own code has ended."""
        self._frames.append(None)
        self._switch()

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The own code of a watched module begins."""
        if self._looks():
            self._frames[-1] = (self._forwards[module], {})
            if rows := self._forwards[module].begin(module, args, kwargs):
                self._rows.append(rows)
            self._switch()

    def end(self, module: nn.Module) -> None:
        """The own code of a watched module has ended. Raises CaptureError; see `Forward.check` and `Forward.end`."""
        frame, self._frames[-1] = self._frames[-1], None
        if frame is not None and frame[0].experts:
            self._rows.pop()
        self._switch()
        if frame is not None:
            frame[0].check(frame[1])
            frame[0].end()

    def leave(self, module: nn.Module) -> None:
        """A module has returned, and its hooks have run."""
        self._frames.pop()
        self._switch()
        if module in self._forwards and self._looks():
            self._then()

    def close(self) -> None:
        """The run is over, or an error ended it."""
        self._frames.clear()
        self._rows.clear()
        self._switch()

    def _switch(self) -> None:
        on = bool(self._rows) or (bool(self._frames) and self._frames[-1] is not None)
        if on and not self._on:
            self.__enter__()  # type: ignore[no-untyped-call]
        elif self._on and not on:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._on = on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _, name, is_composite = _KNOWN.get(id(func)) or _known(func)
        if is_composite:  # in inference mode it comes undivided
            with self:
                return func.decompose(*args, **kwargs)
        if not self._rows:
            return self._run(func, name, args, kwargs)
        for rows in (each for group in self._rows for each in group):
            rows.before(func, name, args)
        result = self._run(func, name, args, kwargs)
        for rows in (each for group in self._rows for each in group):
            rows.after(func, name, args, kwargs, result)
        return result

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        frame = self._frames[-1] if self._frames else None
        if frame is None:  # inside another module, of whose experts the rows are followed
            return func(*args, **kwargs)
        forward, counts = frame
        number = counts.get(name, 0)
        counts[name] = number + 1
        calls = forward.calls.get((name, number)) if name in forward.operators else None
        return func(*args, **kwargs) if calls is None else _shown(func, args, kwargs, calls)


_KNOWN: dict[int, tuple[Any, str, bool]] = {}
"""id of an operator -> the operator, its name, and whether PyTorch divides it; hashing one takes a call of Python"""


def _known(func: Any) -> tuple[Any, str, bool]:
    """The name is that of the overload packet: `add` for aten.add.Tensor and aten.add_.Tensor alike.

    A composite one is divided into others before it reaches a dispatch mode, unless in inference mode.
    """
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    found = func, func._schema.name.split("::")[-1].rstrip("_"), is_composite
    _KNOWN[id(func)] = found
    return found


def _shown(func: Any, args: Any, kwargs: Any, calls: Mapping[str, list[Call]]) -> Any:
    """Run an operation, with what is called at its tensors, which may put others in their place."""
    for call in calls.get("input", ()):
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        passed = call(tuple(leaves[place] for place in places), {}, None)
        if passed is not None:
            for place, tensor in zip(places, passed[0], strict=True):
                leaves[place] = tensor
            args, kwargs = tree_unflatten(leaves, structure)
    result = func(*args, **kwargs)
    for call in calls.get("output", ()):
        passed = call((), {}, result)
        if passed is not None:
            result = _replaced(func, result, passed[2])
    return result


def _replaced(func: Any, result: Any, new: Any) -> Any:
    if not func._schema.is_mutable:
        return new
    for old, tensor in zip(tree_flatten(result)[0], tree_flatten(new)[0], strict=True):
        if old is not tensor:  # it was written in place, and others hold it
            old.copy_(tensor)
    return result


@contextmanager
def showing(
    forwards: Mapping[nn.Module, Forward],
    looks: Callable[[], bool],
    then: Callable[[], None] = lambda: None,
    any_thread: bool = False,
) -> Iterator[None]:
    """Inside, what the forwards hold is called. `then`: see `Operations`. `any_thread`: on other threads, too."""
    if not forwards:
        yield
        return
    experts = [(module, forward, own) for module, forward in forwards.items() for own in forward.experts.values()]
    forwards = dict(forwards)
    for module, forward, own in experts:
        if own.chosen.is_inside:
            router = module.get_submodule(forward.inside(own.chosen.module))
            forwards.setdefault(router, Forward(own.chosen.module)).add(own.chosen, own.chosen.side, [own.note])
    mode, me = Operations(forwards, looks, then), threading.get_ident()
    mine = (lambda: True) if any_thread else (lambda: threading.get_ident() == me)
    with ExitStack() as hooks:
        hooks.callback(mode.close)
        if "torch._dynamo" in sys.modules:  # compiled code dispatches no operation: it runs as it was written
            hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for module, forward, own in experts:
            if not own.chosen.is_inside:
                _note_choice(hooks, module, forward, own, mine)
        for module in dict.fromkeys(each for own in forwards for each in own.modules()):
            _hook(hooks, mode, module, mine, module in forwards)
        yield


def _note_choice(
    hooks: ExitStack, module: nn.Module, forward: Forward, own: _Experts, mine: Callable[[], bool]
) -> None:
    """The router's choice is noted where it passes."""

    def note(args: Any, kwargs: Any, output: Any) -> None:
        if mine():
            own.note(args, kwargs, output)

    at = module.get_submodule(forward.inside(own.chosen.module))
    if own.chosen.side == "input":
        handle = at.register_forward_pre_hook(lambda _, args, kwargs: note(args, kwargs, None), with_kwargs=True)
    else:
        handle = at.register_forward_hook(lambda _, args, output: note(args, {}, output))
    hooks.callback(handle.remove)


def _hook(hooks: ExitStack, mode: Operations, module: nn.Module, mine: Callable[[], bool], own: bool) -> None:
    """Its own code begins behind the last pre-hook and ends before the first hook: what hooks compute is none of it."""

    def on(action: Callable[[], None]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if mine():
                action()

        return hook

    hooks.callback(module.register_forward_pre_hook(on(mode.pause), prepend=True).remove)
    if own:

        def begin(_: Any, args: Any, kwargs: Any) -> None:
            if mine():
                mode.begin(module, args, kwargs)

        hooks.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
        hooks.callback(module.register_forward_hook(on(lambda: mode.end(module)), prepend=True).remove)
    hooks.callback(module.register_forward_hook(on(lambda: mode.leave(module))).remove)
