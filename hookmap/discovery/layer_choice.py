"""Chooses the list of blocks that a map is of, and refuses a model that one list cannot describe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

from hookmap.discovery import aten, stream_shapes
from hookmap.discovery.added_outside import added_outside
from hookmap.discovery.blocks_without_modules import scattered
from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.joined_lists import joined
from hookmap.discovery.layer_list import LayerList, Numbered, Rows, additions, adds, chain, numbered_modules
from hookmap.discovery.linear_steps import has_weights, linear_path
from hookmap.discovery.mixing import mixing
from hookmap.discovery.model_points import logits_of
from hookmap.discovery.unnumbered_blocks import trimmed, worded_modules
from hookmap.discovery.values import Values
from hookmap.discovery.why_no_list import why_no_list
from hookmap.errors import DiscoveryError


def find_layers(values: Values, seq: int) -> LayerList:
    """The list of blocks of a model that ran on `seq` tokens: of the candidates, the one that adds most to the stream.

    Raises DiscoveryError where there is none, and where one list does not describe the model.
    """
    groups = numbered_modules(values)
    logits = logits_of(values)
    output = _computed_from(values, values.flow.calls[0].outputs.values() if logits is None else [logits])
    candidates = [_reaching(values, layers, output) for layers in _candidates(values, groups, seq, output)]
    best = max(candidates, key=lambda layers: _rank(values, layers))
    if best.end not in output:
        leading = _leading(values, groups, best, output)
        if leading is None and len(candidates) > 1:
            raise DiscoveryError(
                f"the longest list of blocks, {best.path}, does not lead to the output: what it computes only chooses. "
                "No other list hands a stream [batch, pos, d_model] on from block to block."
            )
        best = leading or best
    for reason in (*stream_shapes.contradictions(values, best), *_contradictions(values, best, candidates)):
        raise DiscoveryError(reason)
    lists = _outermost(list(_uncovered(values, best, groups, output)))
    alone = dict.fromkeys(re.sub(r"\.\d+$", ".{i}", path) for path in _alone(values, best, lists, output))
    found = replace(
        best,
        uncovered_lists=(*(each.path for each in lists), *alone),
        unread={**stream_shapes.of_other_lengths(values, best), **best.unread},
    )
    return found if found.seq == seq else replace(found, tokens=seq, rows=_rows_of_tokens(values, found, seq))


def _candidates(values: Values, groups: list[Numbered], seq: int, output: set[int]) -> list[LayerList]:
    """The lists that hand a stream of `seq` positions on; where there are none, of more positions."""
    lists: list[LayerList] = []
    for positions in _lengths(values, groups, seq):
        found = _lists(values, groups, positions)
        if any(count_adding(values, layers) for layers in found):
            # Where none leads to the output (those of a tower, say), blocks may give what is added behind them.
            outside = [] if _leads(found, output) else _outside(values, groups, positions, output)
            return outside or [*found, *joined(values, found)]
        linked = _lists(values, groups, positions, linked=True)
        blocks = scattered(values, positions, output) if positions == seq else None
        # Where no list has most of the additions, a block is made of what stands between its modules, too.
        if blocks is not None and all(2 * _total(values, each) <= _total(values, blocks) for each in linked):
            return [blocks]
        if any(count_adding(values, layers) for layers in linked):
            return [*linked, *joined(values, linked)]
        if outside := _outside(values, groups, positions, output):
            return outside
        lists = lists or found
    if lists:
        return lists
    raise DiscoveryError(why_no_list(values, groups, seq))


def _outside(values: Values, groups: list[Numbered], seq: int, output: set[int]) -> list[LayerList]:
    return [layers for layers in added_outside(values, groups, seq) if layers.end in output]


def _leads(lists: list[LayerList], output: set[int]) -> bool:
    return any(leave in output for layers in lists for _, leave in layers.streams.values())


def _lists(values: Values, groups: list[Numbered], seq: int, linked: bool = False) -> list[LayerList]:
    """The numbered lists that hand a stream on, and modules under words that add to one; `linked`: see `chain`."""
    chains = [(group, chain(values, group, seq, linked)) for group in groups]
    found = [trimmed(values, group, layers, linked) for group, layers in chains if layers is not None]
    adding = [list(layers.calls.values()) for layers in found if count_adding(values, layers)]
    worded = worded_modules(values, seq, adding)
    found += [layers for group in worded if (layers := chain(values, group, seq, linked)) is not None]
    return [layers for layers in found if not any(_are_its_branches(values, layers, each) for each in found)]


def _reaching(values: Values, layers: LayerList, output: set[int]) -> LayerList:
    """The list without the streams of blocks that do not lead to the output, where others of it do."""
    # Of a reversible block, it may be the other stream that leads on.
    reaching = {
        number
        for (number, run), (_, leave) in layers.streams.items()
        if output & {leave, *map(values.value, layers.calls[number, run].outputs.values())}
    }
    if not reaching:
        return layers
    reason = "it does not lead to the logits: what it computes is another output's"
    beside = {number: reason for number, _ in layers.streams if number not in reaching}
    streams = {run: stream for run, stream in layers.streams.items() if run[0] in reaching}
    return replace(layers, streams=streams, unread={**layers.unread, **beside})


def _are_its_branches(values: Values, inner: LayerList, outer: LayerList) -> bool:
    """Whether a list is the branches of one block: each adds once, and they are of different classes (T5) or roles."""
    calls = [call for (_, run), call in inner.calls.items() if run == 0]
    once = all(additions(values, inner.calls[n], stream) == 1 for n, stream in inner.streams.items())
    if not once or inner is outer or len(calls) < 2 or not _is_inside(inner, outer):
        return False
    mix = {bool(mixing(values, values.inside(call), inner.seq)) for call in calls}
    return len({type(call.module) for call in calls}) == len(calls) or len(mix) == len(calls)


def _lengths(values: Values, groups: list[Numbered], seq: int) -> list[int]:
    """Numbers of positions that the stream may have: the tokens', or more, where a model adds positions of its own.

    As many as an encoder reads are no decoder's.
    """
    lengths = _all_positions(values, groups)
    of_others = {
        values.flow.tensors[t].shape[1:2] for name, t in values.flow.inputs.items() if name != values.flow.tokens
    }
    return [seq, *sorted(length for length in lengths if length > seq and (length,) not in of_others)]


def lengths_of_streams(values: Values) -> list[int]:
    """Numbers of positions that the stream of a model may have whose inputs do not tell."""
    return sorted(_all_positions(values, numbered_modules(values)) - {1})


def _all_positions(values: Values, groups: list[Numbered]) -> set[int]:
    return set().union(*(_positions(values, group) for group in groups))


def _positions(values: Values, group: Numbered) -> set[int]:
    """The numbers of positions of what the modules give."""
    shapes = [values.shape(tensor) for call in group.calls.values() for tensor in call.outputs.values()]
    return {shape[-2] for shape in shapes if len(shape) == 3 or (len(shape) == 2 and values.flow.batchless)}


def _rank(values: Values, layers: LayerList) -> tuple[int, int, int, int]:
    """Blocks add to a stream; the steps of an MLP only hand a tensor on."""
    return (
        count_adding(values, layers),
        len(layers.numbers),
        -layers.path.count("."),
        -layers.first.enter,
    )


def count_adding(values: Values, layers: LayerList) -> int:
    """How many of the blocks add to the stream, in their first run."""
    first = [(layers.calls[run], stream) for run, stream in layers.streams.items() if run[1] == 0]
    return sum(additions(values, call, stream) > 0 for call, stream in first)


def _total(values: Values, layers: LayerList) -> int:
    """How many additions to the stream are in the blocks."""
    return sum(additions(values, layers.calls[run], stream) for run, stream in layers.streams.items())


def _leading(values: Values, groups: list[Numbered], best: LayerList, output: set[int]) -> LayerList | None:
    """The list that adds most to a stream which leads to the output, where the first choice does not; None: no such."""
    linked = [layers for each in groups if (layers := chain(values, each, best.seq, linked=True)) is not None]
    leading = [layers for layers in linked if len(layers.streams) > 1 and layers.end in output]
    return max(leading, key=lambda layers: (_total(values, layers), *_rank(values, layers)), default=None)


def _computed_from(values: Values, tensors: Iterable[int]) -> set[int]:
    """All values that tensors are computed from; not those by which others are only chosen (BLT's patches)."""
    found: set[int] = set()
    stack = [values.value(tensor) for tensor in tensors]
    while stack:
        value = stack.pop()
        if value in found or not values.flow.tensors[value].dtype.is_floating_point:
            continue
        found.add(value)
        op = values.producers.get(value)
        stack += values.operands(op) if op is not None else ()
    return found


# What is known of the chosen list -------------------------------------------------------------------------------------


def _uncovered(values: Values, best: LayerList, groups: list[Numbered], output: set[int]) -> Iterator[LayerList]:
    """Other lists, neither inside the blocks nor around them, whose blocks add to a stream that leads to the output."""
    blocks = best.calls.values()
    for group in groups:
        apart = all(a.exit < b.enter or b.exit < a.enter for a in group.calls.values() for b in blocks)
        lengths = _positions(values, group)
        if group.path == best.path or not apart or len(lengths) != 1:
            continue
        other = chain(values, group, lengths.pop())
        if other is not None and other.end in output and count_adding(values, other) == len(other.numbers):
            yield other


def _outermost(lists: list[LayerList]) -> list[LayerList]:
    """Those that are in no block of another."""
    return [each for each in lists if not any(_is_inside(each, other) for other in lists)]


def _alone(values: Values, best: LayerList, lists: list[LayerList], output: set[int]) -> Iterator[str]:
    """Modules apart from all lists, outermost first, that add to a stream of the same size as the blocks do."""
    spans = [(call.enter, call.exit) for layers in (best, *lists) for call in layers.calls.values()]
    for call in values.flow.calls:
        apart = all(call.exit < enter or exit < call.enter for enter, exit in spans)
        if apart and has_weights(values, call) and adds(values, call, best.seq):
            spans.append((call.enter, call.exit))
            if any(values.value(tensor) in output for tensor in call.outputs.values()):
                yield call.path


def _rows_of_tokens(values: Values, layers: LayerList, seq: int) -> Rows:
    """The first or the last positions of the stream, as the model cuts the tokens' out behind the blocks."""
    end = layers.last.exit
    for op in values.flow.operations:
        if op.name == "slice" and op.time > end and len(op.args) > 2:
            before, after = (values.shape(t)[op.args[1]] for t in (op.inputs[0], op.outputs[0]))
            if (before, after) == (layers.seq, seq):
                return "last" if op.args[2] else "first"
    raise DiscoveryError(
        f"the blocks {layers.path} have {layers.seq} positions for {seq} tokens, and nothing behind them says which "
        "of them belong to the tokens: expected a slice of the stream."
    )


# Models that one list does not describe -------------------------------------------------------------------------------


def _contradictions(values: Values, best: LayerList, candidates: list[LayerList]) -> Iterator[str]:
    """Why one list of blocks does not describe the model."""
    own = set(map(id, best.calls.values()))
    others = [
        other for other in candidates if own.isdisjoint(map(id, other.calls.values())) and count_adding(values, other)
    ]
    for other in (each for each in others if not _only_holds(each, best)):
        if len(other.numbers) > 1 and _is_inside(other, best):
            yield (
                f"each block of {best.path} holds a list of blocks, such as {other.path}: a map has one list. Put all "
                "blocks of the model into one list, or discover a part of the model."
            )
        elif _shares_the_stream(values, best, other):
            yield (
                f"the residual stream goes through several lists of blocks, {best.path} and {other.path}: a map has "
                "one. Put the blocks of the model into one list, or discover a part of the model."
            )
    if _is_split(values, best):
        yield (
            f"the residual stream crosses the blocks {best.path} in two tensors, which the next block adds: no module "
            "boundary between them exposes it. Expected blocks that hand on one tensor [batch, pos, d_model]."
        )
    if _asks_what_blocks_computed(values, best):
        yield (
            f"how often the blocks {best.path} run depends on the text: the model reads a number of what they "
            "computed, and one forward pass shows one depth. hookmap reads models that run the same blocks for "
            "every text: set a fixed depth in the model's config, if it has such a setting."
        )
    elif _draws_a_number(values, best):
        yield (
            f"how often the blocks {best.path} run is drawn at random: the model reads a random number, and another "
            "pass runs them at another depth. Set a fixed depth in the model's config, if it has such a setting."
        )
    elif _asks_what_tokens_are(values, best):
        yield (
            f"how often the blocks {best.path} run depends on the text, or may: they run several times, and the model "
            "reads a number of the tokens before them. hookmap reads models that run the same blocks for every text: "
            "set a fixed depth in the model's config, if it has such a setting."
        )


def _is_inside(inner: LayerList, outer: LayerList) -> bool:
    """Whether a list is in the blocks of another, with a stream of the same width."""
    return inner.width == outer.width and all(
        any(block.enter < call.enter and call.exit < block.exit for block in outer.calls.values())
        for call in inner.calls.values()
    )


def _only_holds(outer: LayerList, best: LayerList) -> bool:
    """Whether each block of a list is around blocks of the best one, which are all in one of its blocks.

    Of modules under words, such as an encoder and a decoder, one that is around them is enough.
    """
    around = [
        [call for call in best.calls.values() if block.enter < call.enter and call.exit < block.exit]
        for block in outer.calls.values()
    ]
    return (outer.worded or all(around)) and sum(map(len, around)) == len(best.calls)


def _shares_the_stream(values: Values, best: LayerList, other: LayerList) -> bool:
    """Whether the stream goes through another list too: around this one, before it, or behind it."""
    if _continues(values, best, other):
        return True
    if len(other.numbers) == 1:  # one module, such as a head, may stand around the blocks or before them
        return False
    around = any(c.enter < best.first.enter and best.last.exit < c.exit for c in other.calls.values())
    return around or _continues(values, other, best)


def _continues(values: Values, before: LayerList, after: LayerList) -> bool:
    """Whether the stream that leaves the last block of one list enters, by linear steps, the first of another."""
    last, first = before.order[-1], after.order[0]
    start, end = before.calls[last].exit, after.calls[first].enter
    if start > end:
        return False
    between = replace(before.calls[last], enter=start, exit=end)
    leave, entry = before.streams[last][1], after.streams[first][0]
    return leave == entry or bool(linear_path(values, between, leave, entry))


def _is_split(values: Values, layers: LayerList) -> bool:
    """Whether each block adds, to the stream, another tensor that the block before it made and handed on."""
    found = []
    for before, here in pairwise(layers.order):
        entered = map(values.value, layers.calls[here].entered.values())
        handed = {value for value in entered if values.made_in(value, layers.calls[before])}
        path = linear_path(values, layers.calls[here], *layers.streams[here])
        found.append(any(step.branch in handed for step in path))
    return bool(found) and all(found)


def _asks_what_tokens_are(values: Values, layers: LayerList) -> bool:
    """Whether the model, before blocks that run several times, reads a number that the tokens decide."""
    if len(layers.calls) == len({number for number, _ in layers.calls}):
        return False
    return any(
        op.name in ("_local_scalar_dense", "equal")
        and op.time < layers.first.enter
        and any(not values.is_constant(values.value(tensor), of_tokens=True) for tensor in op.inputs)
        for op in values.flow.operations
    )


def _draws_a_number(values: Values, layers: LayerList) -> bool:
    """Whether the model, outside its blocks, reads a number that was drawn at random."""
    blocks = list(layers.calls.values())
    return any(
        op.name in ("_local_scalar_dense", "equal")
        and not any(call.enter < op.time < call.exit for call in blocks)
        and any(_is_random(values, values.value(tensor)) for tensor in op.inputs)
        for op in values.flow.operations
    )


def _is_random(values: Values, value: int) -> bool:
    """Whether a value is computed from a draw."""
    stack, seen = [value], set[int]()
    while stack:
        if (top := stack.pop()) not in seen:
            seen.add(top)
            op = values.producers.get(top)
            if op is not None and op.name in aten.DRAWS:
                return True
            stack += values.operands(op) if op is not None else ()
    return False


def _asks_what_blocks_computed(values: Values, layers: LayerList) -> bool:
    """Whether the model, between its blocks, reads a number of what they computed.

    It may run a block again, or leave one out, by that number: what one text shows is not true of another.
    """
    paths = {call.path for call in layers.calls.values()}
    inside = [call for call in values.flow.calls if call.path in paths]
    start = min(call.enter for call in inside)
    return any(
        op.name in ("_local_scalar_dense", "equal")
        and op.time > start
        and not any(call.enter < op.time < call.exit for call in inside)
        and any(_is_made_in(values, values.value(tensor), inside) for tensor in op.inputs)
        for op in values.flow.operations
    )


def _is_made_in(values: Values, value: int, calls: list[ModuleCall]) -> bool:
    """Whether a value is computed from one that was made in one of these calls."""
    stack, seen = [value], set()
    while stack:
        if (top := stack.pop()) in seen:
            continue
        seen.add(top)
        if any(values.made_in(top, call) for call in calls):
            return True
        op = values.producers.get(top)
        stack += values.operands(op) if op is not None else ()
    return False
