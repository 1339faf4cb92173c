"""What the shapes of the residual stream say of a list: which blocks are not of the tokens, and what no map can say."""

from __future__ import annotations

from collections.abc import Iterator

from hookmap.discovery import aten
from hookmap.discovery.layer_list import LayerList
from hookmap.discovery.locate import has_batch
from hookmap.discovery.values import Values
from hookmap.maps.describe import layers_text


def of_other_lengths(values: Values, layers: LayerList) -> dict[int, str]:
    """Number of each block that runs on other positions than the stream has -> the reason."""
    found: dict[int, str] = {}
    for run, call in layers.calls.items():
        shapes = [values.shape(tensor) for tensor in call.entered.values()]
        lengths = {shape[1] for shape in shapes if len(shape) == 3}
        if run not in layers.streams and lengths and layers.seq not in lengths:
            found[run[0]] = (
                f"it runs on {max(lengths)} positions where the others have {layers.seq}: they are no tokens"
            )
    return found


def contradictions(values: Values, layers: LayerList) -> Iterator[str]:
    """Why a map cannot say how the stream lies in memory."""
    yield from _widths(values, layers)
    shape = _shape(values, layers)
    if layers.seq not in shape[:-1]:
        yield (
            f"the blocks {layers.path} keep positions behind features: they are given {list(shape)} for one sequence "
            f"of {layers.tokens} tokens. Expected features in the last axis, such as [batch, pos, d_model]."
        )
        return
    if len(shape) > 2 and not has_batch(shape, layers.seq):
        yield (
            f"the blocks {layers.path} are given {list(shape)} for one sequence of {layers.tokens} tokens: several "
            "rows of the batch are of one sequence, such as copies of the stream, and a map cannot say which row is "
            "whose. Expected one row for each sequence; streams side by side have an axis of their own."
        )
    if len(shape) == 2 and _is_turned(values, layers):
        yield (
            f"the blocks {layers.path} hold positions and sequences in one axis, positions first: [pos * batch, "
            "d_model]. Expected [batch * pos, d_model], or two axes."
        )


def _widths(values: Values, layers: LayerList) -> Iterator[str]:
    numbers: dict[int, list[int]] = {}
    for (number, _), stream in layers.streams.items():
        for value in stream:
            numbers.setdefault(values.size(value) // layers.seq, []).append(number)
    if len(numbers) > 1:
        said = ", ".join(f"{width} in {layers_text(those)}" for width, those in numbers.items())
        yield (
            f"the stream through the blocks {layers.path} has several widths: {said}. A map has one. Expected blocks "
            "that hand on a tensor of one shape."
        )


def _shape(values: Values, layers: LayerList) -> tuple[int, ...]:
    """The shape of the stream as the first block is given it."""
    run = layers.order[0]
    entry = layers.streams[run][0]
    given = [values.flow.tensors[t].shape for t in layers.calls[run].entered.values() if values.value(t) == entry]
    return given[0] if given else values.shape(entry)


def _is_turned(values: Values, layers: LayerList) -> bool:
    """Whether positions were put before the batch on the way to the first block."""
    stack, seen = [layers.streams[layers.order[0]][0]], set()
    while stack:
        if (top := stack.pop()) in seen:
            continue
        seen.add(top)
        op = values.producers.get(top)
        if op is not None:
            if op.name in aten.TURNS and values.flow.tensors[op.outputs[0]].shape[:2] == (layers.seq, 1):
                return True
            stack += values.operands(op)
    return False
