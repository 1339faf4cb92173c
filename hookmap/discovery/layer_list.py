"""The dataflow as blocks: the layer list, each block's residual stream, and the branches added to it.

Pure reading of `values`: which module list carries the stream, which additions lie on the way from a block's input to
its output, which branch mixes positions. No module name is asked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import ceil
from typing import Literal

from hookmap.discovery import aten
from hookmap.discovery.dataflow import ModuleCall, Operation, Place
from hookmap.discovery.mixing import is_shift, mixing
from hookmap.discovery.values import Exposure, Step, Values
from hookmap.errors import DiscoveryError

Rows = Literal["all", "first", "last"]
_STEP_COST = {"add": 0, "scale": 0, "cast": 0, "norm": 1, "gate": 2, "mix": 3}


@dataclass(frozen=True)
class Stack:
    """The list of blocks that carries the residual stream."""

    path: str
    """template over `{i}`"""
    calls: dict[int, ModuleCall]
    """block number -> its call; a number that is missing was never called"""
    length: int
    streams: dict[int, tuple[int, int]]
    """block number -> value of the stream that enters it, and that leaves it"""
    width: int
    seq: int
    """positions of the stream, usually as many as tokens"""
    tokens: int
    rows: Rows = "all"
    """which of them are the tokens', where there are more"""
    lists: tuple[str, ...] = ()
    """templates of all lists that a block's modules are in; more than `path` where there is no module of a block"""
    joined: bool = True
    """what leaves a block enters the next as it is; not so where the model adds to the stream between them (BLT)"""
    left_out: tuple[str, ...] = ()
    """templates of other lists of blocks that the output is computed through, and this one does not cover"""
    runs: dict[int, int] = field(default_factory=dict)
    """block number -> how often it runs in one forward pass; `calls` and `streams` are of the first time"""


@dataclass
class Branch:
    """What one or more additions of one role add to the stream."""

    role: str
    """mixer, mlp, or other: reads nothing of the stream"""
    step: int
    """index of its addition on the block's residual path"""
    parts: list[int]
    """values whose sum is added"""
    factor: float | None
    ops: list[Operation]
    reads: set[int]
    """values of the residual path that it reads"""
    shifts: bool = False
    """of the positions it does no more than shift them"""


@dataclass
class Block:
    """One block as its dataflow shows it."""

    number: int
    call: ModuleCall
    values: Values
    entry: int
    exit: int
    seq: int
    stack: Stack
    path: list[Step] = field(default_factory=list)
    """linear steps from entry to exit; empty where there are none"""
    branches: list[Branch] = field(default_factory=list)

    @property
    def states(self) -> list[int]:
        """The values of the stream, from entry to exit."""
        return [self.entry, *(step.result for step in self.path)]

    def mixing(self, ops: list[Operation]) -> list[Operation]:
        """Those of a branch's operations that move information between positions of the stream, or between tokens."""
        return [op for n in {self.seq, self.stack.tokens} for op in mixing(self.values, ops, n)]

    def role(self, role: str) -> list[Branch]:
        return [branch for branch in self.branches if branch.role == role]

    @cached_property
    def tails(self) -> dict[int, list[Step]]:
        """value of a branch part -> what was done to it last: post-norm, scale, gate; outermost first."""
        return {part: list(self.tail(part)) for branch in self.branches for part in branch.parts}

    def tail(self, part: int) -> Iterator[Step]:
        """The last steps of a branch, outermost first, behind its last module that computes with matrices."""
        casts: list[Step] = []
        while True:
            if (short := self._convolution(part)) is not None:
                yield from (*casts, short)
                part, casts = short.source, []
            if self._is_bare(part):
                return
            steps = [s for s in self.values.steps(part) if s.branch is None or self.values.is_constant(s.branch)]
            if not steps or not self.values.made_in(steps[0].source, self.call):
                return
            casts.append(steps[0])
            if steps[0].kind != "cast":
                yield from casts
                casts = []
            part = steps[0].source

    def _convolution(self, value: int) -> Step | None:
        """The convolution of each feature for itself, by a module, of what another module computed (Inkling)."""
        for exposure in stands_inside(self, value):
            heavy = [op for op in self.values.inside(exposure.call) if op.name in aten.PRODUCTS]
            entered = {v for t in exposure.call.entered.values() if self._is_bare(v := self.values.value(t))}
            if heavy and all(map(self._is_depthwise, heavy)) and len(entered) == 1 and value not in entered:
                return Step("convolve", entered.pop(), value, factor=None)
        return None

    def _is_depthwise(self, op: Operation) -> bool:
        return op.name == "convolution" and self.values.flow.tensors[op.inputs[1]].shape[1] == 1

    def _is_bare(self, value: int) -> bool:
        """Whether a module that computes with weights, more than a norm, gives the value."""
        return any(
            self.values.norm_input(e.call) is None
            and any(op.name in aten.PRODUCTS for op in self.values.inside(e.call))
            for e in stands_inside(self, value)
        )

    def raw(self, part: int) -> int:
        """The part before post-norm, scale and gate."""
        tail = self.tails[part]
        bare = tail[-1].source if tail else part
        while tail and not stands_inside(self, bare):
            casts = [step for step in self.values.steps(bare) if step.kind == "cast"]
            if not casts or not self.values.made_in(casts[0].source, self.call):
                break
            bare = casts[0].source
        return bare


def find_stack(values: Values, seq: int) -> Stack:
    """The module list whose entries hand a [.., seq, d] tensor from one to the next; the longest such chain."""
    groups = list(_groups(values))
    for length in _lengths(values, groups, seq):
        candidates = [stack for group in groups if (stack := _stack(values, *group, length)) is not None]
        if not candidates and length == seq:
            candidates = list(scattered(values, groups, seq))
        if candidates:
            break
    else:
        raise DiscoveryError(
            "no list of blocks was found: expected modules numbered 0, 1, 2, … that hand a tensor "
            "[batch, pos, d_model] from one to the next. If this is a causal language model, please report it "
            "with its config."
        )
    best = max(candidates, key=lambda s: _rank(values, s))
    reaching = _reaching_the_output(values)
    if len(candidates) > 1 and _end(best) not in reaching:
        linked = [stack for group in groups if (stack := _stack(values, *group, length, linked=True)) is not None]
        leading = [stack for stack in linked if len(stack.streams) > 1 and _end(stack) in reaching]
        if not leading:
            raise DiscoveryError(
                f"the longest list of blocks, {best.path}, does not lead to the output: what it computes only chooses. "
                "No other list hands a stream [batch, pos, d_model] on from block to block."
            )
        best = max(leading, key=lambda s: (_sums(values, s), *_rank(values, s)))
    _refuse_what_one_list_cannot_say(values, best, candidates, reaching)
    _refuse_depth_by_text(values, best)
    best = replace(best, left_out=tuple(_left_out(values, best, groups, reaching)), runs=_runs(values, best))
    return best if best.seq == seq else replace(best, tokens=seq, rows=_rows_of_tokens(values, best, seq))


def _runs(values: Values, stack: Stack) -> dict[int, int]:
    """How often each block runs. A block that stands in the list several times runs once for each of its numbers."""
    modules = Counter(id(call.module) for call in values.flow.calls)
    numbers = Counter(id(call.module) for call in stack.calls.values())
    paths = Counter(call.path for call in values.flow.calls)
    return {
        n: max(paths[call.path], ceil(modules[id(call.module)] / numbers[id(call.module)]))
        for n, call in stack.calls.items()
    }


def _refuse_depth_by_text(values: Values, stack: Stack) -> None:
    """Raises DiscoveryError where the model, between its blocks, reads a number of what they computed.

    It may run a block again, or leave one out, by that number: what one text shows is not true of another.
    """
    paths = {call.path for call in stack.calls.values()}
    inside = [call for call in values.flow.calls if call.path in paths]
    start = min(call.enter for call in inside)
    for op in values.flow.operations:
        asked = op.name in ("_local_scalar_dense", "equal") and op.time > start
        if not asked or any(call.enter < op.time < call.exit for call in inside):
            continue
        if any(_is_made_by(values, values.value(tensor), inside) for tensor in op.inputs):
            raise DiscoveryError(
                f"how often the blocks {stack.path} run depends on the text: the model reads a number of what they "
                "computed, and one forward pass shows one depth. hookmap reads models that run the same blocks for "
                "every text: set a fixed depth in the model's config, if it has such a setting."
            )


def _is_made_by(values: Values, value: int, calls: list[ModuleCall]) -> bool:
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


def _reaching_the_output(values: Values) -> set[int]:
    """Values that the model's output is computed from; not those it only chooses by (BLT's patches)."""
    stack = [values.value(tensor) for tensor in values.flow.calls[0].outputs.values()]
    found: set[int] = set()
    while stack:
        value = stack.pop()
        if value in found or not values.flow.tensors[value].dtype.is_floating_point:
            continue
        found.add(value)
        op = values.producers.get(value)
        stack += values.operands(op) if op is not None else ()
    return found


def _end(stack: Stack) -> int:
    return stack.streams[max(stack.streams)][1]


def _left_out(values: Values, best: Stack, groups: list[Group], reaching: set[int]) -> Iterator[str]:
    """Other lists, not inside the blocks nor around them, whose blocks add to a stream that leads to the output."""
    blocks = list(best.calls.values())
    for path, calls, count in groups:
        apart = all(a.exit < b.enter or b.exit < a.enter for a in calls.values() for b in blocks)
        shapes = [values.flow.tensors[t].shape for call in calls.values() for t in call.outputs.values()]
        lengths = {shape[1] for shape in shapes if len(shape) == 3}
        if path == best.path or not apart or len(lengths) != 1:
            continue
        other = _stack(values, path, calls, count, lengths.pop())
        if other is not None and _end(other) in reaching and _additions(values, other) == len(other.streams):
            yield other.path


def _rank(values: Values, stack: Stack) -> tuple[int, int, int, int]:
    """Blocks add to a stream; the steps of an MLP only hand a tensor on."""
    start = min(call.enter for call in stack.calls.values())
    return _additions(values, stack), len(stack.streams), -stack.path.count("."), -start


def _additions(values: Values, stack: Stack) -> int:
    return sum(_adds(values, stack.calls[n], *stream) for n, stream in stack.streams.items())


def _sums(values: Values, stack: Stack) -> int:
    """All additions on the way of the stream through the blocks."""
    paths = (residual_path(values, stack.calls[n], *stream) for n, stream in stack.streams.items())
    return sum(step.kind == "add" for path in paths for step in path)


def _adds(values: Values, call: ModuleCall, entry: int, leave: int) -> bool:
    return any(step.kind == "add" for step in residual_path(values, call, entry, leave))


def _feeds(values: Values, call: ModuleCall, entry: int, leave: int) -> bool:
    """Whether something that is added to the stream was computed from it."""
    added = [step.branch for step in residual_path(values, call, entry, leave) if step.branch is not None]
    return any(entry in values.cone(branch, [entry], call)[1] for branch in added)


def _refuse_what_one_list_cannot_say(values: Values, best: Stack, candidates: list[Stack], reaching: set[int]) -> None:
    """Raises DiscoveryError where the stream goes through other lists too, or crosses the blocks in two tensors."""
    first, last = (best.calls[pick(best.calls, key=lambda n: best.calls[n].enter)] for pick in (min, max))
    once = sum(call.module is first.module for call in values.flow.calls) == 1
    others = [other for other in candidates if other.path != best.path and _additions(values, other)]
    for other in others if once else []:
        around = [c for c in other.calls.values() if c.enter < first.enter and last.exit < c.exit]
        several = len(other.streams) > 1
        if several and _is_inside(other, best):
            raise DiscoveryError(
                f"each block of {best.path} holds a list of blocks, such as {other.path}: a map has one list. Put all "
                "blocks of the model into one list, or discover a part of the model."
            )
        beside = several and not around and _end(other) in reaching
        continued = _continues(values, best, other) or (several and _continues(values, other, best))
        if (around and several) or continued or beside:
            raise DiscoveryError(
                f"the residual stream goes through several lists of blocks, {best.path} and {other.path}: a map has "
                "one. Put the blocks of the model into one list, or discover a part of the model."
            )
    if _is_split(values, best):
        raise DiscoveryError(
            f"the residual stream crosses the blocks {best.path} in two tensors, which the next block adds: no module "
            "boundary between them exposes it. Expected blocks that hand on one tensor [batch, pos, d_model]."
        )


def _is_inside(inner: Stack, outer: Stack) -> bool:
    """Whether a list is in one block of another, and each of its own blocks adds to a stream of the same width."""
    calls = inner.calls.values()
    return inner.width == outer.width and any(
        all(block.enter < call.enter and call.exit < block.exit for call in calls) for block in outer.calls.values()
    )


def _continues(values: Values, before: Stack, after: Stack) -> bool:
    """Whether the stream that leaves the last block of one list enters, by linear steps, the first of another."""
    last = max(before.streams, key=lambda n: before.calls[n].enter)
    first = min(after.streams, key=lambda n: after.calls[n].enter)
    start, end = before.calls[last].exit, after.calls[first].enter
    if start > end:
        return False
    between = replace(before.calls[last], enter=start, exit=end)
    leave, entry = before.streams[last][1], after.streams[first][0]
    return leave == entry or bool(residual_path(values, between, leave, entry))


def _is_split(values: Values, stack: Stack) -> bool:
    """Whether each block adds, to the stream, another tensor that the block before it made and handed on."""
    numbers = sorted(stack.streams, key=lambda n: stack.calls[n].enter)
    found = []
    for before, here in pairwise(numbers):
        entered = map(values.value, stack.calls[here].entered.values())
        handed = {value for value in entered if values.made_in(value, stack.calls[before])}
        path = residual_path(values, stack.calls[here], *stack.streams[here])
        found.append(any(step.branch in handed for step in path))
    return bool(found) and all(found)


def _lengths(values: Values, groups: list[Group], seq: int) -> list[int]:
    """Numbers of positions that the stream may have: the tokens', or more, where a model adds positions of its own."""
    outputs = [t for _, calls, _ in groups for call in calls.values() for t in call.outputs.values()]
    shapes = [values.flow.tensors[t].shape for t in outputs]
    return [seq, *sorted({shape[1] for shape in shapes if len(shape) == 3 and shape[1] > seq})]


def _rows_of_tokens(values: Values, stack: Stack, seq: int) -> Rows:
    """The first or the last positions of the stream, as the model cuts the tokens' out behind the blocks."""
    end = stack.calls[max(stack.streams)].exit
    for op in values.flow.operations:
        if op.name == "slice" and op.time > end and len(op.args) > 2:
            before, after = (values.flow.tensors[t].shape[op.args[1]] for t in (op.inputs[0], op.outputs[0]))
            if (before, after) == (stack.seq, seq):
                return "last" if op.args[2] else "first"
    raise DiscoveryError(
        f"the blocks {stack.path} have {stack.seq} positions for {seq} tokens, and nothing behind them says which are "
        "the tokens': expected a slice of the stream."
    )


Group = tuple[str, dict[int, ModuleCall], int]


def _groups(values: Values) -> Iterator[Group]:
    """Modules whose paths differ in one number: template, first call of each, how many there are."""
    found: dict[str, dict[int, ModuleCall]] = {}
    for call in values.flow.calls:
        for match in re.finditer(r"(?:^|(?<=\.))\d+(?=\.|$)", call.path):
            template = call.path[: match.start()] + "{i}" + call.path[match.end() :]
            found.setdefault(template, {}).setdefault(int(match[0]), call)
    for template, calls in found.items():
        if template.endswith("{i}"):
            yield template, calls, max(calls) + 1


def _stack(
    values: Values, path: str, calls: dict[int, ModuleCall], length: int, seq: int, linked: bool = False
) -> Stack | None:
    """`linked`: what leaves a block may be added to before it enters the next."""

    def wide(tensors: dict[Place, int]) -> dict[Place, int]:
        shapes = {place: values.flow.tensors[t].shape for place, t in tensors.items()}
        return {p: values.value(t) for p, t in tensors.items() if len(shapes[p]) >= 3 and seq in shapes[p][:-1]}

    numbers = sorted(calls, key=lambda n: calls[n].enter)
    streams: dict[int, tuple[int, int]] = {}
    entries: dict[int, set[Place]] = {}
    exits: dict[int, int] = {}
    hand = _linked if linked else _handed
    handed = {(a, b): hand(values, calls[a], calls[b], wide) for a, b in pairwise(numbers)}
    votes = Counter(place for places in handed.values() for place in places)
    if len(votes) > 1:  # several tensors cross the blocks: the stream is the one that is added to
        for (here, _), places in handed.items():
            entering = wide(calls[here].entered)
            added = [p for p, v in places.items() if p in entering and _adds(values, calls[here], entering[p], v)]
            votes.update(added)
            # Of two that are added to (a reversible block), the one that the block's own branches read.
            votes.update(p for p in added if len(added) > 1 and _feeds(values, calls[here], entering[p], places[p]))
    for (here, after), places in handed.items():
        if places:
            value = places[max(places, key=lambda place: votes[place])]
            exits[here], entries[after] = value, {place for place, other in places.items() if other == value}
    if len(numbers) > 1 and len(exits) < max(1, (len(numbers) - 1) // 2):
        return None
    usual = _usual_place(entries.values())
    for number in numbers:
        entering, leaving = wide(calls[number].entered), wide(calls[number].outputs)
        entry = next((entering[p] for p in entries.get(number, [usual]) if p in entering), None)
        entry = entry if entry is not None else next(iter(entering.values()), None)
        same = [v for v in leaving.values() if entry is not None and values.size(v) == values.size(entry)]
        if entry is not None and len(same) > 1:
            same.sort(key=lambda v: not _adds(values, calls[number], entry, v))
        leave = exits.get(number, same[0] if same else None)
        if entry is not None and leave is not None:
            streams[number] = (entry, leave)
    if not streams or (len(numbers) == 1 and length > 1):
        return None
    width = values.shape(next(iter(streams.values()))[0])[-1]
    ordered = [streams[n] for n in numbers if n in streams]
    joined = not linked or all(a[1] == b[0] for a, b in pairwise(ordered))
    return Stack(path, calls, length, streams, width, seq, seq, lists=(path,), joined=joined)


def _handed(
    values: Values, here: ModuleCall, after: ModuleCall, wide: Callable[[dict[Place, int]], dict[Place, int]]
) -> dict[Place, int]:
    """Place in the arguments of one block -> the value there, where the block before made it and gave it out."""
    made = {value for value in wide(here.outputs).values() if values.made_in(value, here)}
    return {place: value for place, value in wide(after.entered).items() if value in made}


def _linked(
    values: Values, here: ModuleCall, after: ModuleCall, wide: Callable[[dict[Place, int]], dict[Place, int]]
) -> dict[Place, int]:
    """Place in the arguments of one block -> what the block before gave out, where the one was added to the other."""
    made = [value for value in wide(here.outputs).values() if values.made_in(value, here)]
    between = replace(here, enter=here.exit, exit=after.enter)
    entering = wide(after.entered).items()
    return {p: m for p, v in entering for m in made if v == m or residual_path(values, between, m, v)}


def scattered(values: Values, groups: list[Group], seq: int) -> Iterator[Stack]:
    """Blocks that are no modules: the first attention, norm, MLP … of several lists side by side, then the second.

    A block begins where the first of them is entered, and ends where it is entered the next time.
    """
    for template, calls, length in groups:
        parent = values.flow.calls[calls[0].parent or 0] if 0 in calls else None
        lists = tuple(t for t, c, n in groups if n == length and c.get(0) and c[0].parent == calls[0].parent)
        first = min((c[0].enter for t, c, _ in groups if t in lists), default=0)
        if parent is None or length < 2 or len(calls) != length or len(lists) < 2 or calls[0].enter != first:
            continue
        inputs = [_stream_input(values, calls[n], seq) for n in range(length)]
        leave = next((values.value(t) for t in parent.outputs.values()), None)
        if leave is None or any(value is None for value in inputs):
            continue
        ends = [*(calls[n].enter for n in range(1, length)), parent.exit]
        spans = {
            n: ModuleCall(parent.index, calls[n].path, parent.module, parent.parent, calls[n].enter - 1, ends[n])
            for n in range(length)
        }
        streams = {n: (a, b) for n, (a, b) in enumerate(pairwise([*inputs, leave])) if a is not None and b is not None}
        yield Stack(template, spans, length, streams, values.shape(leave)[-1], seq, seq, lists=lists)


def _stream_input(values: Values, call: ModuleCall, seq: int) -> int | None:
    shapes = {t: values.flow.tensors[t].shape for t in call.entered.values()}
    return next((values.value(t) for t, shape in shapes.items() if len(shape) >= 3 and seq in shape[:-1]), None)


def _usual_place(places: object) -> Place:
    for each in places:  # type: ignore[attr-defined]
        for place in each:
            return place  # type: ignore[no-any-return]
    return 0


def read_block(values: Values, stack: Stack, number: int, seq: int) -> Block:
    """Follow the stream through one block, and the branches that are added to it."""
    entry, leave = stack.streams[number]
    block = Block(number, stack.calls[number], values, entry, leave, seq, stack)
    block.path = residual_path(values, block.call, entry, leave)
    for position, step in enumerate(block.path):
        if step.branch is not None:
            block.branches += _branches(block, position, step)
    if not all(branch.shifts for branch in block.role("mixer")):
        # Beside a branch that mixes more, one that takes in the position before (RWKV's channel mixing) is the MLP.
        for branch in block.role("mixer"):
            branch.role = "mlp" if branch.shifts else "mixer"
    return block


def residual_path(values: Values, call: ModuleCall, entry: int, leave: int) -> list[Step]:
    """The linear steps from a block's input to its output through the fewest norms and gates, then fewest additions."""
    best: dict[int, tuple[tuple[int, int], Step | None]] = {entry: ((0, 0), None)}

    def cost(value: int) -> tuple[int, int]:
        if value not in best:
            best[value] = ((10**6, 0), None)
            if values.made_in(value, call):
                for step in (step for step in values.steps(value) if step.kind in _STEP_COST):
                    obstacles, additions = cost(step.source)
                    total = (obstacles + _STEP_COST[step.kind], additions + (step.kind == "add"))
                    if total < best[value][0]:
                        best[value] = (total, step)
        return best[value][0]

    if cost(leave)[0] >= 10**6:
        return []
    path, value = [], leave
    while (step := best[value][1]) is not None:
        path.append(step)
        value = step.source
    return path[::-1]


def _branches(block: Block, position: int, step: Step) -> list[Branch]:
    found: list[Branch] = []
    assert step.branch is not None
    cones = {p: block.values.cone(p, block.states, block.call) for p in _parts(block, step.branch, step.result)}
    heavy = {part for part, (ops, _) in cones.items() if any(op.name in aten.PRODUCTS for op in ops)}
    if len(cones) > 1 and (len(heavy) < 2 or any(reads for part, (_, reads) in cones.items() if part not in heavy)):
        cones = {step.branch: block.values.cone(step.branch, block.states, block.call)}  # one branch's own residual
    for part, (ops, reads) in cones.items():
        tail = list(block.tail(part))
        bare = tail[-1].source if any(each.kind == "convolve" for each in tail) else part
        mixed = block.mixing(ops if bare == part else block.values.cone(bare, block.states, block.call)[0])
        role = "other" if not reads else "mixer" if mixed else "mlp"
        twin = next((b for b in found if b.role == role), None)
        if twin is None:
            found.append(Branch(role, position, [part], step.factor, ops, reads, all(map(is_shift, mixed))))
        else:
            twin.parts.append(part)
            twin.ops += [op for op in ops if op not in twin.ops]
            twin.reads |= reads
            twin.shifts &= all(map(is_shift, mixed))
    return found


def _parts(block: Block, value: int, total: int) -> list[int]:
    """A branch that no module inside the block gives as a whole, but as a sum, is several."""
    if stands_inside(block, value) or not block.values.made_in(value, block.call):
        return [value]
    op = block.values.producers[value]
    sides = block.values.operands(op) if op.name == "add" else ()
    whole = all(block.values.size(v) == block.values.size(value) and not block.values.is_constant(v) for v in sides)
    if len(sides) == 2 and whole:
        return [part for side in sides for part in _parts(block, side, total)]
    return [value]


def stands_inside(block: Block, value: int) -> list[Exposure]:
    """Where a value stands at boundaries of modules inside the block, as outputs."""
    return [
        e
        for e in block.values.exposures.get(value, [])
        if e.side == "output" and block.call.enter < e.call.enter and e.call.exit < block.call.exit
    ]
