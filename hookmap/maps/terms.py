"""One tensor at the boundary of a module, an operation or its experts, and how it is read. Pure: no model, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from typing import Any, Literal

from hookmap.errors import CaptureError
from hookmap.maps.arranging import is_matrix, of_each_head, unmerged
from hookmap.maps.grammar import operation_text
from hookmap.maps.templates import Heads, boundary


class PlaceError(CaptureError):
    """A place that a run does not have."""

    def __init__(self, seen: str, why: str) -> None:
        super().__init__(f"{seen} {why}")
        self.seen = seen
        """what stands there, without a cause: nobody may have mapped it"""


@dataclass(frozen=True)
class Term:
    """One tensor at the boundary of a module, or of an operation in its forward, times a constant and a parameter.

    The term's share of the point is `times(tensor, parameter)`, of the arranged tensor.
    """

    module: str
    """path from the model's root, "" for the root"""
    side: Literal["input", "output"]
    index: int | str | None
    """place in the positional (int) or keyword (str) arguments, or in the output; None: the output is the tensor; of an
    operation, among its tensors"""
    scale: float = 1.0
    flat: bool = False
    """the module sees [batch * pos, d], not [batch, pos, d]"""
    axes: tuple[str, ...] | None = None
    """the tensor's axes there, where they are not (batch, pos, ...)"""
    rows: Literal["all", "first", "last"] = "all"
    """which positions are the tokens', where the tensor has more than the model was fed"""
    call: int | None = None
    """which call of the module in one forward pass, 0-based, where it is called several times"""
    heads: Heads | None = None
    """which features of the tensor's last axis are the point's heads"""
    weight: str | None = None
    """path of the parameter that the model multiplies it by: a number, or one for each feature"""
    calls: int | None = None
    """how often the module is called in one forward pass, of a layer that runs several times, where the map says it"""
    operation: str | None = None
    """the operator whose input or output it is, in the module's own forward"""
    occurrence: int | None = None
    """which operation of that name in it, 0-based; None: the only one"""
    visits: int | None = None
    """how many operations of that name the forward has, where that is known"""
    experts: str | None = None
    """path of the parameter with the weights of all experts: the term is what the products with it read or give, as
    rows [batch * pos, k, ...] of the chosen experts"""
    chosen: "Term | None" = None
    """where the router's choice is, of a term with `experts`"""
    through: str | None = None
    """path of the parameter, perhaps with `.T`, that each head's features are multiplied by"""

    @cached_property
    def bare(self) -> bool:
        """Whether the tensor is the point's share of the model's own, [batch, pos, ...], as it lies there."""
        arranged = self.flat or self.axes is not None or self.rows != "all"
        return not arranged and self.scale == 1.0 and self.parameter is None and self.experts is None

    @property
    def at(self) -> str:
        """The module's path, and the operation or the experts in it: `model.layers.3.self_attn:bmm#1`."""
        if self.experts is not None:
            return f"{self.module}:{self.experts.removeprefix(f'{self.module}.')}"
        return self.module + operation_text(self.operation, self.occurrence)

    @property
    def is_view(self) -> bool:
        """Whether `resolve` gives a view that the model has not: heads of a tensor. No gradient flows through it."""
        return self.heads is not None

    @property
    def is_inside(self) -> bool:
        """Whether it is no module's input or output, but seen in the module's forward."""
        return self.operation is not None or self.experts is not None

    @property
    def parameter(self) -> str | None:
        """Path of the parameter whose value `times` needs."""
        return self.weight if self.through is None else self.through.removesuffix(".T")

    def resolve(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The unscaled tensor, given what a plain PyTorch forward hook of `module` sees.

        Of an operation, `args` are its tensors, and `output` what it gave. Where `is_view`, `retain_grad` belongs on
        `whole`. Raises CaptureError where the arguments or the output have no such place.
        """
        whole = self.whole(args, kwargs, output)
        return whole if self.heads is None else self._split(whole, self.heads)

    def view(self, whole: Any) -> Any:
        """What `resolve` gives of the whole tensor; of the whole tensor's gradient, the gradient of that."""
        return whole if self.heads is None else self._split(whole, self.heads)

    def whole(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        """The tensor as the model has it, which gradients flow through; `resolve` may give a view of part of it."""
        where: Any
        if self.side == "input":
            where = kwargs if isinstance(self.index, str) else args
            place = 0 if self.index is None else self.index
        elif self.index is None:
            return self._tensor(output)
        else:
            where, place = output, self.index
        if type(where) is not tuple and hasattr(where, "shape"):
            raise self._wrong(f"a bare tensor of shape {list(where.shape)}")
        try:
            if isinstance(place, str) and is_dataclass(where) and not isinstance(where, Mapping):
                return self._tensor(getattr(where, place))
            return self._tensor(where[place])
        except (LookupError, TypeError, AttributeError) as error:
            found = str(sorted(where)) if isinstance(where, Mapping) else type(where).__name__
            if isinstance(where, Sequence):
                found += f" of {len(where)}"
            raise self._wrong(found) from error

    def arrange(self, tensor: Any, batch: int, width: int) -> Any:
        """What `resolve` gave as `[batch, width, ...]`: a view of the `width` tokens that the model was fed."""
        if (self.flat or self.experts is not None) and tensor.shape[0] == batch * width:
            tensor = tensor.reshape(batch, width, *tensor.shape[1:])
        if self.axes is not None:
            found = unmerged(tensor, self.axes, {"batch": batch, "pos": width})
            if isinstance(found, str):
                raise self._wrong(found)
            tensor, axes = found
            tensor = tensor.movedim((axes.index("batch"), axes.index("pos")), (0, 1))
        if self.rows != "all" and tensor.shape[1] > width:
            tensor = tensor[:, :width] if self.rows == "first" else tensor[:, -width:]
        return tensor

    def times(self, tensor: Any, parameter: Any = None) -> Any:
        """`scale * tensor`, times what `parameter` is in the model: the parameter of `weight` or `through`."""
        if self.parameter is not None:
            if parameter is None:
                raise CaptureError(f"{self}: the value of {self.parameter} is needed, a parameter of the model.")
            own = parameter.detach().to(tensor.device)
            tensor = tensor * own if self.through is None else self._of_each_head(tensor, own)
        return tensor if self.scale == 1.0 else tensor * self.scale

    def _of_each_head(self, tensor: Any, weight: Any) -> Any:
        """[batch, pos, heads, d_head] -> [batch, pos, heads, d_model], by the parameter of `through`."""
        if not is_matrix(weight):
            raise CaptureError(
                f"{self}: {self.parameter} is packed (quantised), and has no rows to multiply by: take z."
            )
        return of_each_head(tensor, weight.T if str(self.through).endswith(".T") else weight)

    def _tensor(self, value: Any) -> Any:
        if not hasattr(value, "shape"):
            raise self._wrong(type(value).__name__)
        return value

    def _split(self, value: Any, heads: Heads) -> Any:
        """[..., width] -> [..., heads, d_head], a view."""
        pitch, rest = divmod(value.shape[-1], heads.groups)
        if rest or heads.stop > pitch:
            raise self._wrong(f"{value.shape[-1]} features, which do not hold {heads}")
        if value.ndim > 3:  # DeepSeek's keys and values have an axis of one beside the batch's
            value = value.flatten(0, -3)
        grouped = value.unflatten(-1, (heads.groups, pitch))[..., heads.start : heads.stop]
        return grouped.unflatten(-1, (-1, heads.d_head)).flatten(-3, -2)

    def _wrong(self, found: str) -> PlaceError:
        why = "The map was made for another version of this model: run `hookmap discover` again."
        if self.axes is not None and "key" in self.axes:
            why = 'Attention weights need eager attention: load the model with attn_implementation="eager".'
        where = f"as the {self.side}" if self.index is None else f"at index {self.index!r} of the {self.side}"
        return PlaceError(f"{self} is not there: expected a tensor {where}, found {found}.", why)

    def __str__(self) -> str:
        if self.experts is not None:
            return boundary(self.experts, self.side, None)
        module = (self.module or "model") + operation_text(self.operation, self.occurrence)
        product = "" if self.through is None else f" @ {self.through.removeprefix(f'{self.module}.')}"
        return boundary(module, self.side, self.index, self.scale, weight=self.weight) + product
