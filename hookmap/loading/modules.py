"""A torch module that holds a transformers model: what it is, where it computes, and what its `forward` is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from hookmap.errors import DiscoveryError, ModelError

_SEQUENCES = (13, 11, 17, 19, 23, 29, 31, 37, 7)
_PLAIN_EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""transformers' ways to compute experts that are PyTorch's own operations"""


def unwrap(source: Any) -> nn.Module:
    """The torch module inside an nnsight model or `torch.compile`'s wrapper, which answers to its paths, or itself."""
    inner = getattr(source, "_module", None)
    if isinstance(inner, nn.Module) and type(source).__module__.startswith("nnsight"):
        source = inner
    if isinstance(source, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise DiscoveryError(
            f"a {type(source).__name__} runs copies of its model, which no hook of its own reaches: give its .module."
        )
    if isinstance(source, nn.Module):
        compiled = source._modules.get("_orig_mod")
        return source if compiled is None else compiled
    raise DiscoveryError(
        f"cannot discover a {type(source).__name__}: expected a hub id, a local folder, a transformers config, "
        "a torch module or an nnsight model."
    )


def each_module(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `root.named_modules()`, and faster: no name passes through a generator for each level."""
    left, seen = [("", root)], set[nn.Module]()
    while left:
        path, module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        inside = [(f"{path}.{name}" if path else name, part) for name, part in module._modules.items()]
        left.extend((name, part) for name, part in reversed(inside) if part is not None)


def model_inside(module: nn.Module) -> Any:
    """The transformers model: the module, or the first one in it; None where it holds none."""
    from transformers import PreTrainedModel

    return next((each for each in module.modules() if isinstance(each, PreTrainedModel)), None)


def architecture_of(model: nn.Module) -> str:
    """The class of the transformers model, also inside a wrapper (PEFT); of a module that holds none, its own."""
    inside = model_inside(model)
    return type(model if inside is None else inside).__name__


def model_root(module: nn.Module, weights: bool = True) -> nn.Module:
    """The transformers model that is watched: the module, or the one that wrappers (PEFT) hold."""
    root = model_inside(module)
    if root is None:
        raise ModelError(f"{type(module).__name__} holds no transformers model, such as AutoModelForCausalLM loads.")
    if weights and any(
        p.is_meta for module in root.modules() if not _brings_weights(module) for p in module.parameters(False)
    ):
        raise ModelError(f"{type(root).__name__} has no weights (meta device): load them, then open it.")
    try:
        embedding = root.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # transformers' way to say that it names none (Dia)
        embedding = None
    if not isinstance(getattr(embedding, "weight", None), torch.Tensor):
        what = (
            "names no embedding of what it reads"
            if embedding is None
            else (f"embeds what it reads with a {type(embedding).__name__}")
        )
        raise ModelError(
            f"{type(root).__name__} {what}: expected one embedding of "
            "token ids, because a sample's rows are those of its token ids. Its map can be had: hookmap discover"
        )
    found: nn.Module = root
    return found


def why_it_generates_nothing(root: nn.Module) -> str | None:
    """Why a model of transformers continues no text; None where it does."""
    if root.can_generate():  # type: ignore[operator]
        return None
    return f"{type(root).__name__} generates no text: transformers gives it no `generate`"


def _brings_weights(module: nn.Module) -> bool:
    """Whether accelerate holds its weights elsewhere, on a disk say, and brings them when it runs."""
    return getattr(module.__dict__.get("_hf_hook"), "offload", False) is True


def tensor_at(model: nn.Module, path: str) -> torch.Tensor:
    """A parameter or a buffer, also where accelerate keeps it elsewhere till its module runs; else AttributeError."""
    owner, _, name = path.rpartition(".")
    own = model.get_submodule(owner)
    found: torch.Tensor = getattr(own, name)
    if found.is_meta and _brings_weights(own):
        from accelerate.utils import align_module_device

        with align_module_device(own):
            found = getattr(own, name)
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where a forward pass computes, also where accelerate keeps the weights elsewhere until they are needed."""
    for module in model.modules():
        device = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, uncompiled, with eager attention; restored afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _set(model, "_attn_implementation", lambda _: "eager"), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """Experts run in PyTorch where they would in a kernel, which no dataflow shows; restored afterwards."""
    with _set(model, "_experts_implementation", lambda own: own if own in _PLAIN_EXPERTS else "eager"):
        yield


@contextmanager
def no_autocast_on_meta() -> Iterator[None]:
    """transformers before 5.4 asks whether autocast is on for a tensor's device, and torch raises for meta."""
    import transformers

    if Version(transformers.__version__) >= Version("5.4"):
        yield
        return
    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda *device: device != ("meta",) and asked(*device)
    try:
        yield
    finally:
        torch.is_autocast_enabled = asked


@contextmanager
def _set(model: nn.Module, name: str, value: Callable[[str], str]) -> Iterator[None]:
    """A setting of each config in the model that has it; restored afterwards."""
    configs = _configs(model)
    before = [getattr(config, name, None) for config in configs]
    for config, own in zip(configs, before, strict=True):
        if own is not None:
            setattr(config, name, value(own))
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            if own is not None:
                setattr(config, name, own)


def _configs(model: nn.Module) -> list[Any]:
    """The configs of the model and its modules, and those inside them. Outer first: setting one sets those inside."""
    found: dict[int, Any] = {}
    stack = [c for m in reversed(list(model.modules())) if (c := getattr(m, "config", None)) is not None]
    while stack:
        config = stack.pop()
        if id(config) not in found:
            found[id(config)] = config
            inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())
            stack += [each for each in inner if each is not None]
    return list(found.values())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout inside; every module's training flag as before outside."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def accepted(model: nn.Module, given: Iterable[str]) -> dict[str, str]:
    """Input -> the parameter of `forward` that takes it; the ids go to the first one where none is called input_ids."""
    # Of the class: nnsight, accelerate and torch.compile put functions of their own on the object.
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    others = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {name: name for name in given if others or name in named}
    if "input_ids" in given and "input_ids" not in named and named:
        names["input_ids"] = named[0]
    return names


def inputs(device: Any, seq: int, rows: int = 1) -> dict[str, Any]:
    """Arguments of a forward pass: one sequence of ones, nothing masked, no cache."""
    ids = torch.ones((rows, seq), dtype=torch.long, device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def rows_per_sequence(config: Any) -> int:
    """Rows of ids in one sequence: several where an audio model reads a row for each codebook (Musicgen)."""
    return int(getattr(config, "num_codebooks", None) or 1)


def sequence_length(config: Any, model: nn.Module | None = None) -> int:
    """An odd length that divides no size in the config, so that the length identifies the axis of positions.

    With a model, it divides no size of a weight either: a module may have no config.
    """
    sizes = set(_numbers(config.to_dict() if hasattr(config, "to_dict") else {}))
    sizes |= {size for weight in (model.parameters() if model is not None else ()) for size in weight.shape}
    limit = getattr(config, "max_position_embeddings", None) or 10**9
    fits = [n for n in _SEQUENCES if n <= limit] or [_SEQUENCES[0]]
    unequal = [n for n in fits if n not in sizes]
    return next((n for n in unequal if all(size % n for size in sizes if size)), (unequal or fits)[0])


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, (list, tuple)) and len(value) < 64:
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int):
        yield value
