"""The whole model's dataflow -> the points outside the blocks: embed, final_norm, logits."""

from __future__ import annotations

from dataclasses import dataclass, field

from hookmap.blocks import Stack
from hookmap.dataflow import ModuleCall, Operation
from hookmap.taps import Tap, Tapper
from hookmap.values import HEAVY, Values


@dataclass
class Outside:
    """What the map says of the model around its blocks."""

    taps: dict[str, Tap] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    embedding_path: str | None = None
    final_norm_path: str | None = None
    lm_head_path: str | None = None
    d_vocab: int | None = None


def read_outside(values: Values, stack: Stack, seq: int) -> Outside:
    """Find the embedding of the token ids, the last norm and the logits."""
    root = values.flow.calls[0]
    tapper = Tapper(values, root, seq)
    outside = Outside()
    _embedding(values, tapper, outside)
    _logits(values, tapper, root, outside)
    _final_norm(values, stack, tapper, outside)
    return outside


def _embedding(values: Values, tapper: Tapper, outside: Outside) -> None:
    ids = values.value(values.flow.inputs["input_ids"])
    for op in values.flow.operations:
        if op.name != "embedding" or ids not in values.operands(op)[1:]:
            continue
        calls = _around(values, op)
        if not calls:
            continue
        outside.embedding_path = calls[0].path
        value = values.value(op.outputs[0])
        tap = tapper.tap(value) or tapper.tap(values.value(next(iter(calls[0].outputs.values()))))
        if tap is not None:
            outside.taps["embed"] = tap
            return
    outside.unavailable["embed"] = "no module looks the token ids up in a table of embeddings"


def _around(values: Values, op: Operation) -> list[ModuleCall]:
    """The calls around an operation, innermost first."""
    calls, index = [], op.call
    while index is not None and index >= 0:
        calls.append(values.flow.calls[index])
        index = calls[-1].parent  # type: ignore[assignment]
    return calls


def _logits(values: Values, tapper: Tapper, root: ModuleCall, outside: Outside) -> None:
    """The root's `logits`, and the module that computes them."""
    named = {place: t for place, t in root.outputs.items() if place in ("logits", "prediction_logits", None, 0)}
    if not named:
        outside.unavailable["logits"] = "the model's output holds no logits"
        return
    value = values.value(named.get("logits", next(iter(named.values()))))
    outside.d_vocab = values.shape(value)[-1]
    # The model's own output and not the unembedding's: in half precision a cast stands between, in single none.
    outside.taps["logits"] = tapper.at_root(value)
    while (op := values.producers.get(value)) is not None:
        varying = [v for v in values.operands(op) if not values.is_constant(v)]
        if op.name in HEAVY and len(varying) < len(op.inputs):
            calls = _around(values, op)
            outside.lm_head_path = calls[0].path if calls and calls[0] is not root else None
            return
        if not varying:
            return
        value = varying[0]


def _final_norm(values: Values, stack: Stack, tapper: Tapper, outside: Outside) -> None:
    """The last norm that the stream itself passes between the last block and whatever weights come next."""
    leave, end = stack.streams[max(stack.streams)][1], stack.calls[max(stack.streams)].exit
    found: Tap | None = None
    value: int | None = leave
    while value is not None:
        value = _next_norm(values, value, end)
        tap = None if value is None else tapper.tap(value)
        found = tap or found
    if found is None:
        outside.unavailable["final_norm"] = "no norm stands after the last block: use resid_post of the last layer"
        return
    outside.taps["final_norm"] = found
    outside.final_norm_path = found.terms[0].module


def _next_norm(values: Values, value: int, after: int) -> int | None:
    """The norm of a value, computed later than `after`."""
    for exposure in values.exposures.get(value, []):
        if exposure.side == "input" and exposure.call.enter > after and values.norm_input(exposure.call) == value:
            return values.value(next(iter(exposure.call.outputs.values())))
    for op in values.consumers.get(value, []):
        result = values.value(op.outputs[0]) if op.time > after and op.outputs else value
        if result != value and op.name == "_to_copy":
            return _next_norm(values, result, after)
    later = [v for v, op in values.producers.items() if op.time > after and values.norm_source(v) == value]
    return max(later, key=lambda v: values.producers[v].time, default=None)
