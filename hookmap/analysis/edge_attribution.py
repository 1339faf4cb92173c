"""Edge attribution patching (Syed et al. 2023), and with integrated gradients (Hanna et al. 2024).

An edge leads from what a head or an MLP adds to the stream, or from the embedding, to what a later head's queries, keys
or values, a later MLP, or the logits read of it. Its score is what putting the other prompt's value through this edge
alone would do to the metric, to first order, summed over positions. A seeded sample of the edges is patched truly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookmap.analysis.branches import branches_of, last_of
from hookmap.analysis.circuits import Circuit, largest
from hookmap.analysis.edge_effects import edge_effects, patchable
from hookmap.analysis.edge_scores import Node, Scoring, close_to, keys_of
from hookmap.analysis.gradients import planned
from hookmap.analysis.pairs import encode_pairs
from hookmap.analysis.sides import Sides, check_steps, middles, path_of, refuse_infinite, sides_of
from hookmap.analysis.true_effects import Comparison, check_count, sampled
from hookmap.capture.options import BATCH_TOKENS, TemplateOptions, with_defaults
from hookmap.errors import SelectionError
from hookmap.stores.durable_files import writing
from hookmap.wording import counted

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked


@dataclass(frozen=True)
class EdgeScores:
    """Estimated effects of edges on a metric, summed over positions."""

    nodes: tuple[tuple[Node, ...], tuple[Node, ...]]
    """the writers and the readers, in forward order"""
    scores: torch.Tensor
    """float32 [pairs, writers, readers]; nan where there is no edge"""
    base: torch.Tensor
    """the metric of the runs that would be patched, [pairs]"""
    source: torch.Tensor
    """that of the runs whose values would be put in, [pairs]"""
    metric: str
    noising: bool
    """whether corrupted values go into the clean run; else clean ones into the corrupted run"""
    steps: int
    check: Comparison
    """the same effects by true patches of edges, of a sample"""

    @property
    def writers(self) -> tuple[str, ...]:
        """`resid_pre[0]` (the embedding), `mixer_out[0] head 0`, …, `mlp_out[0]`, …"""
        return tuple(map(str, self.nodes[0]))

    @property
    def readers(self) -> tuple[str, ...]:
        """`q[0] head 0`, …, `k[0] head 0`, …, `v[0] head 0`, …, `mlp_in[0]`, …, `logits`."""
        return tuple(map(str, self.nodes[1]))

    @property
    def mean(self) -> torch.Tensor:
        """[writers, readers]: the mean over the pairs."""
        return self.scores.mean(0)

    @property
    def edges(self) -> int:
        """How many edges there are."""
        return int((~self.scores[0].isnan()).sum())

    def __getitem__(self, edge: tuple[str, str]) -> torch.Tensor:
        """`found["mlp_out[0]", "q[5] head 1"]`: its score of each pair."""
        try:
            row, column = self.writers.index(edge[0]), self.readers.index(edge[1])
        except ValueError as error:
            raise SelectionError(f"no edge {edge!r}: see .writers and .readers for their names.") from error
        return self.scores[:, row, column]

    def top(self, count: int = 10) -> list[tuple[str, str, float]]:
        """The edges of the largest mean: (writer, reader, mean)."""
        order = self.mean.abs().nan_to_num(-1).flatten().topk(min(count, self.edges)).indices.tolist()
        places = [divmod(place, len(self.readers)) for place in order]
        return [(self.writers[row], self.readers[column], float(self.mean[row, column])) for row, column in places]

    def circuit(self, edges: int | float, absolute: bool = True) -> Circuit:
        """The edges of the largest mean score: a number of them, or a share of all where it is a float.

        absolute: by their size; otherwise those that move the metric towards the clean prompt's most.
        """
        return largest(self.nodes, self._signed(), edges, absolute)

    def _signed(self) -> torch.Tensor:
        """The mean; positive where the edge helps the clean prompt's answer."""
        return -self.mean if self.noising else self.mean

    def __repr__(self) -> str:
        steps = f", {self.steps} steps" if self.steps > 1 else ""
        way = "noising" if self.noising else "denoising"
        sizes = f"{counted(len(self.scores), 'pair')}, {counted(self.edges, 'edge')}, {way}{steps}"
        return f"<EdgeScores of {self.metric}: {sizes}; {self.check!r}>"

    def as_json(self, top: int | None = None) -> dict[str, Any]:
        """Plain JSON data: every edge, or the `top` ones, with its mean and each pair's own; and the comparison."""
        names = [(writer, reader) for writer, reader, _ in self.top(self.edges if top is None else top)]
        edges = [
            {
                "from": writer,
                "to": reader,
                "mean": float(self[writer, reader].mean()),
                "pairs": self[writer, reader].tolist(),
            }
            for writer, reader in names
        ]
        about = {name: getattr(self, name) for name in ("metric", "noising", "steps", "edges")}
        sides = {"base": self.base.tolist(), "source": self.source.tolist()}
        return {**about, **sides, "top": edges, "check": self.check.as_json()}

    def save(self, path: str | Path) -> Path:
        """Writes the scores as PATH.safetensors, and names, metric and comparison as PATH.json. Returns the former.

        Raises StoreError where writing fails.
        """
        from safetensors.torch import save_file

        target = Path(path).with_suffix(".safetensors")
        about = self.as_json(top=0) | {"writers": list(self.writers), "readers": list(self.readers)}
        with writing(target):
            save_file({"scores": self.scores.contiguous()}, target)
            target.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return target


def edge_attribution(
    hm: Hooked,
    pairs: Any,
    metric: Any = "logit_difference",
    *,
    noising: bool = False,
    steps: int = 1,
    check: int = 16,
    seed: int = 0,
    batch_size: int | None = 8,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    **template: Any,
) -> EdgeScores:
    """See `HookedModel.edge_attribution`."""
    check_steps(steps), check_count(check)
    branches_of(hm.map)  # raises before anything runs
    sides = sides_of(encode_pairs(hm, pairs, with_defaults(TemplateOptions, template)), metric, noising)
    done: list[tuple[tuple[int, ...], Scoring]] = []
    ends: dict[int, tuple[float, float]] = {}
    for numbers in sides.batches(batch_size, batch_tokens):
        scoring, measured = _scored(sides.of(numbers), steps)
        done.append((numbers, scoring))
        ends |= dict(zip(numbers, measured, strict=True))
        if progress is not None:
            progress(len(ends), len(sides))
    nodes, table = _table(done, len(sides), close_to(next(hm.root.parameters())))
    base, source = torch.tensor([ends[number] for number in range(len(sides))]).T
    comparison = _compared(sides, nodes, table, base, (check, seed))
    return EdgeScores(nodes, table, base, source, sides.base.name, noising, steps, comparison)


def _scored(sides: Sides, steps: int) -> tuple[Scoring, list[tuple[float, float]]]:
    branches, last = branches_of(sides.hm.map), last_of(sides.hm.map)
    values, graph = keys_of(branches, last)
    end, source = sides.run("source", values)
    start, base = sides.run("base", values)
    path = None if steps == 1 else path_of(sides)
    scoring = Scoring(sides.hm.map, branches, base, source, last, len(sides), steps)
    for share in [0.0] if path is None else middles(steps):
        options: dict[str, Any] = {"batch_size": len(sides), "batch_tokens": 10**9}
        if path is not None:
            options["interventions"] = path.at(share)
        plan = planned(sides.hm, None, sides.base, graph, "all", options)
        plan.checked()
        plan.run.local = scoring
        plan.all()
    return scoring, [(float(one), float(other)) for one, other in zip(start, end, strict=True)]


def _table(
    done: Sequence[tuple[tuple[int, ...], Scoring]], pairs: int, negligible: float
) -> tuple[tuple[tuple[Node, ...], tuple[Node, ...]], torch.Tensor]:
    """The writers and readers in forward order, and the scores [pairs, writers, readers].

    What a branch does besides its heads is left out where it is a smaller share of it than `negligible`.
    """
    first = done[0][1]
    for _, scoring in done:
        refuse_infinite([*scoring.scores.values()], "an edge's score")
    small = {node for node in first.sizes if all(scoring.sizes[node] <= negligible for _, scoring in done)}
    readers = sorted((node for node in first.scores if node not in small), key=_place)
    kept = [place for place, node in enumerate(first.writers) if node not in small]
    table = torch.full((pairs, len(first.writers), len(readers)), float("nan"))
    for numbers, scoring in done:
        for column, reader in enumerate(readers):
            own = scoring.scores[reader]
            table[list(numbers), : own.shape[1], column] = own
    return (tuple(first.writers[place] for place in kept), tuple(readers)), table[:, kept].contiguous()


def _place(node: Node) -> tuple[float, str, int]:
    """Where a node comes in the order of the forward pass: the input first, the logits last."""
    branch = float("inf") if node.key is None else float(node.branch)
    head = 10**9 if node.rest else -1 if node.head is None else node.head
    order = {"q": "0", "k": "1", "v": "2"}
    name = "" if node.key is None else node.key[0]
    return branch, order.get(name.partition(".")[0], name), head


def _compared(
    sides: Sides, nodes: tuple[tuple[Node, ...], tuple[Node, ...]], table: torch.Tensor, base: torch.Tensor, check: Any
) -> Comparison:
    """The scores of some edges beside the effects of patches of them. `check`: how many, and the seed of the draw."""
    writers, readers = nodes
    rows, columns = patchable(sides.hm, writers, readers)
    allowed = ~table.isnan() & rows[None, :, None] & columns[None, None, :]
    places = allowed.nonzero()
    chosen = places[sampled(table[allowed].abs(), *check)] if len(places) else places
    edges = [(int(pair), writers[int(row)], readers[int(column)]) for pair, row, column in chosen]
    if not edges:
        return Comparison((), torch.empty(0), torch.empty(0))
    estimated = torch.stack([table[tuple(place)] for place in chosen])
    true = edge_effects(sides, edges) - base[[pair for pair, _, _ in edges]]
    return Comparison(tuple(f"pair {pair} {one} -> {other}" for pair, one, other in edges), estimated, true)
