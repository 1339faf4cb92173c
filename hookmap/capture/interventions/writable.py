"""How a point is written: what a hook passes on in place of what it got. Knows tensors, not models.

What enters or leaves a branch or a block is *replaced*: the hook passes another tensor on, and other holders of the old
tensor keep it. The stream in the middle of a block is seen where a norm reads it, but the norm is not its only reader.
It is written *in place*, into the one tensor that all later readers share.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Literal

import torch

from hookmap.errors import InterventionError
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector
from hookmap.maps.terms import Term

Mode = Literal["replace", "in place"]
MODES: tuple[Mode, ...] = ("in place", "replace")
"""in the order of a boundary"""
ModuleIO = tuple[Sequence[Any], Mapping[str, Any], Any]
"""what a module gets or returns at a boundary: args, kwargs (of an input), output (of an output)"""
Cells = tuple[list[int], list[int]]
"""(rows of the batch, columns of the forward pass), pairwise"""
Change = Callable[[torch.Tensor], torch.Tensor]
"""from the point's values at the cells, [cells, ...], to the new ones"""


def refusal(selector: Selector) -> str | None:
    """Why such a point can never be written; None where it may be possible. Then it must be proved: see `proofs`."""
    name = PointName.of(selector.point).base
    if name.endswith("_norm_scale"):
        return f"it is a part of the norm: write what the norm gives, {name.removesuffix('_norm_scale')}" + (
            "_norm" if name.startswith("final") else "_in"
        )
    if selector.has_keys and selector.write is None and not any(term.operation for term in selector.terms):
        return "the model has used the attention weights before any module shows them: write z or v"
    if name == "attn_result":
        return "it is computed from z and the output projection's weights, and the model holds no such tensor: write z"
    if name in ("expert_post", "expert_out"):
        return (
            "its rows are gathered from what the model computes in another order, expert by expert: write "
            "router_weights, mlp_in or mlp_out"
        )
    if name == "router_indices":
        return "the experts chosen are numbers of experts, not values: write router_weights or mlp_in"
    if (weight := selector.terms[0].weight) is not None:
        return f"the model multiplies it by its parameter {weight}, and no module holds the product"
    if len(selector.terms) > 1:
        return f"no single tensor of the model holds it, it is {' + '.join(map(str, selector.terms))}"
    return None


def mode_of(selector: Selector) -> Mode:
    """Whether this point is replaced or written in place."""
    inside = selector.point.startswith("resid_mid") and selector.side == "input"
    return "in place" if inside else "replace"


@dataclass(frozen=True)
class BoundaryTensor:
    """The tensor of one term at a module boundary, seen as [batch, width, ...] of the tokens that are fed."""

    term: Term
    mode: Mode

    def read(self, given: ModuleIO, shape: tuple[int, int], cells: Cells) -> torch.Tensor:
        """A copy of the point's values at the cells, [cells, ...]."""
        tensor = self.term.arrange(self.term.resolve(*given), *shape)
        rows: torch.Tensor = tensor[tuple(torch.tensor(part, device=tensor.device) for part in cells)]
        return rows if self.term.scale == 1.0 else rows * self.term.scale

    def write(
        self,
        given: ModuleIO,
        shape: tuple[int, int],
        cells: Cells,
        change: Change,
        what: str,
    ) -> ModuleIO:
        """Args, kwargs and output with the point changed at the cells. `shape`: rows of the batch, columns fed.

        Other cells keep their bits, and so do values that `change` returns unchanged. For a term with a constant scale
        the tensor becomes value / scale, and the model's own multiplication may round the last bit.
        Raises InterventionError where the tensor is not of this shape. `what`: the point, for the message.
        """
        bare = replace(self.term, heads=None)
        tensor = self.term.whole(*given)
        whole = tensor if self.mode == "in place" else tensor.clone()
        view = self._view(bare, whole, shape)
        if view is None:
            whole = tensor.clone(memory_format=torch.contiguous_format)
            view = self._view(bare, whole, shape)
        if view is None or (self.mode == "in place" and whole is not tensor):
            raise InterventionError(
                f"{what}: no view of {bare} can be written, since the model keeps its numbers in another order. "
                "Write to a point before or after it: hookmap show MODEL lists them."
            )
        if tuple(view.shape[:2]) != shape:
            raise InterventionError(
                f"{what}: expected a tensor of [{shape[0]}, {shape[1]}, ...] (batch, tokens fed), got "
                f"{list(view.shape)}. The map was made for another version of this model: run `hookmap discover`."
            )
        self._put(view, cells, change)
        return given if self.mode == "in place" else passed_on(self.term, given, whole)

    def _view(self, bare: Term, whole: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
        flat = whole.flatten(0, -3) if self.term.heads is not None and whole.ndim > 3 else whole
        view: torch.Tensor = bare.arrange(flat, *shape)
        return view if view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() else None

    def _put(self, view: torch.Tensor, cells: Cells, change: Change) -> None:
        heads, index = self.term.heads, tuple(torch.tensor(part, device=view.device) for part in cells)
        if heads is None:
            view[index] = self._changed(view[index], change)
            return
        pitch = view.shape[-1] // heads.groups
        grouped = view.view(*view.shape[:-1], heads.groups, pitch)[..., heads.start : heads.stop]
        old = grouped[index]  # [cells, groups, heads of a group * d_head]
        split = old.reshape(len(old), -1, heads.d_head)
        grouped[index] = self._changed(split, change).reshape(old.shape)

    def _changed(self, raw: torch.Tensor, change: Change) -> torch.Tensor:
        scale = self.term.scale
        if scale == 1.0:
            return change(raw).to(raw.dtype)
        old = raw * scale
        new = change(old).to(raw.dtype)
        return torch.where(new == old, raw, new / scale)


def passed_on(term: Term, given: ModuleIO, tensor: torch.Tensor) -> ModuleIO:
    """Args, kwargs and output with `tensor` in place of the term's; containers are copied, with their types."""
    args, kwargs, output = given
    if term.side == "output":
        return args, kwargs, tensor if term.index is None else _with(output, term.index, tensor)
    if isinstance(term.index, str):
        return args, {**kwargs, term.index: tensor}, output
    return _with(tuple(args), term.index or 0, tensor), kwargs, output


def _with(container: Any, index: int | str, tensor: torch.Tensor) -> Any:
    if isinstance(container, tuple):
        items = [tensor if number == index else item for number, item in enumerate(container)]
        return type(container)(*items) if hasattr(container, "_fields") else type(container)(items)
    made = copy.copy(container)
    if isinstance(container, Mapping):
        made[list(container)[index] if isinstance(index, int) else index] = tensor
    elif is_dataclass(container):
        object.__setattr__(made, str(index), tensor)
    else:
        made[index] = tensor
    return made
