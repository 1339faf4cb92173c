"""The rows of a mixture's experts, in one run of the module that holds them, in the order of the router's choice.

However a model brings tokens to experts (a loop over experts, tokens sorted for a grouped product, a weight for each
token, every token to every expert), it copies rows, multiplies them by weights of experts, and copies them back. Which
token each row is of, and which expert's weight it meets, is followed through the operations as PyTorch dispatches them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from hookmap.errors import CaptureError

_RESHAPES = {"view", "_unsafe_view", "_reshape_alias"}
_SAME = {"clone", "_to_copy", "alias", "detach", "lift_fresh", "native_dropout"}
_LEFT = {"mm": 0, "addmm": 1, "_grouped_mm": 0, "grouped_mm_fallback": 0}
"""products of rows with a matrix -> which tensor has the rows"""
_BATCHED = {"bmm": 0, "baddbmm": 1}
_ALONG = {"squeeze": 1, "slice": 1, "select": 1, "unbind": 1, "index_select": 1, "split": 2, "split_with_sizes": 2}
"""what takes parts along one axis -> which argument names the axis"""
_ALONG_FEATURES = {"mean": 1, "sum": 1, "var": 1, "amax": 1, "_softmax": 1, "linalg_vector_norm": 2}
"""what computes along axes -> which argument names them"""
_NORMS = {"native_layer_norm", "_fused_rms_norm"}
_ASK = 'Load the model with experts_implementation="grouped_mm" or "eager".'


class Labels:
    """A label for each row of some tensors, and of what is made of them row by row.

    The label has the first axes of its tensor; what stands behind them are features of one row.
    """

    def __init__(self) -> None:
        self._of: Any = WeakTensorKeyDictionary()

    def get(self, tensor: Tensor) -> Tensor | None:
        found: Tensor | None = self._of.get(tensor)
        return found

    def set(self, tensor: Tensor, label: Tensor) -> None:
        self._of[tensor] = label

    def follow(self, func: Any, name: str, args: Any, result: Any) -> bool:
        """Label what an operation gives. Whether it gives rows of what it reads."""
        given = [each for each in _tensors(result) if isinstance(each, Tensor)]
        found = self._labels(func, name, args, given)
        for tensor, label in zip(given, [*found, *[None] * len(given)], strict=False):
            if label is not None and _fits(label, tensor):
                self.set(tensor, label)
            elif tensor in self._of:
                del self._of[tensor]  # it was written to
        return any(label is not None for label in found)

    def _labels(self, func: Any, name: str, args: Any, given: Sequence[Tensor]) -> Sequence[Tensor | None]:
        read = [each for each in _tensors(args) if each in self._of]
        if not read or not given:
            return []
        first, label = args[0], None if not isinstance(args[0], Tensor) else self.get(args[0])
        if name in _LEFT or name in _BATCHED:
            return [self._of_product(name, _tensors(args), given[0])]
        if name == "cat":
            return [self._joined(first, args)]
        if torch.Tag.pointwise in func.tags or name in _SAME or name == "copy":
            return [self._of_like(read, given[0])]
        if label is None:
            return []
        if name in _ALONG_FEATURES or name in _NORMS:
            return [label] * len(given) if _is_along_features(name, args, label.ndim) else []
        return _moved(func, name, args, label, given)

    def _of_product(self, name: str, tensors: Sequence[Tensor], given: Tensor) -> Tensor | None:
        """Rows times a matrix; of several matrices, a row for each, or the column of each."""
        if name in _LEFT:
            return self.get(tensors[_LEFT[name]])
        left, right = (self.get(t) for t in tensors[_BATCHED[name] : _BATCHED[name] + 2])
        if left is not None and right is not None:  # of two activations, such as an attention's
            return None
        if left is not None:
            return left
        return right if right is not None and right.ndim == 1 and given.shape[-1] == 1 else None

    def _joined(self, parts: Any, args: Any) -> Tensor | None:
        labels = [self.get(part) for part in parts]
        axis = args[1] if len(args) > 1 else 0
        known = [label for label in labels if label is not None]
        if len(known) < len(labels):
            return None
        if axis in (0, -parts[0].ndim):
            return torch.cat(known)
        return known[0] if axis % parts[0].ndim >= known[0].ndim else None

    def _of_like(self, read: Sequence[Tensor], given: Tensor) -> Tensor | None:
        """That of the first of the tensors that has a row for each row given."""
        labels = (self.get(tensor) for tensor in read if tensor.ndim == given.ndim)
        return next((label for label in labels if label is not None and _fits(label, given)), None)


def _fits(label: Tensor, given: Tensor) -> bool:
    return tuple(label.shape) == tuple(given.shape[: label.ndim])


def _moved(func: Any, name: str, args: Any, label: Tensor, given: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The labels of what only says where rows go."""
    lead, whole = label.ndim, args[0]
    if name in _RESHAPES:
        return [_reshaped(label, whole, given[0])]
    if name == "unsqueeze":
        axis = args[1] % (whole.ndim + 1)
        return [label.unsqueeze(axis) if axis < lead or axis == lead < whole.ndim else label]
    if name in _ALONG:
        axis = args[_ALONG[name]] if len(args) > _ALONG[name] else 0
        if not isinstance(axis, int) or len(args) == 1:
            return []
        made = func(label, *args[1:]) if axis % whole.ndim < lead else [label] * len(given)
        return made if isinstance(made, (list, tuple)) else [made]
    if name == "index":
        return [func(label, args[1])] if len(args[1]) <= lead else []
    if name == "expand":
        return [label.expand(given[0].shape[:lead])] if given[0].ndim == whole.ndim else []
    if name == "repeat":
        return [label.repeat(args[1][:lead])] if len(args[1]) == whole.ndim else []
    if name in ("transpose", "permute"):
        axes = list(range(whole.ndim))
        if name == "permute":
            axes = [axis % whole.ndim for axis in args[1]]
        else:
            a, b = (axis % whole.ndim for axis in args[1:3])
            axes[a], axes[b] = b, a
        return [label.permute(axes[:lead])] if sorted(axes[:lead]) == list(range(lead)) else []
    return []


def _reshaped(label: Tensor, whole: Tensor, given: Tensor) -> Tensor | None:
    """Where the features stay together: the same rows on other axes."""
    features = prod(whole.shape[label.ndim :])
    for lead in range(1, given.ndim + 1):
        if prod(given.shape[:lead]) == label.numel() and prod(given.shape[lead:]) == features:
            return label.reshape(given.shape[:lead])
    return None


def _is_along_features(name: str, args: Any, lead: int) -> bool:
    whole = args[0]
    if name in _NORMS:
        return bool(len(args[1]) <= whole.ndim - lead)
    axes = args[_ALONG_FEATURES[name]] if len(args) > _ALONG_FEATURES[name] else ()
    axes = [axes] if isinstance(axes, int) else axes or ()
    return bool(axes) and all(axis % whole.ndim >= lead for axis in axes)


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in tree_flatten(value)[0] if isinstance(each, Tensor)]


class ExpertRows:
    """One run of the module: the rows that the products with one parameter read, and what the experts give."""

    def __init__(self, module: nn.Module, parameter: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        """`parameter`: its path in the module, with all experts' weights. `args`, `kwargs`: what the module gets."""
        owner, _, self._name = parameter.rpartition(".")
        self._owner, self._parameter = module.get_submodule(owner), parameter
        self._tokens, self._experts, self._given = Labels(), Labels(), Labels()
        self._read: list[tuple[Tensor, Tensor]] = []
        """(token * experts + expert of each row, the rows [n, features])"""
        self._weighted: list[tuple[Tensor, Tensor]] = []
        self._last: list[Tensor] = []
        """tensors of what experts give that nothing has been made of yet"""
        self._trouble = ""
        self._count = len(self._whole()) if self._whole().ndim > 2 else 0
        """experts; 0 until the model divides a matrix of all of them"""
        tensors = [t for t in _tensors((args, dict(kwargs))) if t.is_floating_point() and t.ndim > 1]
        self._positions = prod(tensors[0].shape[:-1]) if tensors else 0
        for tensor in tensors:
            if prod(tensor.shape[:-1]) == self._positions:
                numbers = torch.arange(self._positions, device=tensor.device)
                self._tokens.set(tensor, numbers.reshape(tensor.shape[:-1]))

    def before(self, func: Any, name: str, args: Any) -> None:
        """An operation is about to run."""
        if name != "mul" or len(args) != 2:
            return
        for own, other in ((args[0], args[1]), (args[1], args[0])):
            label = self._given.get(own) if isinstance(own, Tensor) else None
            if label is None or not isinstance(other, Tensor) or self._given.get(other) is not None:
                continue
            one_a_row = other.ndim == own.ndim and other.numel() == label.numel() and _fits(label, other)
            if one_a_row and own.numel() != other.numel():
                self._weighted.append((label, own.clone() if func._schema.is_mutable else own))
                return

    def after(self, func: Any, name: str, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        """An operation has run."""
        tensors = _tensors((args, kwargs))
        weights = [(number, label) for number, t in enumerate(tensors) if (label := self._expert_of(t)) is not None]
        if weights and (name in _LEFT or name in _BATCHED):
            self._product(name, tensors, *weights[0], result)
        elif weights:
            self._experts.follow(func, name, args, result)
        given = [t for t in tensors if self._given.get(t) is not None]
        if given and not weights:
            followed = self._given.follow(func, name, args, result)
            self._last = [t for t in self._last if not any(t is each for each in given)] if followed else self._last
            self._last += [t for t in _tensors(result) if self._given.get(t) is not None] if followed else []
        self._tokens.follow(func, name, args, result)

    def _whole(self) -> Tensor:
        found = getattr(self._owner, self._name, None)
        if not isinstance(found, Tensor) or found.ndim < 2 or not found.is_floating_point():
            raise CaptureError(
                f"{self._parameter} is no parameter of all experts here: it is packed, or the map is another model's. "
                "Capture mlp_out, or open the model unquantised."
            )
        return found

    def _expert_of(self, tensor: Tensor) -> Tensor | None:
        """The experts whose weights a tensor holds: a number, or one for each entry of its first axis."""
        if (label := self._experts.get(tensor)) is not None:
            return label
        if not tensor.is_floating_point() or tensor.ndim < 2:
            return None
        whole = self._whole()
        offset = tensor.data_ptr() - whole.data_ptr()
        if tensor.dtype != whole.dtype or tensor.device != whole.device or not 0 <= offset < whole.nbytes:
            return None
        if whole.ndim == 2 and tensor.ndim == 3 and tensor.numel() == whole.numel():
            self._count = len(tensor)
        if not self._count or (tensor.ndim < 3 and tensor.numel() > whole.numel() // self._count):
            return None
        step = whole.element_size() * (whole.stride(0) if whole.ndim > 2 else whole.numel() // self._count)
        first = torch.tensor(offset // step, device=whole.device)
        label = first if tensor.ndim < 3 else first + torch.arange(len(tensor), device=whole.device)
        self._experts.set(tensor, label)
        return label

    def _product(self, name: str, tensors: Sequence[Tensor], number: int, experts: Tensor, result: Tensor) -> None:
        """Rows meet the experts' weights."""
        place = {**_LEFT, **_BATCHED}[name]
        on_left = number == place
        rows = tensors[place + 1] if on_left else tensors[place]
        tokens = self._tokens.get(rows)
        if tokens is None:
            self._trouble = f"which token each row is of is not to be told where {name} multiplies them"
            return
        if on_left and (name not in _BATCHED or rows.shape[-1] != 1 or tokens.ndim != 1):
            self._trouble = f"{name} has the experts' weights on its left side"
            return
        if experts.ndim == 1 and name in ("_grouped_mm", "grouped_mm_fallback"):
            ends = next((t for t in tensors if not t.is_floating_point()), None)
            if ends is None or len(ends) != self._count:
                self._trouble = f"{name} does not say which rows are whose"
                return
            order = torch.arange(len(tokens), device=ends.device, dtype=ends.dtype)
            experts = torch.searchsorted(ends.contiguous(), order, right=True)
        elif experts.ndim == 1 and tokens.ndim == 2:
            experts = experts[:, None]
        elif experts.ndim > tokens.ndim:
            self._trouble = f"{name} multiplies each row by several experts' weights"
            return
        label = tokens * (self._count + 1) + experts.to(tokens.device)
        features = rows.shape[1] if on_left else rows.shape[-1]
        self._read.append((label, rows.reshape(-1, features)))
        self._given.set(result, label)
        self._last.append(result)

    def rows(self, side: str, chosen: Tensor) -> Tensor:
        """[tokens, k, features]: what the chosen experts' products read (side "input"), or what the experts give.

        `chosen`: numbers of experts, [..., k]. Raises CaptureError where a chosen expert's row was not seen, or twice.
        """
        chosen = chosen.reshape(-1, chosen.shape[-1])
        found: list[tuple[Tensor, Tensor]]
        if side == "input":
            found = self._read
        else:
            last = ((self._given.get(t), t) for t in self._last)
            found = self._weighted or [(label, t) for label, t in last if label is not None]
        if self._trouble or not found or len(chosen) != self._positions:
            raise CaptureError(f"{self._parameter}: {self._trouble or self._unseen(found, chosen)}. {_ASK}")
        found = [(label, tensor) for label, tensor in found if label.numel()]  # an expert may have no token
        device = found[0][1].device
        labels = torch.cat([label.flatten() for label, _ in found]).to(device)
        values = torch.cat([tensor.reshape(label.numel(), -1) for label, tensor in found])
        tokens = torch.arange(len(chosen), device=device)[:, None]
        wanted = tokens * (self._count + 1) + chosen.to(device)
        in_order, order = labels.sort()
        places = torch.searchsorted(in_order, wanted.flatten())
        there = in_order[places.clamp_max(len(in_order) - 1)] == wanted.flatten()
        behind = in_order[(places + 1).clamp_max(len(in_order) - 1)] == wanted.flatten()
        twice = behind & (places + 1 < len(in_order))
        if not bool((there & ~twice).all()):
            what = (
                "some rows of chosen experts are not among those" if not bool(there.all()) else "rows came twice among"
            )
            raise CaptureError(f"{self._parameter}: {what} that its products read. {_ASK}")
        return values[order[places]].reshape(*chosen.shape, values.shape[-1])

    def _unseen(self, found: Sequence[Any], chosen: Tensor) -> str:
        if found:
            return f"the router chose experts for {len(chosen)} tokens, and the module was given {self._positions}"
        return "no product with it was seen: a kernel of a library computes these experts, or it is packed"
