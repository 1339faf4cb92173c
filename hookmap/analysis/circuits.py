"""Circuits: sets of edges between what writes to the stream and what reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hookmap.analysis.edge_scores import Node
from hookmap.errors import SelectionError
from hookmap.wording import did_you_mean, sentence


@dataclass(frozen=True)
class Circuit:
    """Some of a model's edges."""

    nodes: tuple[tuple[Node, ...], tuple[Node, ...]]
    """the writers and the readers, in forward order"""
    kept: torch.Tensor
    """bool [writers, readers]: the edges of the circuit"""
    exists: torch.Tensor
    """bool [writers, readers]: the edges of the model"""

    @property
    def share(self) -> float:
        """Of the model's edges, how many are in the circuit."""
        return int(self.kept.sum()) / int(self.exists.sum())

    def edges(self) -> list[tuple[str, str]]:
        """(writer, reader) of each, in forward order."""
        return [(str(self.nodes[0][row]), str(self.nodes[1][column])) for row, column in self.kept.nonzero().tolist()]

    def __repr__(self) -> str:
        return f"<Circuit of {int(self.kept.sum())} of {int(self.exists.sum())} edges>"


def largest(
    nodes: tuple[tuple[Node, ...], tuple[Node, ...]], scores: torch.Tensor, edges: int | float, absolute: bool
) -> Circuit:
    """The edges of the largest scores; `scores`: [writers, readers], nan where there is no edge.

    Raises SelectionError for a number of edges that the model does not have.
    """
    exists = ~scores.isnan()
    every = int(exists.sum())
    whole = isinstance(edges, int) and not isinstance(edges, bool)
    count = int(edges) if whole else int(edges * every) if isinstance(edges, float) and 0 <= edges <= 1 else -1
    if not 0 <= count <= every:
        raise SelectionError(f"edges {edges!r}: expected a number from 0 to {every}, or a share such as 0.01.")
    order = (scores.abs() if absolute else scores).masked_fill(~exists, float("-inf")).flatten()
    kept = torch.zeros(exists.numel(), dtype=torch.bool)
    kept[order.topk(count).indices] = True
    return Circuit(nodes, kept.reshape(exists.shape), exists)


def of_edges(
    nodes: tuple[tuple[Node, ...], tuple[Node, ...]], exists: torch.Tensor, edges: Sequence[tuple[str, str]]
) -> Circuit:
    """The circuit of these (writer, reader) names. Raises SelectionError for edges that there are not."""
    rows, columns = ({str(node): place for place, node in enumerate(side)} for side in nodes)
    kept = torch.zeros_like(exists)
    for writer, reader in edges:
        if writer not in rows or reader not in columns or not exists[rows[writer], columns[reader]]:
            near = did_you_mean(writer, rows) if writer not in rows else did_you_mean(reader, columns)
            raise SelectionError(
                f"there is no edge from {writer} to {reader}: an edge leads from an earlier node to a later one."
                + (sentence(near) if writer not in rows or reader not in columns else "")
            )
        kept[rows[writer], columns[reader]] = True
    return Circuit(nodes, kept, exists)
