"""Checks of the residual stream: shapes, order, the ends, and the states that Hugging Face itself records."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hookmap.activations import Key
from hookmap.maps.points import PointName
from hookmap.verification.check import Check, relative_error
from hookmap.verification.context import Context, input_embedding
from hookmap.verification.runner import BATCH, POSITIONS


def shapes(run: Context) -> Iterator[Check]:
    """Every point was reached and is [batch, pos, ...]; the stream has one width."""
    wrong = [f"{s} was not reached" for s in run.selectors if (s.point, s.layer) not in run.values]
    for (point, layer), tensor in run.values.items():
        if tuple(tensor.shape[:2]) != (BATCH, POSITIONS):
            wrong.append(f"{point}[{layer}] has shape {list(tensor.shape)}, expected [{BATCH}, {POSITIONS}, …]")
    widths = {tensor.shape[-1] for (point, _), tensor in run.values.items() if point.startswith("resid_")}
    if len(widths) > 1:
        wrong.append(f"the residual stream has several widths: {sorted(widths)}")
    yield Check("shapes", (), not wrong, "; ".join(wrong[:5]) or f"{len(run.values)} tensors are [batch, pos, d]")


def order(run: Context) -> Iterator[Check]:
    """The promised order is the order in which the boundaries were crossed."""
    place = {crossing: number for number, crossing in reversed(list(enumerate(run.crossings)))}
    wrong, last, last_name = [], -1, ""
    for selector in run.selectors:
        here = max(place.get((term.module, term.side, term.call or 0), -1) for term in selector.terms)
        name = f"{selector.point}[{selector.layer}]"
        if here < last:
            wrong.append(f"{name} comes before {last_name}")
        last, last_name = max(last, here), name
    detail = "; ".join(wrong[:5]) or f"{len(run.selectors)} selectors are in the order of the forward pass"
    yield Check("order", (), not wrong, detail)


def hidden_states(run: Context) -> Iterator[Check]:
    """`resid_pre` is Hugging Face's `hidden_states[i]`; some models record after the block instead."""
    if not hasattr(run.output, "hidden_states"):
        return  # not an output of transformers, which has this field even where it is empty
    layers = run.layers_with("resid_pre")
    if not run.output.hidden_states or not layers:
        yield Check("hidden_states", (), not layers, "the model returns no hidden states to compare with")
        return
    states = [_batch_first(state) for state in run.output.hidden_states]
    if run.map.left_out and len(states) > run.map.num_layers + 1:
        yield _among(run, states, layers)
    else:
        yield _layer_by_layer(run, states, layers)


def _layer_by_layer(run: Context, states: list[Tensor], layers: list[int]) -> Check:
    """Compare each layer with the state that was recorded when it ran.

    A layer that is not called records nothing, and one that runs twice records twice: the k-th state is of the k-th
    run.
    """
    places = {layer: run.layers_run.index(layer) for layer in layers if layer in run.layers_run}
    recorded = {layer: states[place] for layer, place in places.items() if place < len(states)}
    before = [
        min(relative_error(run.values.get(key), state) for key in _entering(run, layer))
        for layer, state in recorded.items()
    ]
    following = dict(zip(layers, [*layers[1:], None], strict=True))
    after = [
        relative_error(run.values.get(("resid_pre", following[i]), run.values.get(("resid_post", i))), state)
        for i, state in recorded.items()
    ]
    recorded_after = max(before) > run.tolerance and max(after) <= run.tolerance
    errors, point = (after, "resid_pre[i + 1]") if recorded_after else (before, "resid_pre[i]")
    wrong = [layer for layer, error in zip(recorded, errors, strict=True) if error > run.tolerance]
    detail = f"{point} differs from hidden_states[i] on layers {wrong}" if wrong else f"{point} = hidden_states[i]"
    if recorded_after:
        detail += " (this model records them after the block)"
    return Check("hidden_states", tuple(layers), not wrong, detail, max(errors))


def _entering(run: Context, layer: int) -> list[Key]:
    """The points that may be what a layer was given, in its first run.

    Where a loop begins or ends, the model may add something between the blocks: what the block before it left counts,
    too.
    """
    place = run.layers_run.index(layer)
    last = run.layers_run[place - 1] if place else layer
    calls = run.map.kind_of(layer).calls, run.map.kind_of(last).calls
    loop = calls[0] != calls[1] and last not in run.layers_run[: place - 1]
    return [("resid_pre", layer), *([("resid_post", last)] if loop else [])]


def _among(run: Context, states: list[Tensor], layers: list[int]) -> Check:
    """A model with several lists of blocks records the streams of all of them, one list behind the other.

    It records before each block, or after it: then the last state is after the final norm.
    """
    for point, own in (("resid_pre", layers), ("resid_post", layers[:-1])):
        errors = [[relative_error(run.values[point, layer], state) for state in states] for layer in own]
        places = [row.index(min(row)) for row in errors]
        worst = max(map(min, errors))
        if worst <= run.tolerance and places == list(range(places[0], places[0] + len(own))):
            detail = f"{point}[i] = hidden_states[i + {places[0]}] (the model records several lists of blocks)"
            return Check("hidden_states", tuple(own), True, detail, worst)
    return Check("hidden_states", tuple(layers), False, "the layers' streams are not among the hidden_states")


def embed(run: Context) -> Iterator[Check]:
    """`embed` is what the input embedding returns."""
    embedding = input_embedding(run.map, run.model)
    if ("embed", None) in run.values and embedding is not None:
        with torch.no_grad():
            expected = embedding(run.ids)
        yield run.equal("embed", (), "embed = the input embedding's output", run.values["embed", None], expected)


def logits(run: Context) -> Iterator[Check]:
    """`logits` are what the model returns."""
    if ("logits", None) in run.values and getattr(run.output, "logits", None) is not None:
        yield run.equal("logits", (), "logits = the model's logits", run.values["logits", None], run.output.logits)


def hand_over(run: Context) -> Iterator[Check]:
    """What a block leaves is what the next block gets, or a constant times it; unless the map says otherwise."""
    handed = {
        layer: (run.values["resid_post", layer], run.values["resid_pre", layer + 1])
        for layer in range(run.map.num_layers - 1)
        if ("resid_post", layer) in run.values and ("resid_pre", layer + 1) in run.values
        # The points are of a layer's first run, and the layer after a loop gets what the loop's last round left.
        if run.map.kind_of(layer).calls == run.map.kind_of(layer + 1).calls
    }
    if not handed:
        return
    factors = {layer: _factor(left, got) for layer, (left, got) in handed.items()}
    errors = [relative_error(left * factors[layer], got) for layer, (left, got) in handed.items()]
    if not run.map.joined:
        detail = "the model adds to the stream between blocks: resid_pre[i + 1] is not resid_post[i]"
        yield Check("hand-over", tuple(handed), min(errors) > run.tolerance, detail)
        return
    multiples = sorted({f"{factor:g} times" for factor in factors.values() if factor != 1.0})
    detail = "resid_pre[i + 1] = resid_post[i]" + (f", or {', '.join(multiples)} it" if multiples else "")
    yield Check("hand-over", tuple(handed), max(errors) <= run.tolerance, detail, max(errors))


def final_norm(run: Context) -> Iterator[Check]:
    """`final_norm` is Hugging Face's last hidden state, or else what the norm makes of the last `resid_post`."""
    if (found := run.values.get(("final_norm", None))) is None:
        return
    states = getattr(run.output, "hidden_states", None)
    error = relative_error(found, _batch_first(states[-1])) if states else float("inf")
    detail = "final_norm = hidden_states[-1]"
    last = run.values.get(("resid_post", run.map.num_layers - 1))
    unnormed = last is not None and relative_error(last, found) <= run.tolerance
    if last is not None and run.map.final_norm_path and (error > run.tolerance or unnormed):
        detail, expected = _norm_of_last(run, run.map.final_norm_path, last, found)
        error = relative_error(found, expected)
    yield Check("final_norm", (), error <= run.tolerance, detail, error)


def _norm_of_last(run: Context, norm: str, last: Tensor, found: Tensor) -> tuple[str, Tensor]:
    """What `final_norm` should be where it is not a recorded state, and that in words."""
    streams = last.shape != found.shape  # several, which the model mixes into one before the norm
    base = getattr(run.model, "base_model", None)
    detail = "final_norm = last_hidden_state" if streams else f"final_norm = {norm}(resid_post[-1])"
    with torch.no_grad():
        if streams and base is not None:
            return detail, _batch_first(base(run.ids).last_hidden_state)
        expected: Tensor = run.model.get_submodule(norm)(last)
        return detail, expected


def second_names(run: Context) -> Iterator[Check]:
    """`attn_in` is `mixer_in` of attention; `resid_mid` is what the next branch reads, where no norm is between."""
    names = {point: first for point, _ in run.values if (first := PointName.of(point).as_mixer()) != point}
    post = [kind for kind in run.map.kinds if kind.norm_placement == "post"]
    two = {layer for kind in post if kind.cross_attn is None for layer in kind.layers}
    three = {layer for kind in post if kind.cross_attn is not None for layer in kind.layers}
    every = set(range(run.map.num_layers))
    pairs = [(point, first, every) for point, first in sorted(names.items())]
    pairs += [("resid_mid", "mlp_in", two), ("resid_mid", "cross_attn_in", three), ("resid_mid.1", "mlp_in", three)]
    for point, first, among in pairs:
        layers = [layer for name, layer in run.values if name == point and layer in among]
        errors = [relative_error(run.values.get((first, layer)), run.values[point, layer]) for layer in layers]
        if errors:
            yield Check("name", tuple(layers), max(errors) <= run.tolerance, f"{point} = {first}", max(errors))


def _factor(left: Tensor, got: Tensor) -> float:
    """The constant that the model multiplies the stream by between two blocks (RWKV halves it); else 1."""
    if got.shape != left.shape:
        return 1.0
    ratio = float((got * left).sum() / left.square().sum().clamp_min(1e-12))
    return next((power for power in (0.5, 0.25, 2.0) if abs(ratio / power - 1) < 1e-5), 1.0)


def _batch_first(state: Tensor) -> Tensor:
    """A recorded hidden state as [batch, pos, ...], also of a model that keeps its stream in another order."""
    lengths = list(state.shape)
    if lengths[:2] == [BATCH, POSITIONS] or BATCH not in lengths or POSITIONS not in lengths:
        return state
    return state.movedim((lengths.index(BATCH), lengths.index(POSITIONS)), (0, 1))
