"""Runs a model under plain PyTorch hooks. All checks run their model here.

A run reads the tensors that selectors name. A hook may change a tensor on its way, and weights may be replaced.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hookmap.errors import CaptureError
from hookmap.loading import modules, other_inputs
from hookmap.loading.encoder_decoder import with_source
from hookmap.loading.operations import Forward, showing
from hookmap.maps.selectors import Selector
from hookmap.maps.terms import Term
from hookmap.verification.check import Key

BATCH, POSITIONS = 2, 9
"""the size of every text: two lengths that differ, so that the axes can be told apart"""


@dataclass(frozen=True)
class Given:
    """What a model is run on: token ids, or a picture for the part of it that reads one."""

    batch: int
    positions: int
    """tokens, or patches"""
    ids: Tensor | None = None
    """[batch, pos]; [batch * rows, pos] where the model reads several rows of ids for one sequence"""
    picture: Mapping[str, Any] = field(default_factory=dict)
    """arguments of the part, the picture first"""
    part: str = ""
    """its path"""

    def other(self) -> Given:
        """Other tokens, or another picture."""
        if self.ids is not None:
            return replace(self, ids=self.ids.flip((0, 1)))
        (name, picture), *beside = self.picture.items()
        return replace(self, picture={name: picture.flip(-1) * 1.5, **dict(beside)})

    def arguments(self, model: nn.Module, settings: Mapping[str, bool]) -> dict[str, Any]:
        """Of one forward pass of `model`, or of its part."""
        if self.ids is None:
            given = {**self.picture, **settings}
            return {parameter: given[name] for name, parameter in modules.accepted(model, given).items()}
        given = {"input_ids": self.ids.clone(), "attention_mask": torch.ones_like(self.ids), "use_cache": False}
        given = with_source(model, {**given, **settings}, torch.Generator().manual_seed(0))
        given |= other_inputs.chosen(model, given)
        return {parameter: given[name] for name, parameter in modules.accepted(model, given).items()}


@dataclass(frozen=True)
class Hook:
    """A function that runs when a module is entered ("input") or has returned ("output").

    `act(args, kwargs, output)`: `output` is None at an input. What it returns at an output replaces the output,
    unless it is None.
    """

    module: str
    side: Literal["input", "output"]
    act: Callable[[Any, Any, Any], Any]
    of: Term | None = None
    """the term, where it is an operation in the module's forward: it is looked at there, and nothing is replaced"""


def at(term: Term, use: Callable[[Tensor], object]) -> Hook:
    """A hook that hands `use` the term's tensor itself, not a copy: `use` may change it in place."""
    calls = itertools.count()

    def act(args: Any, kwargs: Any, output: Any) -> None:
        if term.call in (None, next(calls)):
            use(term.resolve(args, kwargs, output))

    return Hook(term.module, term.side, act, term if term.is_inside else None)


def keep(parts: dict[int, Tensor], number: int, tensor: Tensor) -> None:
    """Store a copy of a term's tensor under the term's number."""
    parts[number] = tensor.detach().clone()


def forward(
    model: nn.Module,
    given: Given,
    hooks: Iterable[Hook] = (),
    weights: Mapping[str, Tensor] | None = None,
    **settings: bool,
) -> Any:
    """The output of one forward pass under `hooks`, with `weights` in place of the model's own of the same names."""
    runs = model.get_submodule(given.part)
    kwargs = given.arguments(runs, settings)
    below = f"{given.part}." if given.part else ""
    replaced = {name.removeprefix(below): weight for name, weight in (weights or {}).items() if name.startswith(below)}
    device = modules.device_of(model)
    with ExitStack() as stack, torch.no_grad():
        # A model may begin with a random state (Huginn): every pass draws the same one.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(0)
        forwards: dict[nn.Module, Forward] = {}
        for hook in hooks:
            module = model.get_submodule(hook.module)
            if hook.of is None:
                stack.callback(_register(module, hook).remove)
            else:
                forwards.setdefault(module, Forward(hook.module)).add(hook.of, hook.side, [hook.act])
        stack.enter_context(showing(forwards, lambda: True))
        # With tied weights, torch would put a replaced weight in under all its names and take it out of one.
        return torch.func.functional_call(runs, replaced, (), kwargs, tie_weights=False)


def observe(
    model: nn.Module,
    given: Given,
    selectors: Sequence[Selector],
    hooks: Iterable[Hook] = (),
    weights: Mapping[str, Tensor] | None = None,
    **settings: bool,
) -> tuple[dict[Key, Tensor], Any]:
    """The points that `selectors` name, each [batch, pos, ...], and the output of one forward pass.

    `hooks` run before the points are read. A point that the pass does not reach is left out. Raises CaptureError
    where a selector names no tensor, or tensors that cannot be added.
    """
    found, output = observe_runs(model, given, selectors, hooks, weights, **settings)
    return {(selector.point, selector.layer): tensor for selector, tensor in found.items()}, output


def observe_runs(
    model: nn.Module,
    given: Given,
    selectors: Sequence[Selector],
    hooks: Iterable[Hook] = (),
    weights: Mapping[str, Tensor] | None = None,
    **settings: bool,
) -> tuple[dict[Selector, Tensor], Any]:
    """As `observe`, where selectors may name several runs of one layer."""
    parts: dict[Selector, dict[int, Tensor]] = {selector: {} for selector in selectors}
    readers = [
        at(term, partial(keep, parts[selector], number))
        for selector in selectors
        for number, term in enumerate(selector.terms)
    ]
    output = forward(model, given, [*hooks, *readers], weights, **settings)
    reached = [selector for selector in selectors if len(parts[selector]) == len(selector.terms)]
    return {selector: _total(model, given, selector, parts[selector]) for selector in reached}, output


def other_weights(model: nn.Module, inside: Collection[str], outside: Collection[str] = ()) -> dict[str, Tensor]:
    """Other numbers for the weights of the modules `inside`, without those of the modules `outside`."""

    def below(name: str, paths: Collection[str]) -> bool:
        return any(name.startswith(f"{path}.") for path in paths)

    return {
        name: (parameter * 1.5 + 0.01).detach()
        for name, parameter in model.named_parameters()
        if below(name, inside) and not below(name, outside)
        # An offloaded weight is on the meta device here, and the module computes with another tensor.
        if parameter.dtype.is_floating_point and not parameter.is_meta
    }


def _register(module: nn.Module, hook: Hook) -> RemovableHandle:
    if hook.side == "input":

        def entered(_: nn.Module, args: Any, kwargs: Any) -> None:
            hook.act(args, kwargs, None)

        return module.register_forward_pre_hook(entered, with_kwargs=True)
    return module.register_forward_hook(lambda _, *seen: hook.act(*seen), with_kwargs=True)


def _total(model: nn.Module, given: Given, selector: Selector, parts: Mapping[int, Tensor]) -> Tensor:
    weights = [None if t.parameter is None else modules.tensor_at(model, t.parameter) for t in selector.terms]
    arranged = [term.arrange(parts[n], given.batch, given.positions) for n, term in enumerate(selector.terms)]
    tensors = [t.times(tensor, weight) for t, tensor, weight in zip(selector.terms, arranged, weights, strict=True)]
    if len(shapes := {tuple(tensor.shape) for tensor in tensors}) > 1:
        raise CaptureError(f"{selector} is no sum: its tensors have the shapes {sorted(map(list, shapes))}.")
    total: Tensor = sum(tensors[1:], tensors[0])
    return total
