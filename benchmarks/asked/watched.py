"""One forward pass by plain PyTorch, all modules watched. No hookmap."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

SUM = 1e-5
"""of the largest number of the stream: how exactly a sum of float32 must come out"""
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Call:
    """One run of a module."""

    given: list[torch.Tensor]
    gives: list[torch.Tensor] = field(default_factory=list)


class Softmaxes(TorchFunctionMode):
    """Every softmax over four axes: what it reads and what it gives."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (nn.functional.softmax, torch.softmax, torch.Tensor.softmax) and out.ndim == 4:
            self.seen.append((args[0].detach().float().clone(), out.detach().float().clone()))
        return out


class Run:
    """One forward pass, all modules watched."""

    def __init__(self, model: nn.Module, tokens: list[int], changes: dict[tuple[str, str], Change] | None = None):
        self.calls: dict[str, list[Call]] = {}
        self.softmax: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        wanted = changes or {}
        with ExitStack() as hooks, torch.no_grad(), Softmaxes() as softmaxes:
            for path, module in model.named_modules():
                hooks.enter_context(self._watched(path, module, softmaxes, wanted))
            self.output = model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
        self.positions = len(tokens)

    @contextmanager
    def _watched(self, path: str, module: nn.Module, softmaxes: Softmaxes, changes: Any) -> Iterator[None]:
        begun: list[int] = []

        def before(_: Any, args: Any, kwargs: Any) -> Any:
            change = changes.get((path, "input"))
            if change is not None:
                if args:
                    args = (change(args[0]), *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
            begun.append(len(softmaxes.seen))
            first = [kwargs["hidden_states"]] if "hidden_states" in kwargs else []
            self.calls.setdefault(path, []).append(Call(_kept([*args, *first, *kwargs.values()])))
            return args, kwargs

        def after(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
            change = changes.get((path, "output"))
            if change is not None:
                out = (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
            self.calls[path][-1].gives = _kept(out if isinstance(out, (tuple, list)) else [out])
            self.softmax[path] = softmaxes.seen[begun.pop() :]
            return out

        first = module.register_forward_pre_hook(before, with_kwargs=True)
        then = module.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            first.remove()
            then.remove()

    def once(self, path: str) -> Call | None:
        calls = self.calls.get(path, [])
        return calls[0] if len(calls) == 1 and calls[0].given and calls[0].gives else None


def _kept(values: Any) -> list[torch.Tensor]:
    return [v.detach().float().clone() for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]


def close(found: torch.Tensor, expected: torch.Tensor, share: float = SUM) -> bool:
    """Whether all numbers are the same, up to a share of the largest; axes of length one do not count."""
    if found.numel() != expected.numel():
        return False
    return bool((found.flatten() - expected.flatten()).abs().max() <= share * expected.abs().max().clamp_min(1e-30))


def is_linear(module: nn.Module) -> bool:
    """A module without children whose weight is a matrix: nn.Linear, GPT-2's Conv1D and their kin."""
    weight = getattr(module, "weight", None)
    return not list(module.children()) and isinstance(weight, torch.Tensor) and weight.ndim == 2
