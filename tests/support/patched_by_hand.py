"""Patches and paths by plain PyTorch hooks on a Llama or a GPT-2: nothing of hookmap is used here.

Every prompt runs alone, without pads. `cache` keeps what a run shows; `run` writes into another one.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

Write = Callable[[torch.Tensor], torch.Tensor]
"""[pos, ...] -> the same with something else in it"""


class ByHand:
    """Where things are: z is what the output projection reads, and heads lie side by side in it."""

    def __init__(self, model: nn.Module, family: str, heads: int) -> None:
        self.model, self.heads = model, heads
        block, attention, project, mlp, norm = {
            "llama": ("model.layers.{}", "self_attn", "self_attn.o_proj", "mlp", "post_attention_layernorm"),
            "gpt2": ("transformer.h.{}", "attn", "attn.c_proj", "mlp", "ln_2"),
        }[family]
        self.paths: dict[str, tuple[str, str]] = {
            "z": (f"{block}.{project}", "input"),
            "mixer_out": (f"{block}.{attention}", "output"),
            "mlp_out": (f"{block}.{mlp}", "output"),
            "mlp_in": (f"{block}.{norm}", "output"),
            "resid_pre": (block, "input"),
        }
        if family == "llama":
            self.paths |= {name: (f"{block}.self_attn.{name}_proj", "output") for name in "qkv"}
        self.fused = family == "gpt2"

    def run(
        self, ids: list[int], writes: Mapping[tuple[str, int], Write] | None = None, keep: Any = ()
    ) -> tuple[torch.Tensor, dict[tuple[str, int], torch.Tensor]]:
        """The logits of the last token, and what was kept, each [pos, d]: as it is after the writes."""
        kept: dict[tuple[str, int], torch.Tensor] = {}
        with ExitStack() as hooks:
            for key in dict.fromkeys((*(writes or {}), *keep)):
                self._hook(hooks, key, (writes or {}).get(key), kept)
            with torch.no_grad():
                logits = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        return logits, kept

    def _hook(self, hooks: ExitStack, key: tuple[str, int], write: Write | None, kept: dict[Any, torch.Tensor]) -> None:
        name, layer = key
        part = "qkv".index(name) if self.fused and name in "qkv" else None
        path, side = self.paths[name] if part is None else ("transformer.h.{}.attn.c_attn", "output")
        module = self.model.get_submodule(path.format(layer))

        def change(tensor: torch.Tensor) -> torch.Tensor:
            new = tensor.clone()
            view = new[0] if part is None else new[0].chunk(3, -1)[part]
            if write is not None:
                view[:] = write(view.clone())
            kept[key] = view.clone()
            return new

        def before(_: nn.Module, args: Any) -> Any:
            return (change(args[0]), *args[1:])

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        if side == "input":
            hooks.callback(module.register_forward_pre_hook(before).remove)
        else:
            hooks.callback(module.register_forward_hook(after).remove)

    def head(self, rows: torch.Tensor, head: int | None, heads: int | None = None) -> torch.Tensor:
        """A view of one head of rows [pos, heads * d_head], or of all."""
        if head is None:
            return rows
        return rows.unflatten(-1, (heads or self.heads, -1))[:, head]

    def put(
        self, source: torch.Tensor, head: int | None = None, at: int | None = None, heads: int | None = None
    ) -> Write:
        """Writes these rows of the source, all or one head, at every position or one."""

        def write(rows: torch.Tensor) -> torch.Tensor:
            where = slice(None) if at is None else at
            self.head(rows, head, heads)[where] = self.head(source, head, heads)[where]
            return rows

        return write


def path_logits(
    by: ByHand,
    base: list[int],
    other: list[int],
    sender: tuple[str, int, int | None],
    receivers: list[tuple[str, int, int | None]],
    through_mlps: bool,
    layers: int,
    kv_heads: int,
) -> torch.Tensor:
    """The definition of Wang et al., with everything that is not on the path frozen by name and layer."""
    point, layer, head = sender
    outs = [(name, n) for n in range(layers) for name in ("mixer_out", "mlp_out")]
    _, as_it_was = by.run(base, keep=outs)
    _, from_other = by.run(other, keep=[(point, layer)])
    writes: dict[tuple[str, int], Write] = {(point, layer): by.put(from_other[point, layer], head)}
    own = ("mixer_out" if point == "z" else point, layer)
    for name, n in outs:
        if n >= layer and (name, n) != own and not (through_mlps and name == "mlp_out"):
            writes[name, n] = by.put(as_it_was[name, n])
    logits, arrived = by.run(base, writes, keep=[(name, n) for name, n, _ in receivers])
    if not receivers:
        return logits
    put: dict[tuple[str, int], Write] = {}
    for name, n, one in receivers:
        before = put.get((name, n), lambda rows: rows)
        new = by.put(arrived[name, n], one, heads=kv_heads if name in ("k", "v") else None)
        put[name, n] = lambda rows, before=before, new=new: new(before(rows))
    return by.run(base, put)[0]
