"""Runs of a model in which only a circuit's edges carry the clean prompt: all other edges carry the corrupted one.

Each reader has a stream of its own then: what the running pass has written, with the corrupted value in place of each
writer whose edge to it is not in the circuit. A block is run again on the streams of its readers, up to what they read
(queries, keys, values, the MLP's input), and that is written into the running pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hookmap.activations import Key
from hookmap.analysis.branches import INPUT, Branch, branches_of, last_of, refused
from hookmap.analysis.circuits import Circuit
from hookmap.analysis.edge_scores import Node, close_to
from hookmap.analysis.metrics import Bound
from hookmap.analysis.sides import read
from hookmap.capture.batches import fed, layout_of, without_loss
from hookmap.capture.engines.hooks import call, module_at, register
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.interventions.writable import BoundaryTensor, ModuleIO, mode_of
from hookmap.capture.prepare import Prepared
from hookmap.capture.run import running
from hookmap.errors import CaptureError
from hookmap.loading.wrappers import hooked_forward
from hookmap.maps.selectors import Selector

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

Values = dict[Node, torch.Tensor]
"""what each writer adds, [batch, pos, d_model]"""


class _Read(Exception):  # it ends a block that was run again
    """What is read has been seen."""


@dataclass
class CircuitRuns:
    """Runs circuits of one model on its clean prompts."""

    hm: Hooked
    bound: Bound
    """of the clean prompts"""
    corrupted: Any
    """a capture of what every branch adds, of z, and of the input, of the corrupted prompts"""
    nodes: tuple[tuple[Node, ...], tuple[Node, ...]]
    prepared: Prepared
    """of the clean prompts: their batches"""
    branches: tuple[Branch, ...] = ()
    _products: dict[int, torch.Tensor] = field(default_factory=dict)
    """of each mixer with heads, [heads, d_head, d_model]: what they add to the stream for their z"""

    def __post_init__(self) -> None:
        """Raises SelectionError where the edges of this model cannot be run apart."""
        self.branches = branches_of(self.hm.map)
        if rests := [str(node) for side in self.nodes for node in side if node.rest]:
            raise refused(
                self.hm.map,
                f"{', '.join(rests[:3])} {'is' if len(rests) == 1 else 'are'} no head's alone, and cannot be run apart",
            )

    def measured(self, circuit: Circuit, all_again: bool = False) -> torch.Tensor:
        """The metric of each clean prompt, float32 [prompts], where only the circuit's edges carry it.

        all_again: blocks are run again also where all edges to a reader are in the circuit.
        """
        found: dict[int, float] = {}
        for number, branch in enumerate(self.branches):
            if branch.z is not None:
                self.product(number)  # before hooks are on its module
        for numbers in self.prepared.groups:
            one = _Pass(self, circuit, numbers, all_again)
            logits = one.logits()
            for row, number in enumerate(numbers):
                own = logits[row, : one.layout.lengths[row]]
                own = own if self.bound.last is None else own[-self.bound.last :]
                found[number] = float(self.bound(own, number))
        return torch.tensor([found[number] for number in range(len(self.bound.prompts))])

    def selector(self, key: Key) -> Selector:
        """Where a point is, which must be one tensor. Raises SelectionError."""
        [found] = self.hm.selectors([key[0]], "all" if key[1] is None else [key[1]], 0)
        if len(found.terms) > 1 or found.terms[0].is_inside or found.terms[0].weight is not None:
            raise refused(self.hm.map, f"{found} is no single tensor at a module")
        return found

    def product(self, number: int) -> torch.Tensor:
        """[heads, d_head, d_model] of a mixer with heads: its output projection, by what it gives for unit vectors."""
        if number not in self._products:
            branch = self.branches[number]
            assert branch.z is not None
            z, adds = self.selector(branch.z), self.selector(branch.adds)
            term = z.terms[0]
            if term.side != "input" or term.heads is None or term.heads.start or term.heads.groups > 1:
                raise refused(self.hm.map, f"{z}: its output projection does not read the heads side by side")
            module = module_at(self.hm.model, self.hm.root, term.module)
            weight = next(module.parameters())
            shape = self.corrupted.read(0, branch.z[0], branch.z[1]).shape[1:]
            units = torch.eye(shape[0] * shape[1] + 1, shape[0] * shape[1], dtype=weight.dtype, device=weight.device)
            with torch.no_grad():
                given = module(units if term.flat else units[None])
            given = (given[0] if isinstance(given, tuple) else given).reshape(len(units), -1)
            self._products[number] = ((given[:-1] - given[-1]) * adds.scale).reshape(*shape, -1)
        return self._products[number]


class _Pass:
    """One batch of clean prompts."""

    def __init__(self, runs: CircuitRuns, circuit: Circuit, numbers: Sequence[int], all_again: bool) -> None:
        self.runs, self.hm = runs, runs.hm
        self.circuit, self.all_again = circuit, all_again
        self.outside = circuit.exists & ~circuit.kept
        prompts = [runs.bound.prompts[number] for number in numbers]
        self.layout: BatchLayout = layout_of(numbers, prompts, right=True)
        self.inputs = fed(runs.prepared.run, prompts, self.layout, 0) | {
            "use_cache": False,
            **without_loss(self.hm.root),
        }
        self.columns = {node: column for column, node in enumerate(runs.nodes[1])}
        self.differences = torch.empty(0)
        """of each writer so far, corrupted minus what it has written in this pass: [writers, batch * pos * d_model]"""
        self.writers = 0
        self.block: tuple[Any, ModuleIO] | None = None
        """the running block, and what it was called with"""
        self.again = False
        """whether a block is being run again"""
        self.read: dict[Key, list[tuple[int | None, torch.Tensor]]] = {}
        """of what is read next in the running pass: (head, its value), [batch, pos, ...]"""
        self.found: torch.Tensor | None = None
        self.z: torch.Tensor | None = None

    def logits(self) -> torch.Tensor:
        """[batch, pos, d_vocab]."""
        engine = self.hm.hooks
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(running(engine))
            hooks.enter_context(torch.no_grad())
            for module, side, do in self._hooks():
                hooks.callback(register(module, side, partial(self._once, do)))
            hooks.enter_context(hooked_forward(engine.runner, self.hm.root))
            call(engine.runner, self.inputs)
        if self.found is None:
            raise CaptureError("the forward pass did not reach the logits.")
        return self.found

    def _once(self, do: Callable[..., Any], args: Any, kwargs: Any, output: Any) -> Any:
        return None if self.again else do((args, kwargs, output))

    def _hooks(self) -> Iterator[tuple[Any, Any, Callable[[ModuleIO], ModuleIO | None]]]:
        """What is done where, in the order of registration."""
        branches = self.runs.branches
        for layer in sorted({branch.layer for branch in branches}):
            block = module_at(self.hm.model, self.hm.root, self.hm.map.at_layer(self.hm.map.layers_path, layer))
            yield block, "input", partial(self._begin_block, block, layer)
        for number, branch in enumerate(branches):
            if branch.stream[0] != "resid_pre":
                yield *self._place(branch.stream), partial(self._read_stream, number)
            for key in branch.parts or (branch.reads,):
                yield *self._place(key), partial(self._write, key)
            if branch.z is not None:
                yield *self._place(branch.z), partial(self._keep_z, branch.z)
            yield *self._place(branch.adds), partial(self._added, number)
        yield *self._place(last_of(self.hm.map)), self._read_last
        yield *self._place(("logits", None)), self._end

    def _place(self, key: Key) -> tuple[Any, Any]:
        term = self.runs.selector(key).terms[0]
        return module_at(self.hm.model, self.hm.root, term.module), term.side

    def _tensor(self, key: Key, given: ModuleIO, batch: int | None = None) -> torch.Tensor:
        """A point, [batch, pos, ...]."""
        term = self.runs.selector(key).terms[0]
        rows = len(self.layout.samples) if batch is None else batch
        return term.times(term.arrange(term.resolve(*given), rows, self.layout.width))  # type: ignore[no-any-return]

    def _begin_block(self, block: Any, layer: int, given: ModuleIO) -> None:
        self.block = block, given
        stream = self._tensor(("resid_pre", layer), given)
        if not self.writers:
            self.differences = stream.new_empty(len(self.circuit.kept), stream.numel())
            self._note([stream], [self._corrupted(INPUT)])
        for number, branch in enumerate(self.runs.branches):
            if branch.stream == ("resid_pre", layer):
                self._read_again(number, stream)

    def _read_stream(self, number: int, given: ModuleIO) -> None:
        self._read_again(number, self._tensor(self.runs.branches[number].stream, given))

    def _read_again(self, number: int, stream: torch.Tensor) -> None:
        """What each reader of a branch reads of its own stream, for the running pass."""
        branch = self.runs.branches[number]
        readers = [
            node for node in self.columns if node.branch == number and (self.all_again or self._outside(node).any())
        ]
        if not readers:
            return
        streams = self._streams(readers, stream)
        seen = self._again(branch, streams, [node.key for node in readers if node.key is not None])
        for place, node in enumerate(readers):
            assert node.key is not None  # it is a branch's
            own = seen[node.key].chunk(len(readers))[place]
            value = own if node.head is None else own[:, :, node.head]
            self.read.setdefault(node.key, []).append((node.head, value))

    def _outside(self, reader: Node) -> torch.Tensor:
        """bool [writers so far]: which of their edges to this reader are not in the circuit."""
        column = self.columns[reader]
        return self.outside[: self.writers, column]

    def _streams(self, readers: Sequence[Node], stream: torch.Tensor) -> torch.Tensor:
        """The stream of each reader, [readers, batch, pos, d_model]."""
        outside = torch.stack([self._outside(reader) for reader in readers]).to(stream)
        return stream + (outside @ self.differences[: self.writers]).reshape(-1, *stream.shape)

    def _again(self, branch: Branch, streams: torch.Tensor, keys: Sequence[Key]) -> Mapping[Key, torch.Tensor]:
        """Points of the running block on other streams, [streams, batch, pos, d_model]: [streams * batch, pos, ...]."""
        assert self.block is not None  # it is running
        block, given = self.block
        count, batch = streams.shape[:2]
        seen: dict[Key, torch.Tensor] = {}
        wanted = set(keys)

        def look(key: Key, args: Any, kwargs: Any, output: Any) -> None:
            seen[key] = self._tensor(key, (args, kwargs, output), count * batch).clone()
            if seen.keys() >= wanted:
                raise _Read

        def put(args: Any, kwargs: Any, output: Any) -> ModuleIO:
            return self._with(branch.stream, (args, kwargs, output), streams.flatten(0, 1))

        begun = _repeated(given, count, batch)
        self.again = True
        try:
            with contextlib.ExitStack() as hooks, contextlib.suppress(_Read):
                if branch.stream[0] == "resid_pre":
                    begun = self._with(branch.stream, begun, streams.flatten(0, 1))
                else:
                    hooks.callback(register(*self._place(branch.stream), put))
                for key in wanted:
                    hooks.callback(register(*self._place(key), partial(look, key)))
                block(*begun[0], **begun[1])
        finally:
            self.again = False
        if missed := wanted - seen.keys():
            raise CaptureError(f"a block that was run again did not reach {sorted(map(str, missed))}.")
        return seen

    def _with(self, key: Key, given: ModuleIO, values: torch.Tensor, head: int | None = None) -> ModuleIO:
        """What a module gets or gives, with these values of a point, [rows, pos, ...]; of one head alone."""
        selector = self.runs.selector(key)
        shape = tuple(values.shape[:2])
        cells = ([row for row in range(shape[0]) for _ in range(shape[1])], [*range(shape[1])] * shape[0])

        def change(old: torch.Tensor) -> torch.Tensor:
            new = values.flatten(0, 1).to(old.dtype)
            if head is None:
                return new
            old = old.clone()
            old[:, head] = new
            return old

        target = BoundaryTensor(selector.terms[0], mode_of(selector))
        return target.write(given, (shape[0], shape[1]), cells, change, str(selector))

    def _write(self, key: Key, given: ModuleIO) -> ModuleIO | None:
        own = self.read.pop(key, [])
        if not own:
            return None
        for head, values in own:
            given = self._with(key, given, values, head)
        return given

    def _keep_z(self, key: Key, given: ModuleIO) -> None:
        self.z = self._tensor(key, given).clone()

    def _added(self, number: int, given: ModuleIO) -> None:
        branch = self.runs.branches[number]
        whole = self._tensor(branch.adds, given)
        if branch.z is None:
            self._note([whole], [self._corrupted(branch.adds)])
            return
        assert self.z is not None  # z is before it
        product = self.runs.product(number).to(whole.dtype)
        heads = torch.einsum("bthd,hdm->hbtm", self.z.to(whole.dtype), product)
        other = torch.einsum("bthd,hdm->hbtm", self._corrupted(branch.z).to(whole.dtype), product)
        left = whole - heads.sum(0)
        spread = float((left - left[:1, :1]).abs().max() / whole.abs().max().clamp_min(1e-30))
        if not spread <= close_to(whole):
            raise refused(
                self.hm.map, f"{branch.adds[0]} of layer {branch.layer} is not the sum of its heads and a bias"
            )
        self._note([*heads], [*other])

    def _note(self, written: Sequence[torch.Tensor], corrupted: Sequence[torch.Tensor]) -> None:
        for own, other in zip(written, corrupted, strict=True):
            self.differences[self.writers] = (other.to(own.device, own.dtype) - own).flatten()
            self.writers += 1

    def _corrupted(self, key: Key) -> torch.Tensor:
        rows = [read(self.runs.corrupted, number, key) for number in self.layout.samples]
        found = rows[0].new_zeros(len(rows), self.layout.width, *rows[0].shape[1:])
        for row, own in enumerate(rows):
            found[row, : len(own)] = own
        return found

    def _read_last(self, given: ModuleIO) -> ModuleIO | None:
        reader = next(node for node in self.columns if node.key is None)
        if not self._outside(reader).any():
            return None
        key = last_of(self.hm.map)
        return self._with(key, given, self._streams([reader], self._tensor(key, given))[0])

    def _end(self, given: ModuleIO) -> None:
        self.found = self._tensor(("logits", None), given)


def _repeated(given: Any, count: int, batch: int) -> Any:
    """Arguments of a block with each batch `count` times behind each other."""
    if isinstance(given, torch.Tensor):
        return given.repeat(count, *[1] * (given.ndim - 1)) if given.ndim and given.shape[0] == batch else given
    if isinstance(given, Mapping):
        return {name: _repeated(each, count, batch) for name, each in given.items()}
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return type(given)(*(_repeated(each, count, batch) for each in given))
    if isinstance(given, tuple | list):
        return type(given)(_repeated(each, count, batch) for each in given)
    return given
