"""How a tensor becomes a point's: axes taken apart, heads multiplied. Uses nothing but tensors' own methods."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any


def unmerged(tensor: Any, axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[Any, list[str]] | str:
    """The tensor with each axis such as `batch*heads` as several, and their names; or what does not fit.

    `sizes`: of those that are known; all but one of them in each axis.
    """
    found: list[str] = []
    for name in axes:
        parts = name.split("*")
        if len(parts) > 1:
            known = [sizes[part] for part in parts if part in sizes]
            if tensor.shape[len(found)] % prod(known):
                return f"{tensor.shape[len(found)]} {name} of {' x '.join(map(str, known))}"
            tensor = tensor.unflatten(len(found), [sizes.get(part, -1) for part in parts])
        found += parts
    return tensor, found


def is_matrix(weight: Any) -> bool:
    """Whether its numbers are those of a matrix, and not packed."""
    return bool(weight.is_floating_point()) and weight.element_size() > 1 and weight.ndim == 2


def of_each_head(tensor: Any, matrix: Any) -> Any:
    """[batch, pos, heads, d_head] times [heads * d_head, d_model] -> [batch, pos, heads, d_model]."""
    rows = tensor.flatten(0, 1).movedim(1, 0)  # [heads, batch * pos, d_head]
    products = rows @ matrix.to(tensor.dtype).unflatten(0, tensor.shape[2:])
    return products.movedim(0, 1).unflatten(0, tensor.shape[:2])
