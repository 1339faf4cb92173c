"""The same questions answered with plain PyTorch alone: hooks at paths written by hand. Nothing of hookmap is used."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import questions as q
import torch
from support.plain_hooks import Family, Place
from torch import nn

Change = Callable[[torch.Tensor], torch.Tensor]


def truth(model: nn.Module, family: Family) -> q.Answers:
    """Reads, and the writes of `resid_mid`: of a stream that goes on, so in place where only a norm shows it."""
    found = q.Answers()
    seen = watched(model, family, q.TOKENS)
    logits = seen.pop("logits")
    found.tensors = {"logits": logits, "last lens": logits.softmax(-1), **seen}
    places = family.points.get("resid_mid", ())
    if len(places) == 1:  # of a sum of two, neither is what is written
        source = watched(model, family, q.SOURCE)[f"read resid_mid {q.LAYER}"]
        changes = {"steer resid_mid": steered, "patch resid_mid": lambda rows: patched(rows, source)}
        for name, change in changes.items():
            found.ask(name, lambda change=change: written(model, places, change, everybody=True))
            found.ask(f"{name} for the norm alone", lambda change=change: written(model, places, change, False))
    return found


def steered(rows: torch.Tensor) -> torch.Tensor:
    return rows + q.STRENGTH * q.VECTOR


def patched(rows: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    new = rows.clone()
    new[:, q.PLACES] = source[q.PLACES]
    return new


def watched(model: nn.Module, family: Family, tokens: list[int]) -> dict[str, torch.Tensor]:
    """ "read POINT LAYER" -> [pos, d], and the logits."""
    seen: dict[tuple[str, str], torch.Tensor] = {}
    points = {(p, i): parts for p, parts in family.points.items() for i in range(q.LAYERS)}
    where = {(place.module.replace("{i}", str(i)), place.side) for (_, i), parts in points.items() for place in parts}
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for key in where:
            hooks.enter_context(hooked(model, *key, lambda tensor, key=key: seen.__setitem__(key, tensor.clone())))
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    found = {"logits": logits}
    for (point, layer), parts in points.items():
        tensors = [seen[place.module.replace("{i}", str(layer)), place.side][0] * place.scale for place in parts]
        found[f"read {point} {layer}"] = torch.stack(tensors).sum(0) if len(tensors) > 1 else tensors[0]
    return found


def written(model: nn.Module, places: tuple[Place, ...], change: Change, everybody: bool) -> torch.Tensor:
    """Logits. `everybody`: whether the tensor itself is changed, and not a copy for the module that is hooked."""
    path, side = places[-1].module.replace("{i}", str(q.LAYER)), places[-1].side

    def put(tensor: torch.Tensor) -> Any:
        if side == "output" or not everybody:
            return change(tensor)
        return tensor.copy_(change(tensor))

    with hooked(model, path, side, put, replaces=True):
        logits: torch.Tensor = model(torch.tensor([q.TOKENS]), use_cache=False).logits[0]
    return logits


@contextlib.contextmanager
def hooked(
    model: nn.Module, path: str, side: str, call: Callable[[torch.Tensor], Any], replaces: bool = False
) -> Iterator[None]:
    def before(_: Any, args: Any, kwargs: Any) -> Any:
        new = call(args[0] if args else kwargs["hidden_states"])
        if not replaces:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_: Any, args: Any, output: Any) -> Any:
        new = call(output[0] if isinstance(output, tuple) else output)
        if not replaces:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    module = model.get_submodule(path)
    if side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
