"""Refuse to compute from values that are not finite: say where they first appear, and what helps."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hookmap.activations import Activation, Key, Sample
from hookmap.capture.engines import Engine
from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.run import device_of, running
from hookmap.errors import CaptureError
from hookmap.loading import generation as gen
from hookmap.loading.encoder_decoder import with_source
from hookmap.loading.finiteness import in_words, is_stream
from hookmap.loading.further_inputs import joined
from hookmap.loading.prompts import Prompt
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.selectors import select
from hookmap.stores.ledger import tensor_name


class Opened(Protocol):
    """What an opened model needs to run a prompt again."""

    @property
    def map(self) -> ArchitectureMap: ...
    @property
    def hooks(self) -> Engine: ...


def why_not_finite(engine: Engine, architecture_map: ArchitectureMap, prompt: Prompt | Sequence[int]) -> str | None:
    """Where the residual stream of a prompt is first not finite, and what helps; None where all of it is finite.

    Runs the prompt once more. The caller holds the lock of the model.
    """
    prompt = prompt if isinstance(prompt, Prompt) else Prompt("", tuple(prompt))
    first = _first(engine, architecture_map, prompt)
    return None if first is None else in_words(*first, engine.module)


def not_finite(hm: Opened, prompt: Prompt | Sequence[int], what: str) -> CaptureError:
    """The error to raise instead of computing `what` from the residual stream of this prompt."""
    with running(hm.hooks):
        found = why_not_finite(hm.hooks, hm.map, prompt)
    return CaptureError(f"no {what}: {found or 'its numbers are not finite, and in a second run they were'}.")


def check_rows(
    rows: torch.Tensor, run: Any, sample: Sample, key: Key, positions: Sequence[int | None], what: str
) -> None:
    """Raises CaptureError where `rows` of a capture or store, at these positions, are not finite."""
    bad = ~rows.flatten(1).isfinite().all(1)
    if not bool(bad.any()):
        return
    at = positions[int(bad.nonzero()[0])]
    where = "its mean" if at is None else f"position {at}"
    raise CaptureError(
        f"no {what}: the capture holds an infinity or nan in {tensor_name(key)} of sample {sample.sample}, first at "
        f"{where}. {kept_in(run)}"
    )


def kept_in(run: Any) -> str:
    """Advice for rows of a capture or store that are not finite."""
    settings = getattr(getattr(run, "manifest", None), "settings", {})
    if (dtype := settings.get("kept", {}).get("dtype")) is not None:
        return f"Its rows were kept in {dtype}: capture again with keep_dtype of a wider range, such as bfloat16."
    return "Capture again with the model in a dtype of a wider range (--dtype bfloat16), or leave such positions out."


def _first(engine: Engine, architecture_map: ArchitectureMap, prompt: Prompt) -> tuple[str, int, torch.dtype] | None:
    """The first tensor of the residual stream, in forward order, that is not finite: name, position, dtype."""
    selectors = select(architecture_map, [name for name in architecture_map.points if is_stream(name)], "all")
    found: dict[Key, tuple[str, int, torch.dtype]] = {}

    def take(activation: Activation) -> None:
        key = activation.key
        bad = ~activation.tensor.flatten(1).isfinite().all(1)
        if key not in found and bool(bad.any()):
            position = activation.start + int(bad.nonzero()[0])
            found[key] = (tensor_name(key), position, activation.tensor.dtype)

    length, device = len(prompt.token_ids), device_of(engine)
    given = torch.tensor([list(prompt.token_ids)], device=device)
    inputs: dict[str, Any] = {"input_ids": given}
    inputs |= joined([prompt.inputs], [length], [0], device, next(engine.root.parameters()).dtype)
    if gen.takes(engine.root, "attention_mask"):
        inputs["attention_mask"] = torch.ones_like(given)
    if gen.takes(engine.root, "use_cache"):
        inputs["use_cache"] = False
    inputs = with_source(engine.root, inputs, torch.Generator().manual_seed(0))
    observer = Observer(selectors, BatchLayout((0,), (length,), right=True), take)
    engine.forward(observer, inputs, None)
    observer.finish(length)
    return next((found[s.key] for s in selectors if s.key in found), None)
