"""Edges of tiny models by hand: what heads add, and what one reader alone reads, by plain hooks at written paths."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from support import plain_hooks

import hookmap

WIDTH = 8
"""of a head"""
PAIRS: list[dict[str, Any]] = [
    {"clean": [5, 17, 3, 60, 22, 9], "corrupted": [5, 17, 4, 60, 23, 9], "answer": 5, "wrong": 9},
    {"clean": [11, 2, 33, 40], "corrupted": [11, 7, 33, 40], "answer": 8, "wrong": 30},
]


@dataclass(frozen=True)
class Wiring:
    """Where one family's readers and heads are; paths are below the block."""

    block: str
    norms: tuple[str, str]
    """that of the attention and that of the MLP"""
    reads: dict[str, tuple[str, Callable[[int], int]]]
    """q, k or v -> its module, and where the features of a head begin in its output"""
    z: str
    """the output projection, whose input is z"""
    mlp: str
    post: str | None = None
    """the norm behind the attention"""
    parallel: bool = False


def _apart(parts: str = "self_attn.{}_proj") -> dict[str, tuple[str, Callable[[int], int]]]:
    return {name: (parts.format(name), lambda head: WIDTH * head) for name in "qkv"}


def _llama(**others: Any) -> Wiring:
    given = {"norms": ("input_layernorm", "post_attention_layernorm"), **others}
    return Wiring("model.layers.{}", reads=_apart(), z="self_attn.o_proj", mlp="mlp", **given)


WIRING = {
    "llama": _llama(),
    "qwen3_moe": _llama(),
    "gemma2": _llama(
        norms=("input_layernorm", "pre_feedforward_layernorm"), post="post_attention_layernorm"
    ),
    "gpt2": Wiring(
        "transformer.h.{}", ("ln_1", "ln_2"),
        {name: ("attn.c_attn", lambda head, n=n: 32 * n + WIDTH * head) for n, name in enumerate("qkv")},
        "attn.c_proj", "mlp",
    ),
    "gpt_neox": Wiring(
        "gpt_neox.layers.{}", ("input_layernorm", "post_attention_layernorm"),
        {
            name: ("attention.query_key_value", lambda head, n=n: 3 * WIDTH * head + WIDTH * n)
            for n, name in enumerate("qkv")
        },
        "attention.dense", "mlp", parallel=True,
    ),
}  # fmt: skip


@cache
def wide(name: str) -> Any:
    """The family's model in float64, and hookmap's view of a copy of it."""
    model = plain_hooks.build(name)
    hm = hookmap.open(copy.deepcopy(model))
    for each in (model, hm.model):
        for part in each.modules():
            if hasattr(part, "config"):
                part.config._experts_implementation = "eager"  # the others have no float64
        each.double()
    return model.requires_grad_(False), hm


def difference(model: Any, ids: list[int], pair: dict[str, Any]) -> torch.Tensor:
    """The logit of the answer minus that of the wrong one."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits[pair["answer"]] - logits[pair["wrong"]]  # type: ignore[no-any-return]


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at(model: Any, name: str, layer: int, path: str) -> Any:
    return model.get_submodule(
        f"{WIRING[name].block.format(layer)}.{path}" if path else WIRING[name].block.format(layer)
    )


def seen(model: Any, module: Any, side: str, ids: list[int]) -> torch.Tensor:
    """What enters or leaves a module for one text, [pos, d]."""
    kept: list[torch.Tensor] = []

    def keep(*given: Any) -> None:
        whole = given[1][0] if side == "input" else given[-1]
        kept.append((whole[0] if isinstance(whole, tuple) else whole).detach().clone())

    add = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
    with hooks(add(keep)), torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    return kept[-1].reshape(len(ids), -1)


def change_of_head(name: str, layer: int, head: int, pair: dict[str, Any], base: str, source: str) -> torch.Tensor:
    """What a head adds to the stream in the source and not in the base, to first order at the base, [pos, d]."""
    model, wiring = wide(name)[0], WIRING[name]
    project = at(model, name, layer, wiring.z)
    there, here = (seen(model, project, "input", pair[side]) for side in (source, base))
    moved = torch.zeros_like(here)
    features = slice(WIDTH * head, WIDTH * (head + 1))
    moved[:, features] = (there - here)[:, features]
    added = project(moved) - project(torch.zeros_like(moved))
    if wiring.post is None:
        return added  # type: ignore[no-any-return]
    norm, whole = at(model, name, layer, wiring.post), project(here)
    return torch.autograd.functional.jvp(norm, (whole,), (added,))[1]  # type: ignore[no-untyped-call, no-any-return]


def change_of_mlp(name: str, layer: int, pair: dict[str, Any], base: str, source: str) -> torch.Tensor:
    """What an MLP adds in the source and not in the base, [pos, d]."""
    model = wide(name)[0]
    module = at(model, name, layer, "post_feedforward_layernorm" if name == "gemma2" else WIRING[name].mlp)
    there, here = (seen(model, module, "output", pair[side]) for side in (source, base))
    return there - here


def with_shift(
    name: str, reader: tuple[str, int, int], shift: torch.Tensor, ids: list[int], pair: dict[str, Any]
) -> float:
    """The metric where one reader alone, (q, k, v or mlp, layer, head), sees its stream moved by `shift`, [pos, d]."""
    model, wiring = wide(name)[0], WIRING[name]
    part, layer, head = reader
    if part == "mlp":
        norm = at(model, name, layer, wiring.norms[1])
        handle = norm.register_forward_pre_hook(lambda _, args: (args[0] + shift,))
        with hooks(handle), torch.no_grad():
            return float(difference(model, ids, pair))
    stream: list[torch.Tensor] = []
    again: list[bool] = []
    path, begins = wiring.reads[part]
    module, norm = at(model, name, layer, path), at(model, name, layer, wiring.norms[0])
    features = slice(begins(head), begins(head) + WIDTH)

    def enter(_: Any, args: Any, kwargs: Any) -> None:
        stream.append(args[0] if args else kwargs["hidden_states"])

    def replace(_: Any, args: Any, output: Any) -> Any:
        if again:
            return None
        again.append(True)
        own = module(norm(stream[-1] + shift))
        again.pop()
        new = output.clone()
        new[..., features] = own[..., features]
        return new

    block = at(model, name, layer, "")
    handles = (block.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(replace))
    with hooks(*handles), torch.no_grad():
        return float(difference(model, ids, pair))
