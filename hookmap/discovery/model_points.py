"""The whole model's dataflow -> the points outside the blocks: embed, final_norm, logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from hookmap.discovery import aten
from hookmap.discovery.dataflow import ModuleCall, Operation
from hookmap.discovery.layer_list import LayerList
from hookmap.discovery.linear_steps import linear_path, norm_input, norm_source, steps
from hookmap.discovery.locate import Location, Locator
from hookmap.discovery.norm_scales import scale_of
from hookmap.discovery.values import Values
from hookmap.errors import DiscoveryError


@dataclass(frozen=True)
class Outside:
    """What the map says of the model around its blocks."""

    locations: dict[str, Location]
    unavailable: dict[str, str]
    embedding_path: str | None
    final_norm_path: str | None
    lm_head_path: str | None
    d_vocab: int | None
    normed: int | None
    """the value that the last norm reads; None where there is none"""


@dataclass(frozen=True)
class _Logits:
    """The model's logits."""

    place: Location | str
    """where they are, or why they are unavailable"""
    value: int | None = None
    """None where no output of the model is logits"""
    d_vocab: int | None = None
    lm_head_path: str | None = None


def logits_of(values: Values) -> int | None:
    """The tensor of logits among the model's outputs; None where there is none."""
    vocabulary = {values.shape(values.operands(op)[0])[0] for op in _lookups(values)}
    return _output_of_logits(values, values.flow.calls[0], vocabulary)


def read_outside(values: Values, layers: LayerList, seq: int) -> Outside:
    """Find the embedding of the token ids, the last norm and the logits."""
    root = values.flow.calls[0]
    locator = Locator(values, root, seq)
    lookups = list(_lookups(values))
    embed, embedding_path = _embedding(values, layers, locator, lookups)
    logits = _logits(values, locator, root, {values.shape(values.operands(op)[0])[0] for op in lookups})
    ends = [values.value(t) for t in root.outputs.values()] if logits.value is None else [logits.value]
    norm, normed = _final_norm(values, layers, ends)
    final_norm = _why_no_norm(values, layers, ends) if norm is None else _place_of_norm(locator, norm)
    scale = scale_of(locator, norm) if norm is not None else str(final_norm)
    places = {"embed": embed, "final_norm_scale": scale, "final_norm": final_norm}
    places |= {"logits_raw": _raw_logits(values, locator, logits), "logits": logits.place}
    return Outside(
        locations={name: place for name, place in places.items() if isinstance(place, Location)},
        unavailable={name: reason for name, reason in places.items() if isinstance(reason, str)},
        embedding_path=embedding_path,
        final_norm_path=None if isinstance(final_norm, str) else final_norm.terms[0].module,
        lm_head_path=logits.lm_head_path,
        d_vocab=logits.d_vocab,
        normed=normed,
    )


def _lookups(values: Values) -> Iterator[Operation]:
    """The operations, inside a module, that look the token ids up in a table."""
    ids = values.value(values.flow.inputs[values.flow.tokens])
    for op in values.flow.operations:
        if op.name == "embedding" and ids in map(partial(_uncast, values), values.operands(op)[1:]) and op.call >= 0:
            yield op


def _embedding(
    values: Values, layers: LayerList, locator: Locator, lookups: list[Operation]
) -> tuple[Location | str, str | None]:
    """Where the embedding of the token ids is, or why it is unavailable; and the path of its module."""
    into = _summands(values, layers.streams[layers.order[0]][0])
    added = [op for op in lookups if {values.value(op.outputs[0]), _looked_up(values, op)} & into]
    tables = {_around(values, op)[0].path: op for op in added or lookups}
    if len(tables) > 1 and added:
        return f"several tables are looked up, and they are summed: {', '.join(tables)}", None
    for path, op in tables.items():
        location = locator.locate(_looked_up(values, op))
        if location is not None:
            return location, path
    missing = "no module looks the token ids up in a table of embeddings as they are"
    return missing, next(reversed(tables), None)


def _summands(values: Values, value: int) -> set[int]:
    """All that a value is a sum, a multiple, a norm of."""
    found, stack = set(), [value]
    while stack:
        if (top := stack.pop()) not in found:
            found.add(top)
            for step in steps(values, top):
                stack += [step.source] if step.branch is None else [step.source, step.branch]
    return found


def _looked_up(values: Values, op: Operation) -> int:
    """What the embedding module gives, where it only scales or norms the rows; else the rows."""
    call = _around(values, op)[0]
    rows = values.value(op.outputs[0])
    given = [values.value(t) for t in call.outputs.values()]
    simple = not any(other.name in aten.PRODUCTS for other in values.inside(call))
    return given[0] if simple and len(given) == 1 and values.size(given[0]) == values.size(rows) else rows


def _uncast(values: Values, value: int) -> int:
    """The same ids before a cast or a transposition."""
    while (op := values.producers.get(value)) is not None and op.name in {"_to_copy", *aten.TURNS}:
        value = values.operands(op)[0]
    return value


def _around(values: Values, op: Operation) -> list[ModuleCall]:
    """The calls around an operation, innermost first."""
    calls, index = [], op.call
    while index is not None and index >= 0:
        calls.append(values.flow.calls[index])
        index = calls[-1].parent  # type: ignore[assignment]
    return calls


def _logits(values: Values, locator: Locator, root: ModuleCall, vocabulary: set[int]) -> _Logits:
    """The root's logits, and the module that computes them."""
    tensor = _output_of_logits(values, root, vocabulary)
    if tensor is None:
        return _Logits("none of the model's outputs is called logits or is as wide as its vocabulary")
    value, shape = values.value(tensor), values.flow.tensors[tensor].shape
    if shape[0] != 1:
        return _Logits(f"the model gives {shape[0]} rows of logits for each sequence", value, shape[-1])
    if locator.seq not in shape[:-1]:
        if len(shape) > 2:
            raise DiscoveryError(
                f"the model was given {locator.seq} tokens, and its logits, {list(shape)}, are of "
                "other positions. The blocks that read the tokens are not those that make the logits."
            )
        missing = f"the model gives no logits for each position: their shape is {list(shape)}"
        return _Logits(missing, value)
    # The model's own output, and not the unembedding's: in half precision a cast stands between the two.
    return _Logits(locator.at_root(value), value, shape[-1], _unembedding(values, root, value))


def _raw_logits(values: Values, locator: Locator, logits: _Logits) -> Location | str:
    """The logits as the unembedding gives them: behind its product and its bias."""
    if isinstance(logits.place, str) or logits.value is None:
        return str(logits.place)
    raw = value = logits.value
    while (op := values.producers.get(value)) is not None and op.name not in aten.PRODUCTS:
        varying = [v for v in values.operands(op) if not values.is_constant(v)]
        if not varying:
            return "no product with weights makes the logits"
        if op.name in ("add", "sub") and len(varying) > 1:
            return "several products make the logits together"
        value = varying[0]
        if op.name not in aten.MOVES | {"add", "sub"}:
            raw = value
    if raw == logits.value:
        return logits.place
    alike = list(locator.before_widening(raw))
    for place in (place for each in alike for place in locator.places(each)):
        if place.shape[-1] == logits.d_vocab:
            return locator.at(place)
    return locator.why_nowhere(*reversed(alike))


def _unembedding(values: Values, root: ModuleCall, value: int) -> str | None:
    """The path of the module that computes the last product with weights; None where it is the model itself."""
    while (op := values.producers.get(value)) is not None:
        varying = [v for v in values.operands(op) if not values.is_constant(v)]
        if op.name in aten.PRODUCTS and len(varying) < len(op.inputs):
            calls = _around(values, op)
            return calls[0].path if calls and calls[0] is not root else None
        if not varying:
            return None
        value = varying[0]
    return None


def _output_of_logits(values: Values, root: ModuleCall, vocabulary: set[int]) -> int | None:
    """The output that is named so; else the first that has the width of the vocabulary."""
    for name in ("logits", "prediction_logits"):
        if name in root.outputs:
            return root.outputs[name]
    shapes = {tensor: values.flow.tensors[tensor].shape for tensor in root.outputs.values()}
    return next((tensor for tensor, shape in shapes.items() if shape and shape[-1] in vocabulary), None)


def _place_of_norm(locator: Locator, norm: int) -> Location | str:
    return locator.locate(norm) or "no module boundary exposes what the last norm gives"


def _why_no_norm(values: Values, layers: LayerList, ends: list[int]) -> str:
    """Why no norm is the last one of the stream: there is none, or it reads what was made of the stream (Inkling 2)."""
    end = layers.last.exit
    behind = replace(values.flow.calls[0], enter=end)
    after = sorted((op for op in values.flow.operations if op.time > end), key=lambda op: -op.time)
    for value in (values.value(tensor) for op in after for tensor in op.outputs):
        passed = norm_source(values, value) is not None and values.size(value) == values.size(layers.end)
        mixed = passed and values.sources(value, [layers.end], behind)
        if mixed and layers.end not in _ancestors(values, ends, end, without=value):
            given = [e.call for e in values.exposures.get(_uncast(values, value), []) if e.side == "output"]
            inner = max(given, key=lambda call: call.enter, default=None)
            name = "" if inner is None else f", {inner.path},"
            return (
                f"the last norm{name} does not read the stream as the last block leaves it: it reads what the model "
                "makes of it and of other tensors"
            )
    return "no norm stands after the last block: use resid_post of the last layer"


def _final_norm(values: Values, layers: LayerList, ends: list[int]) -> tuple[int | None, int | None]:
    """The last norm that the stream itself passes between the last block and whatever weights come next; what it reads.

    `ends`: the logits, or what else the model gives; a norm that does not lead there is another head's.
    """
    last = layers.calls[layers.order[-1]]
    leave, end = layers.end, last.exit
    made = _ancestors(values, ends, end)
    if leave not in made:  # of a reversible block, it may be the other stream that leads on
        leave = next((v for v in map(values.value, last.outputs.values()) if v in made), leave)
    leading = {value for value in made if value in values.producers and values.producers[value].time > end}
    normed, value = None, _next_norm(values, leave, end, leading)
    while value is not None:
        normed, value = value, _next_norm(values, value, end, leading)
    if normed is None or leave in _ancestors(values, ends, end, without=normed):
        # Several streams are mixed by weights that a norm of their own makes; the last norm is behind them.
        rows = {value for value in leading if values.size(value) == layers.seq * layers.width}
        normed = _behind_mixing(values, ends, leave, end, rows)
        return normed, None if normed is None else norm_source(values, normed)
    return normed, leave


def _behind_mixing(values: Values, ends: list[int], leave: int, end: int, rows: set[int]) -> int | None:
    """The first norm, among `rows`, that all of the stream passes on its way to `ends`, and no weights before it."""
    for value in sorted(rows, key=lambda v: values.producers[v].time):
        source = norm_source(values, value)
        if source in rows and leave not in _ancestors(values, ends, end, without=value):
            plain = leave in _ancestors(values, [source], end, heavy=False)
            plain = plain or bool(linear_path(values, values.flow.calls[0], leave, source, gathers=True))
            return _next_norm(values, source, end, rows) if plain else None
    return None


def _ancestors(
    values: Values, ends: list[int], after: int, *, without: int | None = None, heavy: bool = True
) -> set[int]:
    """All that any of `ends` is made of, other than by way of `without`, or of products with weights unless `heavy`.

    It goes back to the first values that were there before `after`, and includes them.
    """
    found: set[int] = set()
    stack = list(ends)
    while stack:
        top = stack.pop()
        if top in found or top == without:
            continue
        found.add(top)
        op = values.producers.get(top)
        if op is not None and op.time > after and (heavy or op.name not in aten.PRODUCTS):
            stack += values.operands(op)
    return found


def _next_norm(values: Values, value: int, after: int, leading: set[int]) -> int | None:
    """The norm of a value, among those of `leading`."""
    for exposure in values.exposures.get(value, []):
        if exposure.side == "input" and exposure.call.enter > after and norm_input(values, exposure.call) == value:
            normed = values.value(next(iter(exposure.call.outputs.values())))
            if normed in leading:
                return normed
    for op in values.consumers.get(value, []):
        result = values.value(op.outputs[0]) if op.outputs else value
        if result != value and op.name in {"_to_copy", *aten.TURNS} and result in leading:
            return _next_norm(values, result, after, leading)
    later = [v for v in leading if v != value and norm_source(values, v) == value]
    return max(later, key=lambda v: values.producers[v].time, default=None)
