"""Writing tensors with an axis of keys: an edit sees them as a capture does, key n being the sample's position n."""

from collections.abc import Callable, Sequence

import torch

from hookmap.capture.engines.collectors import by_position
from hookmap.capture.interventions.documents import Ablate, Function, Intervention, Patch, Scale
from hookmap.errors import InterventionError


def why_not_on_keys(given: Intervention) -> str | None:
    """Why such an intervention has no meaning for rows whose length differs from text to text; None where it has."""
    if isinstance(given, Scale | Patch | Function) or (isinstance(given, Ablate) and given.to == "zero"):
        return None
    kind = f"ablate to {given.to}" if isinstance(given, Ablate) else given.do
    return (
        f"{kind}: {given.point} has a row of keys, as many as the text has tokens: scale, ablate to zero, or patch it"
    )


def on_keys(
    rows: torch.Tensor, pads: Sequence[int], end: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`change` of [cells, ..., keys], where key n is the sample's position n; pads among the keys keep their values.

    pads: columns before the first token of each cell's sample. end: columns that the batch was fed.
    """
    aligned = torch.cat([by_position(rows[n : n + 1], end, own, end) for n, own in enumerate(pads)])
    new, out, first = change(aligned), rows.clone(), end - rows.shape[-1]
    for n, own in enumerate(pads):
        start = max(first, own)
        out[n, ..., start - first :] = new[n, ..., start - own : end - own]
    return out


def fitted(new: torch.Tensor, keys: int, what: str) -> torch.Tensor:
    """Rows of another run with as many keys. Raises InterventionError where that would lose some."""
    if bool(new[..., keys:].any()):
        raise InterventionError(f"{what}: the rows to be written see {new.shape[-1]} keys, and here are only {keys}.")
    new = new[..., :keys]
    return torch.nn.functional.pad(new, (0, keys - new.shape[-1]))
