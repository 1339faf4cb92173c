"""The metric of prompts that nothing is patched in, and how far it may differ between runs that say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookmap.analysis.metrics import Bound, read_logits
from hookmap.capture.finiteness import not_finite
from hookmap.capture.interventions.functions import At
from hookmap.errors import InterventionError
from hookmap.wording import counted

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

_ALONE = 4
"""the most prompts that run alone, too"""


@dataclass(frozen=True)
class Baselines:
    """Metrics of the prompts that are patched and of those that patches are from."""

    start: torch.Tensor
    """[pairs], float32"""
    source: torch.Tensor
    noise: float
    """of a mean over pairs"""


@dataclass(frozen=True)
class _Measured:
    value: float
    moves: float
    """how much the value changes at most for a given relative change of all logits"""
    dtype: torch.dtype
    """of the logits"""


def baselines(hm: Hooked, start: Bound, source: Bound, together: int) -> Baselines:
    """`together`: how many prompts run together later.

    Raises CaptureError where a prompt's metric is not finite, and InterventionError where the metric of both sides is
    the same within its noise.
    """
    count = len(start.prompts)
    numbers = [*range(count)]
    alone = _measured(hm, start, numbers[:_ALONE], 1)
    batched = _measured(hm, start, [n % count for n in range(max(together, count))], together)
    other = _measured(hm, source, numbers, 1 if count == 1 else together)
    for bound, found in ((start, alone), (start, batched), (source, other)):
        for number, each in enumerate(found):
            if not torch.tensor(each.value).isfinite():
                raise not_finite(hm, bound.prompts[number % count], "sweep")
    apart = max(abs(each.value - alone[n % count].value) for n, each in enumerate(batched) if n % count < len(alone))
    first = [*alone, *batched[len(alone) : count]]
    eps = _eps(hm, first[0].dtype)
    moves = sum(each.moves for each in (*first, *other)) / count
    values = [torch.tensor([each.value for each in found]) for found in (first, other)]
    made = Baselines(values[0], values[1], apart + eps / 2 * moves)
    _refuse_alike(made, start.name, eps)
    return made


def _refuse_alike(found: Baselines, name: str, eps: float) -> None:
    one, other = float(found.start.mean()), float(found.source.mean())
    if abs(one - other) > found.noise:
        return
    rounded = eps > torch.finfo(torch.float32).eps
    mean = f", a mean over {counted(len(found.start), 'pair')}" if len(found.start) > 1 else ""
    raise InterventionError(
        f"the {name} is {one:.6g} in the run that is patched and {other:.6g} in that which the patch is from{mean}, "
        f"and its noise is {found.noise:.2g}: a patch has nothing to bring back. Take prompts whose answers differ more"
        + (', or open the model in float32, which rounds less: dtype="float32" (--dtype float32).' if rounded else ".")
    )


def _measured(hm: Hooked, bound: Bound, numbers: Sequence[int], together: int) -> list[_Measured]:
    """The metric of these prompts, and what it depends on."""
    found: dict[int, _Measured] = {}

    def take(logits: torch.Tensor, at: At) -> None:
        with torch.enable_grad():
            leaf = (logits if logits.dtype == torch.float64 else logits.float()).detach().requires_grad_()
            value = bound(leaf, numbers[at.sample])
            moves = 0.0
            if value.requires_grad:
                (slope,) = torch.autograd.grad(value, leaf)
                moves = float((slope * leaf.detach()).abs().sum())
        found[at.sample] = _Measured(float(value.detach()), moves, logits.dtype)

    prompts = [bound.prompts[number] for number in numbers]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    how: dict[str, Any] = {"batch_size": together, "batch_tokens": together * longest}
    read_logits(hm, prompts, bound.positions, take, (), how)
    return [found[number] for number in range(len(numbers))]


def _eps(hm: Hooked, dtype: torch.dtype) -> float:
    """The machine epsilon of the dtype that the logits were computed in: models may cast them to a wider one later."""
    head = hm.root.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    dtypes = {dtype, weight.dtype if weight is not None and weight.is_floating_point() else dtype}
    return max(torch.finfo(each).eps for each in dtypes)
