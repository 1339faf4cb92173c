"""The dataflow as blocks: the layer list, each block's residual stream, and the branches added to it.

Pure reading of `values`: which module list carries the stream, which additions lie on the way from a block's input to
its output, which branch mixes positions. No module name is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from hookmap.dataflow import ModuleCall, Operation, Place
from hookmap.errors import DiscoveryError
from hookmap.values import HEAVY, Exposure, Step, Values

_STEP_COST = {"add": 0, "scale": 0, "cast": 0, "norm": 1, "gate": 2}


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


@dataclass
class Block:
    """One block as its dataflow shows it."""

    number: int
    call: ModuleCall
    values: Values
    entry: int
    exit: int
    seq: int
    path: list[Step] = field(default_factory=list)
    """linear steps from entry to exit; empty where there are none"""
    branches: list[Branch] = field(default_factory=list)

    @property
    def states(self) -> list[int]:
        """The values of the stream, from entry to exit."""
        return [self.entry, *(step.result for step in self.path)]

    def role(self, role: str) -> list[Branch]:
        return [branch for branch in self.branches if branch.role == role]

    @cached_property
    def tails(self) -> dict[int, list[Step]]:
        """value of a branch part -> what was done to it last: post-norm, scale, gate; outermost first."""
        return {part: list(self._tail(part)) for branch in self.branches for part in branch.parts}

    def _tail(self, part: int) -> Iterator[Step]:
        casts: list[Step] = []
        while not self._is_bare(part):
            steps = [s for s in self.values.steps(part) if s.kind != "add"]
            if not steps or not self.values.made_in(steps[0].source, self.call):
                return
            casts.append(steps[0])
            if steps[0].kind != "cast":
                yield from casts
                casts = []
            part = steps[0].source

    def _is_bare(self, value: int) -> bool:
        """Whether a module that computes with weights, more than a norm, gives the value."""
        return any(
            self.values.norm_input(e.call) is None and any(op.name in HEAVY for op in self.values.inside(e.call))
            for e in stands_inside(self, value)
        )

    def raw(self, part: int) -> int:
        """The part before post-norm, scale and gate."""
        tail = self.tails[part]
        return tail[-1].source if tail else part


def find_stack(values: Values, seq: int) -> Stack:
    """The module list whose entries hand a [.., seq, d] tensor from one to the next; the longest such chain."""
    candidates = [stack for group in _groups(values) if (stack := _stack(values, *group, seq)) is not None]
    if not candidates:
        raise DiscoveryError(
            "no list of blocks was found: expected modules numbered 0, 1, 2, … that hand a tensor "
            "[batch, pos, d_model] from one to the next. If this is a causal language model, please report it "
            "with its config."
        )
    return max(candidates, key=lambda s: (len(s.streams), -s.path.count("."), -min(c.enter for c in s.calls.values())))


def _groups(values: Values) -> Iterator[tuple[str, dict[int, ModuleCall], int]]:
    """Modules whose paths differ in one number: template, first call of each, how many there are."""
    found: dict[str, dict[int, ModuleCall]] = {}
    for call in values.flow.calls:
        for match in re.finditer(r"(?:^|(?<=\.))\d+(?=\.|$)", call.path):
            template = call.path[: match.start()] + "{i}" + call.path[match.end() :]
            found.setdefault(template, {}).setdefault(int(match[0]), call)
    for template, calls in found.items():
        if template.endswith("{i}"):
            yield template, calls, max(calls) + 1


def _stack(values: Values, path: str, calls: dict[int, ModuleCall], length: int, seq: int) -> Stack | None:
    def wide(tensors: dict[Place, int]) -> dict[Place, int]:
        shapes = {place: values.flow.tensors[t].shape for place, t in tensors.items()}
        return {p: values.value(t) for p, t in tensors.items() if len(shapes[p]) >= 3 and seq in shapes[p][:-1]}

    numbers = sorted(calls, key=lambda n: calls[n].enter)
    streams: dict[int, tuple[int, int]] = {}
    entries: dict[int, set[Place]] = {}
    exits: dict[int, int] = {}
    for here, after in pairwise(numbers):
        leaving, entering = wide(calls[here].outputs), wide(calls[after].entered)
        for value in leaving.values():
            places = {place for place, other in entering.items() if other == value}
            if places and values.made_in(value, calls[here]):
                exits[here], entries[after] = value, places
                break
    if len(numbers) > 1 and len(exits) < max(1, (len(numbers) - 1) // 2):
        return None
    usual = _usual_place(entries.values())
    for number in numbers:
        entering, leaving = wide(calls[number].entered), wide(calls[number].outputs)
        entry = next((entering[p] for p in entries.get(number, [usual]) if p in entering), None)
        entry = entry if entry is not None else next(iter(entering.values()), None)
        same = [v for v in leaving.values() if entry is not None and values.size(v) == values.size(entry)]
        leave = exits.get(number, same[0] if same else None)
        if entry is not None and leave is not None:
            streams[number] = (entry, leave)
    if not streams or (len(numbers) == 1 and length > 1):
        return None
    width = values.shape(next(iter(streams.values()))[0])[-1]
    return Stack(path, calls, length, streams, width)


def _usual_place(places: object) -> Place:
    for each in places:  # type: ignore[attr-defined]
        for place in each:
            return place  # type: ignore[no-any-return]
    return 0


def read_block(values: Values, stack: Stack, number: int, seq: int) -> Block:
    """Follow the stream through one block, and the branches that are added to it."""
    entry, leave = stack.streams[number]
    block = Block(number, stack.calls[number], values, entry, leave, seq)
    block.path = _residual_path(values, block)
    for position, step in enumerate(block.path):
        if step.kind == "add" and step.branch is not None:
            block.branches += _branches(block, position, step)
    return block


def _residual_path(values: Values, block: Block) -> list[Step]:
    """The linear steps from the block's input to its output that go through the fewest norms and gates."""
    best: dict[int, tuple[int, Step | None]] = {block.entry: (0, None)}

    def cost(value: int) -> int:
        if value not in best:
            best[value] = (10**6, None)
            if values.made_in(value, block.call):
                for step in values.steps(value):
                    total = cost(step.source) + _STEP_COST[step.kind]
                    if total < best[value][0]:
                        best[value] = (total, step)
        return best[value][0]

    if cost(block.exit) >= 10**6:
        return []
    path, value = [], block.exit
    while (step := best[value][1]) is not None:
        path.append(step)
        value = step.source
    return path[::-1]


def _branches(block: Block, position: int, step: Step) -> list[Branch]:
    found: list[Branch] = []
    assert step.branch is not None
    for part in _parts(block, step.branch, step.result):
        ops, reads = block.values.cone(part, block.states, block.call)
        role = "other" if not reads else "mixer" if any(mixes(block.values, op, block.seq) for op in ops) else "mlp"
        twin = next((b for b in found if b.role == role), None)
        if twin is None:
            found.append(Branch(role, position, [part], step.factor, ops, reads))
        else:
            twin.parts.append(part)
            twin.ops += [op for op in ops if op not in twin.ops]
            twin.reads |= reads
    return found


def _parts(block: Block, value: int, total: int) -> list[int]:
    """A branch that no module inside the block gives as a whole, but as a sum, is several."""
    if stands_inside(block, value) or not block.values.made_in(value, block.call):
        return [value]
    op = block.values.producers[value]
    sides = block.values.operands(op) if op.name == "add" else ()
    if len(sides) == 2 and all(block.values.size(v) == block.values.size(value) for v in sides):
        return [part for side in sides for part in _parts(block, side, total)]
    return [value]


def stands_inside(block: Block, value: int) -> list[Exposure]:
    """Where a value stands at boundaries of modules inside the block, as outputs."""
    return [
        e
        for e in block.values.exposures.get(value, [])
        if e.side == "output" and block.call.enter < e.call.enter and e.call.exit < block.call.exit
    ]


def mixes(values: Values, op: Operation, seq: int) -> bool:
    """Whether an operation moves information between positions: treats the axis of length `seq` not pointwise."""
    tensors = values.flow.tensors
    if not op.outputs or not tensors[op.outputs[0]].dtype.is_floating_point:
        return False
    result = tensors[op.outputs[0]].shape
    sources = [tensors[t].shape for t in op.inputs]
    if result.count(seq) >= 2 or op.name.startswith("_scaled_dot_product"):
        return True
    if not sources or seq not in sources[0]:
        return False
    if op.name == "convolution":
        return sources[1][-1] > 1
    if op.name in ("bmm", "baddbmm", "mm"):
        return sources[-2][-1] == seq and seq not in result
    if op.name in ("constant_pad_nd", "slice", "select", "mean", "sum", "amax", "cat"):
        return seq not in result
    if op.name in ("cumsum", "cumprod", "logcumsumexp", "flip", "roll"):
        dims = op.args[-1] if isinstance(op.args[-1], (list, tuple)) else [op.args[1]]
        return any(isinstance(d, int) and sources[0][d] == seq for d in dims)
    return op.name in ("unfold", "_fft_r2c", "_fft_c2c", "_fft_c2r")
