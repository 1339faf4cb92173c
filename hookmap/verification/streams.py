"""Checks of the residual stream: shapes, order, the ends, and the states that Hugging Face itself records."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from hookmap.loading import other_inputs
from hookmap.maps.layer_order import text_of
from hookmap.maps.points import PointName
from hookmap.verification.check import Check, relative_error
from hookmap.verification.context import Context, input_embedding
from hookmap.verification.runner import Given

NOTHING_RECORDED = "the model returns no hidden states to compare with"


def shapes(run: Context) -> Iterator[Check]:
    """Every point was reached and is [batch, pos, ...]; the stream has one width."""
    wrong = [f"{s} was not reached" for s in run.selectors if s not in run.every]
    for s, tensor in run.every.items():
        if tensor.shape[:2] != (run.given.batch, run.given.positions):
            expected = f"[{run.given.batch}, {run.given.positions}, …]"
            wrong.append(f"{s.point}[{s.layer}] has shape {list(tensor.shape)}, expected {expected}")
    widths = {tensor.shape[-1] for s, tensor in run.every.items() if s.point.startswith("resid_")}
    if len(widths) > 1:
        wrong.append(f"the residual stream has several widths: {sorted(widths)}")
    yield Check("shapes", (), not wrong, "; ".join(wrong[:5]) or f"{len(run.every)} tensors are [batch, pos, d]")


def order(run: Context) -> Iterator[Check]:
    """The promised order is the order in which the boundaries were crossed."""
    place = {crossing: number for number, crossing in reversed(list(enumerate(run.crossings)))}
    wrong, last, last_name = [], -1, ""
    for selector in run.selectors:
        if any(term.is_inside for term in selector.terms):
            continue  # between boundaries: its module's own code is not watched here
        here = max(place.get((term.module, term.side, term.call or 0), -1) for term in selector.terms)
        name = f"{selector.point}{list(selector.key[1:])}"
        if here < last:
            wrong.append(f"{name} comes before {last_name}")
        last, last_name = max(last, here), name
    detail = "; ".join(wrong[:5]) or f"{len(run.selectors)} selectors are in the order of the forward pass"
    yield Check("order", (), not wrong, detail)


def runs(run: Context) -> Iterator[Check]:
    """The layers run as often as the map says, and in its order; nothing is said where each runs once."""
    known = {layer for kind in run.map.kinds if kind.points for layer in kind.layers}
    expected = [layer for layer, _ in run.map.order if layer in known]
    found = [layer for layer in run.layers_run if layer in known]
    if found != expected or len(expected) > len(known):
        detail = f"the layers run in the order {text_of(found)}"
        said = "" if found == expected else f", the map says {text_of(expected)}"
        yield Check("runs", (), found == expected, detail + said)


def hidden_states(run: Context) -> Iterator[Check]:
    """`resid_pre` is Hugging Face's `hidden_states[i]`; some models record after the block instead."""
    if not hasattr(run.output, "hidden_states"):
        return  # not an output of transformers, which has this field even where it is empty
    layers = run.layers_with("resid_pre")
    if run.map.part and not run.output.hidden_states:
        return
    if not run.output.hidden_states or not layers:
        yield Check("hidden_states", (), not layers, NOTHING_RECORDED)
        return
    states = [_batch_first(run.given, state) for state in run.output.hidden_states]
    if other_inputs.demands_more(run.model) and all(state.shape[1] != run.given.positions for state in states):
        yield Check("hidden_states", (), True, "the model records the hidden states of its picture, not of its tokens")
        return
    if run.map.left_out and len(states) > run.map.num_layers + 1:
        yield _among(run, states, layers)
    else:
        yield _layer_by_layer(run, states, layers)


def _layer_by_layer(run: Context, states: list[Tensor], layers: list[int]) -> Check:
    """Compare each run of each layer with the state that was recorded then.

    A layer that is not called records nothing, and one that runs twice records twice: the k-th state is of the k-th
    run.
    """
    if len(states) - len(run.visits) not in (0, 1):  # one for each run of each layer, and what the stack leaves
        detail = f"the model records {len(states)} hidden states, and the map's layers run {len(run.visits)} times"
        return Check("hidden_states", tuple(layers), False, detail)
    recorded = {visit: state for visit, state in zip(run.visits, states, strict=False) if visit[0] in layers}
    before = [
        min(relative_error(each, state) for each in _entering(run, place))
        for place, state in zip(map(run.visits.index, recorded), recorded.values(), strict=True)
    ]
    following = dict(zip(recorded, [*list(recorded)[1:], None], strict=True))
    after = [
        relative_error(run.states.get(_after(visit, following[visit])), state) for visit, state in recorded.items()
    ]
    recorded_after = max(before) > run.tolerance and max(after) <= run.tolerance
    errors, point = (after, "resid_pre[i + 1]") if recorded_after else (before, "resid_pre[i]")
    wrong = [layer for (layer, _), error in zip(recorded, errors, strict=True) if error > run.tolerance]
    detail = f"{point} differs from hidden_states[i] on layers {wrong}" if wrong else f"{point} = hidden_states[i]"
    if recorded_after:
        detail += " (this model records them after the block)"
    return Check("hidden_states", tuple(layers), not wrong, detail, max(errors))


def _after(visit: tuple[int, int], following: tuple[int, int] | None) -> tuple[str, int, int]:
    """What a layer leaves: what the next one is given, or its own output, of the last."""
    return ("resid_post", *visit) if following is None else ("resid_pre", *following)


def _entering(run: Context, place: int) -> list[Tensor | None]:
    """The states that may be recorded when the layer at this place of the order runs.

    Where the model adds something to the stream between the blocks, what the block before it left counts, too.
    """
    here = run.visits[place]
    found = [run.states.get(("resid_pre", *here))]
    if place and not run.map.is_joined((before := run.visits[place - 1])[0], here[0]):
        found.append(run.states.get(("resid_post", *before)))
    return found


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
            given = embedding(run.given.ids)
        expected = given[0] if isinstance(given, tuple) else given  # I-BERT's gives a factor too
        yield run.equal("embed", (), "embed = the input embedding's output", run.values["embed", None], expected)


def logits(run: Context) -> Iterator[Check]:
    """`logits` are what the model returns."""
    if ("logits", None) in run.values and getattr(run.output, "logits", None) is not None:
        yield run.equal("logits", (), "logits = the model's logits", run.values["logits", None], run.output.logits)


def hand_over(run: Context) -> Iterator[Check]:
    """What a block leaves is what the next block gets, or a constant times it; unless the map says otherwise."""
    handed = {
        (before, here): (run.states["resid_post", *before], run.states["resid_pre", *here])
        for before, here in pairwise(run.visits)
        if ("resid_post", *before) in run.states and ("resid_pre", *here) in run.states
    }
    apart = {
        pair: relative_error(left, got)
        for pair, (left, got) in handed.items()
        if not run.map.is_joined(pair[0][0], pair[1][0])
    }
    if apart:
        layers = tuple(dict.fromkeys(before[0] for before, _ in apart))
        detail = "the model adds to the stream between blocks: resid_pre[i + 1] is not resid_post[i]"
        # In some of their runs it may change nothing: of tokens that keep their state once they halted, none had.
        most: dict[tuple[int, int], float] = {}
        for (before, here), error in apart.items():
            most[before[0], here[0]] = max(error, most.get((before[0], here[0]), 0.0))
        yield Check("hand-over", layers, min(most.values()) > run.tolerance, detail)
    factors = {pair: _factor(left, got) for pair, (left, got) in handed.items() if pair not in apart}
    joined = {pair: relative_error(handed[pair][0] * factor, handed[pair][1]) for pair, factor in factors.items()}
    if joined:
        layers = tuple(dict.fromkeys(before[0] for before, _ in joined))
        multiples = sorted({f"{factor:g} times" for factor in factors.values() if factor != 1.0})
        detail = "resid_pre[i + 1] = resid_post[i]" + (f", or {', '.join(multiples)} it" if multiples else "")
        yield Check("hand-over", layers, max(joined.values()) <= run.tolerance, detail, max(joined.values()))


def final_norm(run: Context) -> Iterator[Check]:
    """`final_norm` is Hugging Face's last hidden state, or else what the norm makes of the last `resid_post`."""
    if (found := run.values.get(("final_norm", None))) is None:
        return
    states = getattr(run.output, "hidden_states", None)
    error = relative_error(found, _batch_first(run.given, states[-1])) if states else float("inf")
    detail = "final_norm = hidden_states[-1]"
    visits = [visit for visit in run.visits if run.map.kind_of(visit[0]).points]
    last = run.states.get(("resid_post", *visits[-1])) if visits else None
    if last is None and not states:
        return  # there is nothing to hold it against
    unnormed = last is not None and relative_error(last, found) <= run.tolerance
    if not states and last is not None and last.shape != found.shape:
        return  # several streams are mixed before the norm, and the model gives nothing to hold the result against
    if last is not None and run.map.final_norm_path and (error > run.tolerance or unnormed):
        detail, expected = _norm_of_last(run, run.map.final_norm_path, last, found)
        error = relative_error(found, expected)
        if (before := run.map.between.get(f"{run.visits[-1][0]} -> final_norm")) is not None:
            detail = f"final_norm is not of resid_post[-1] alone, but of {before}"
            yield Check("final_norm", (), error > run.tolerance and not unnormed, detail)
            return
    yield Check("final_norm", (), error <= run.tolerance, detail, error)


def _norm_of_last(run: Context, norm: str, last: Tensor, found: Tensor) -> tuple[str, Tensor]:
    """What `final_norm` should be where it is not a recorded state, and that in words."""
    streams = last.shape != found.shape  # several, which the model mixes into one before the norm
    base = getattr(run.model, "base_model", None)
    detail = "final_norm = last_hidden_state" if streams else f"final_norm = {norm}(resid_post[-1])"
    with torch.no_grad():
        if streams and base is not None:
            return detail, _batch_first(run.given, base(run.given.ids).last_hidden_state)
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


def _batch_first(given: Given, state: Tensor) -> Tensor:
    """A recorded hidden state as [batch, pos, ...], also of a model that keeps its stream in another order."""
    lengths = list(state.shape)
    if given.batch == 1 and lengths[:1] == [given.positions]:
        return state.unsqueeze(0)
    if lengths[:2] == [given.batch, given.positions] or not {given.batch, given.positions} <= set(lengths):
        return state
    return state.movedim((lengths.index(given.batch), lengths.index(given.positions)), (0, 1))
