"""Attribution patching: what a patch would do to a metric, to first order, of every cell by one backward pass.

The effect of a patch is about the gradient at the cell times the difference that the patch makes there (Nanda 2023).
With several steps the gradient is the mean along the straight path between both prompts' embeddings. A seeded sample of
the cells is patched truly, and the correlation of both is part of every result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookmap.activations import Key, call_of
from hookmap.analysis.gradients import planned
from hookmap.analysis.grid import Grid
from hookmap.analysis.metrics import measure
from hookmap.analysis.pairs import encode_pairs
from hookmap.analysis.sides import Sides, check_steps, middles, of_sample, path_of, read, refuse_infinite, sides_of
from hookmap.analysis.tokens import token_texts
from hookmap.analysis.true_effects import Comparison, check_count, sampled
from hookmap.capture.interventions.plan import EditPlan
from hookmap.capture.options import BATCH_SIZE, BATCH_TOKENS, TemplateOptions, with_defaults
from hookmap.capture.stacks import label
from hookmap.errors import SelectionError
from hookmap.maps.selectors import Selector
from hookmap.stores.durable_files import writing
from hookmap.stores.ledger import tensor_name
from hookmap.wording import counted

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked


@dataclass(frozen=True)
class AttributionPatch:
    """Estimated effects on a metric: of each pair, point, layer, position, and head where the point has such."""

    scores: dict[Key, tuple[torch.Tensor, ...]]
    """of each tensor, for each pair: float32 [pos], or [pos, heads]"""
    base: torch.Tensor
    """the metric of the runs that would be patched, [pairs]"""
    source: torch.Tensor
    """that of the runs whose values would be put in, [pairs]"""
    tokens: tuple[tuple[str, ...], ...]
    """of each pair, the texts of the tokens that run"""
    metric: str
    noising: bool
    """whether corrupted values go into the clean run; else clean ones into the corrupted run"""
    steps: int
    check: Comparison
    """the same effects by true patches, of a sample of the cells"""

    @property
    def keys(self) -> tuple[Key, ...]:
        """(point, layer), in forward order."""
        return tuple(self.scores)

    def __getitem__(self, key: Key) -> torch.Tensor | list[torch.Tensor]:
        """`found["z", 8]`: [pairs, pos, heads], or of pairs of different lengths a list of [pos, heads]."""
        found = self.scores.get(tuple(key))  # type: ignore[arg-type]  # a tuple of the same parts
        if found is None:
            raise SelectionError(f"no attribution of {key!r}: there are {', '.join(map(label, self.keys[:8]))}, …")
        return torch.stack(found) if len({each.shape for each in found}) == 1 else [*found]

    def nodes(self) -> list[tuple[str, torch.Tensor]]:
        """Of each head, or each point of a layer: its name, `z[8] head 3`, and its effects summed over positions.

        The effects are [pairs]; the largest mean comes first.
        """
        found = []
        for key, parts in self.scores.items():
            sums = torch.stack([each.sum(0) for each in parts])
            if sums.ndim == 1:
                found.append((label(key), sums))
            else:
                found += [(f"{label(key)} head {head}", sums[:, head]) for head in range(sums.shape[1])]
        return sorted(found, key=lambda each: -abs(float(each[1].mean())))

    def by_head(self, point: str = "z") -> torch.Tensor:
        """[layers, heads]: summed over positions, the mean over the pairs; nan where a layer has fewer heads."""
        rows = [
            torch.stack([each.sum(0) for each in parts]).mean(0)
            for key, parts in self.scores.items()
            if key[0] == point
        ]
        if not rows or rows[0].ndim != 1:
            raise SelectionError(f"{point} has no heads here: by_head is of z, q, k or v that were asked for.")
        most = max(map(len, rows))
        return torch.stack([torch.nn.functional.pad(row, (0, most - len(row)), value=float("nan")) for row in rows])

    def grid(self, point: str, pair: int | None = None) -> Grid:
        """[layers, positions] of one pair, or the mean over all, which must be equally long; summed over heads."""
        own = {key: parts for key, parts in self.scores.items() if key[0] == point}
        if not own:
            raise SelectionError(
                f"no attribution of {point}: there are {', '.join(dict.fromkeys(k[0] for k in self.keys))}."
            )
        numbers = range(len(self.tokens)) if pair is None else [pair]
        if len({len(self.tokens[number]) for number in numbers}) > 1:
            raise SelectionError(
                "these pairs have different lengths, so their positions have no mean: say which pair=."
            )
        rows = [
            torch.stack([parts[n] if parts[n].ndim == 1 else parts[n].sum(1) for n in numbers])
            for parts in own.values()
        ]
        calls = tuple(call_of(key) for key in own)
        return Grid(
            torch.stack(rows).mean(1),
            tuple(-1 if key[1] is None else key[1] for key in own),
            tuple(range(rows[0].shape[1])),
            self.tokens[numbers[0]],
            f"estimated effect on the {self.metric}",
            point,
            calls if any(call is not None for call in calls) else (),
        )

    def __repr__(self) -> str:
        points = ", ".join(dict.fromkeys(key[0] for key in self.keys))
        sizes = f"{counted(len(self.tokens), 'pair')}, {points}, {'noising' if self.noising else 'denoising'}"
        steps = f", {self.steps} steps" if self.steps > 1 else ""
        return f"<AttributionPatch of {self.metric}: {sizes}{steps}; {self.check!r}>"

    def as_json(self, top: int | None = None) -> dict[str, Any]:
        """Plain JSON data: of each node, or the `top` ones, its mean and each pair's own; and the comparison."""
        nodes = [
            {"node": name, "mean": float(values.mean()), "pairs": values.tolist()}
            for name, values in self.nodes()[:top]
        ]
        about = {name: getattr(self, name) for name in ("metric", "noising", "steps")}
        sides = {"base": self.base.tolist(), "source": self.source.tolist()}
        return {**about, **sides, "nodes": nodes, "check": self.check.as_json()}

    def save(self, path: str | Path) -> Path:
        """Writes every score as PATH.safetensors, rows of all pairs behind each other, and the rest as PATH.json.

        Returns PATH.safetensors. Raises StoreError where writing fails.
        """
        from safetensors.torch import save_file

        target = Path(path).with_suffix(".safetensors")
        tensors = {tensor_name(key): torch.cat(parts).contiguous() for key, parts in self.scores.items()}
        lengths = [len(tokens) for tokens in self.tokens]
        with writing(target):
            save_file(tensors, target, {"lengths": json.dumps(lengths)})
        with writing(target.with_suffix(".json")):
            text = json.dumps({**self.as_json(), "lengths": lengths}, indent=2, ensure_ascii=False)
            target.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        return target


def attribution_patch(
    hm: Hooked,
    pairs: Any,
    metric: Any = "logit_difference",
    points: Any = ("z", "mlp_out"),
    layers: Any = "all",
    *,
    calls: Any = "all",
    noising: bool = False,
    steps: int = 1,
    check: int = 16,
    seed: int = 0,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    **template: Any,
) -> AttributionPatch:
    """See `HookedModel.attribution_patch`."""
    check_steps(steps), check_count(check)
    sides = sides_of(encode_pairs(hm, pairs, with_defaults(TemplateOptions, template)), metric, noising)
    selectors = hm.selectors(points, layers, calls)
    scores: dict[int, dict[Key, torch.Tensor]] = {}
    metrics: dict[int, tuple[float, float]] = {}
    for numbers in sides.batches(batch_size, batch_tokens):
        found, measured = _scored(sides.of(numbers), points, layers, calls, steps)
        scores |= dict(zip(numbers, found, strict=True))
        metrics |= dict(zip(numbers, measured, strict=True))
        if progress is not None:
            progress(len(scores), len(sides))
    base, source = torch.tensor([metrics[number] for number in range(len(sides))]).T
    ordered = {s.key: tuple(scores[number][s.key] for number in range(len(sides))) for s in selectors}
    refuse_infinite([each for parts in ordered.values() for each in parts], "an effect")
    prompts = sides.base.prompts
    tokens = tuple(token_texts(hm, p.token_ids, range(len(p.token_ids)), p.image_positions) for p in prompts)
    comparison = _compared(sides, selectors, ordered, base, (check, seed), batch_size or BATCH_SIZE)
    return AttributionPatch(ordered, base, source, tokens, sides.base.name, noising, steps, comparison)


def _scored(
    sides: Sides, points: Any, layers: Any, calls: Any, steps: int
) -> tuple[list[dict[Key, torch.Tensor]], list[tuple[float, float]]]:
    """Of each pair of a batch its scores, and its metric in the base and in the source."""
    end, source = sides.run("source", points, layers, calls)
    path = None if steps == 1 else path_of(sides)
    start, base = (torch.empty(0), None) if path is None else sides.run("base", points, layers, calls)
    mean: list[dict[Key, torch.Tensor]] = [{} for _ in range(len(sides))]
    for share in [0.0] if path is None else middles(steps):
        options: dict[str, Any] = {"calls": calls, "batch_size": len(sides), "batch_tokens": 10**9}
        if path is not None:
            options["interventions"] = path.at(share)
        plan = planned(sides.hm, None, sides.base, points, layers, options)
        plan.checked()
        gradients, values = plan.all()
        start = plan.measured if base is None else start
        for number, own in enumerate(mean):
            for key in values.keys:
                before = read(values if base is None else base, number, key)
                score = ((read(source, number, key) - before) * read(gradients, number, key)).sum(-1) / steps
                own[key] = own[key] + score if key in own else score
    return mean, [(float(one), float(other)) for one, other in zip(start, end, strict=True)]


@dataclass(frozen=True)
class _Cell:
    pair: int
    selector: Selector
    position: int
    head: int | None

    def __str__(self) -> str:
        head = "" if self.head is None else f" head {self.head}"
        return f"pair {self.pair} {label(self.selector.key)}{head} at {self.position}"


def _compared(
    sides: Sides,
    selectors: Sequence[Selector],
    scores: dict[Key, tuple[torch.Tensor, ...]],
    base: torch.Tensor,
    check: tuple[int, int],
    batch_size: int,
) -> Comparison:
    """The scores of some cells beside the effects of patches there. `check`: how many, and the seed of the draw."""
    written = [selector for selector in selectors if sides.hm.proofs.of(selector).reason is None]
    if not written:
        return Comparison((), torch.empty(0), torch.empty(0))
    parts = [(selector, pair, each) for selector in written for pair, each in enumerate(scores[selector.key])]
    sizes = torch.cat([each.flatten().abs() for _, _, each in parts])
    starts = torch.tensor([0, *(each.numel() for _, _, each in parts)]).cumsum(0)
    cells, estimated = [], []
    for number in sampled(sizes, *check):
        part = int(torch.searchsorted(starts, number, right=True)) - 1
        selector, pair, own = parts[part]
        within = number - int(starts[part])
        position, head = divmod(within, own.shape[1]) if own.ndim == 2 else (within, None)
        cells.append(_Cell(pair, selector, position, head))
        estimated.append(float(own.flatten()[within]))
    true = _patched(sides, cells, batch_size) - base[[cell.pair for cell in cells]]
    return Comparison(tuple(map(str, cells)), torch.tensor(estimated), true)


def _patched(sides: Sides, cells: Sequence[_Cell], batch_size: int) -> torch.Tensor:
    """The metric of the base with each cell alone from the source, [cells]."""
    pairs = list(dict.fromkeys(cell.pair for cell in cells))
    wanted: dict[str, Any] = {}
    for cell in cells:
        layers = wanted.setdefault(cell.selector.point, [] if cell.selector.layer is not None else "all")
        if cell.selector.layer is not None and cell.selector.layer not in layers:
            layers.append(cell.selector.layer)
    _, source = sides.of(pairs).run("source", wanted)
    edits = []
    for sample, cell in enumerate(cells):
        key = cell.selector.key
        row = source.read(pairs.index(cell.pair), key[0], key[1], call_of(key))[cell.position]
        heads = None if cell.head is None else (cell.head,)
        edits.append(of_sample(cell.selector, sample, row[None], [cell.position], heads))
    bound = sides.base.of([cell.pair for cell in cells])
    return measure(sides.hm, None, bound, EditPlan(tuple(edits), []), batch_size=batch_size)
