"""Scores of all edges of one batch: what each branch and head added, times the gradient that each reader gives it.

The gradient of a reader is that of the metric, carried back through the reader alone, its norm too, to the stream
(`LocalGraph.pull`). What a head adds is the change of its `z`, carried on to the stream (`LocalGraph.push`). Two sums
are checked: all that was added is the change of the stream, and all that reads a stream gives its gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hookmap.activations import Key
from hookmap.analysis.branches import INPUT, Branch, points_of, refused
from hookmap.analysis.sides import read
from hookmap.capture.engines.local_graph import LocalGraph
from hookmap.capture.stacks import label
from hookmap.maps.document import ArchitectureMap

LOGITS = "logits"
REST = "rest"
"""what a branch adds, or reads, besides its heads"""
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""how much the sums may be off, relative to the largest value"""


@dataclass(frozen=True)
class Node:
    """What writes to the stream, or reads it."""

    key: Key | None
    """a point; None: the logits, which read what leaves the last layer"""
    head: int | None = None
    rest: bool = False
    branch: int = -1
    """its number; -1 for the input and the logits"""

    def __str__(self) -> str:
        if self.key is None:
            return LOGITS
        head = f" {REST}" if self.rest else "" if self.head is None else f" head {self.head}"
        return label(self.key) + head


@dataclass
class Scoring:
    """Adds up the scores of the pairs of one batch."""

    map: ArchitectureMap
    branches: tuple[Branch, ...]
    base: Any
    """a capture of what the branches add, and of the stream"""
    source: Any
    last: Key
    """the stream that leaves the last layer"""
    pairs: int
    steps: int
    writers: tuple[Node, ...] = ()
    """in forward order"""
    scores: dict[Node, torch.Tensor] = field(default_factory=dict)
    """of each reader, float32 [pairs, n] of the first n writers, which are before it"""
    sizes: dict[Node, float] = field(default_factory=dict)
    """of what a branch does besides its heads, its largest share of the branch"""

    def __call__(self, local: LocalGraph) -> None:
        with torch.no_grad():
            written = [*self._written(local)]
            self.writers = tuple(node for own in written for node, _ in own)
            self._check_sum(local, written)
            # [batch, writers, pos * d_model]
            changes = torch.stack([change for own in written for _, change in own], 1).flatten(2)
            counts = [*itertools.accumulate(map(len, written))]
            largest = 0.0
            total = local.of_point(self.last, local.gradient(self.last))
            self._score(local, [(Node(None), total)], changes)
            for number in reversed(range(len(self.branches))):
                branch = self.branches[number]
                readers, whole = self._readers(local, number)
                self._score(local, readers, changes[:, : counts[branch.before]])
                total = total + whole
                if number == 0 or self.branches[number - 1].layer != branch.layer:
                    own = local.of_point(("resid_pre", branch.layer), local.gradient(("resid_pre", branch.layer)))
                    largest = max(largest, float((own - total).abs().max() / own.abs().max().clamp_min(1e-30)))
            if not largest <= close_to(total):
                raise refused(
                    self.map,
                    f"the gradient at the stream is not the sum of what its readers give it ({largest:.2g} of it is "
                    "missing): something else reads the stream, or scales it",
                )

    def _written(self, local: LocalGraph) -> Iterator[list[tuple[Node, torch.Tensor]]]:
        """What the input, and then each branch, adds in the source and not in the base: [batch, pos, d_model]."""
        yield [(Node(INPUT), self._change(local, INPUT))]
        for number, branch in enumerate(self.branches):
            whole = self._change(local, branch.adds)
            if branch.z is None:
                yield [(Node(branch.adds, branch=number), whole)]
                continue
            moved = local.placed(branch.z, self._change(local, branch.z))
            changes = [local.of_head(branch.z, moved, head) for head in range(local.heads(branch.z))]
            heads = [each.to(whole.dtype) for each in local.push(branch.z, branch.adds, changes)]
            own = [(Node(branch.adds, head, branch=number), each) for head, each in enumerate(heads)]
            yield [*own, self._rest(Node(branch.adds, rest=True, branch=number), whole, heads)]

    def _readers(self, local: LocalGraph, number: int) -> tuple[list[tuple[Node, torch.Tensor]], torch.Tensor]:
        """The gradients that a branch gives the stream that it reads: of each part, and the whole."""
        branch = self.branches[number]
        whole = local.pull(branch.reads, branch.stream, local.gradient(branch.reads))
        found = []
        for key in branch.parts:
            gradient = local.gradient(key)
            for head in range(local.heads(key)):
                own = local.pull(key, branch.stream, local.of_head(key, gradient, head))
                found.append((Node(key, head, branch=number), own))
        if not found:
            return [(Node(branch.reads, branch=number), whole)], whole
        rest = self._rest(Node(branch.reads, rest=True, branch=number), whole, [each for _, each in found])
        return [*found, rest], whole

    def _rest(self, node: Node, whole: torch.Tensor, parts: Sequence[torch.Tensor]) -> tuple[Node, torch.Tensor]:
        rest = whole - torch.stack([*parts]).sum(0)
        share = float(rest.abs().max() / whole.abs().max().clamp_min(1e-30))
        self.sizes[node] = max(self.sizes.get(node, 0.0), share)
        return node, rest

    def _score(self, local: LocalGraph, readers: Sequence[tuple[Node, torch.Tensor]], changes: torch.Tensor) -> None:
        """Every edge from the writers of these changes, the first ones, to these readers."""
        gradients = torch.stack([gradient for _, gradient in readers], 1).flatten(2).to(changes.dtype)
        values = (gradients @ changes.transpose(1, 2) / self.steps).float().cpu()  # [batch, readers, writers]
        rows = list(local.layout.samples)
        for place, (reader, _) in enumerate(readers):
            own = self.scores.setdefault(reader, torch.zeros(self.pairs, changes.shape[1]))
            own[rows] += values[:, place]

    def _change(self, local: LocalGraph, key: Key) -> torch.Tensor:
        """Source minus base of a point, padded on the right: [batch, pos, ...]."""
        rows = [read(self.source, n, key) - read(self.base, n, key) for n in local.layout.samples]
        found = rows[0].new_zeros(len(rows), local.layout.width, *rows[0].shape[1:])
        for row, own in enumerate(rows):
            found[row, : len(own)] = own
        return found.to(local.gradient(key).device)

    def _check_sum(self, local: LocalGraph, written: Sequence[Sequence[tuple[Node, torch.Tensor]]]) -> None:
        whole = self._change(local, self.last)
        missing = whole - sum(change for own in written for _, change in own)
        share = float(missing.abs().max() / whole.abs().max().clamp_min(1e-30))
        if not share <= close_to(local.gradient(self.last)):
            raise refused(
                self.map,
                f"the change of the stream is not the sum of what the branches add ({share:.2g} of it is missing): "
                "the model scales the stream, or adds something else",
            )


def close_to(tensor: torch.Tensor) -> float:
    """How much two sums may differ in this dtype, relative to the largest value."""
    return _CLOSE.get(tensor.dtype, 5e-2)


def keys_of(branches: Sequence[Branch], last: Key) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Points with their layers: those whose values are compared, and those whose gradients are taken."""
    values = [INPUT, *(key for each in branches for key in (each.adds, each.z) if key is not None), last]
    streams = [("resid_pre", layer) for layer in sorted({each.layer for each in branches})]
    graph = [key for each in branches for key in (each.reads, each.stream, *each.parts)]
    return points_of(values), points_of([*values, *streams, *graph])
