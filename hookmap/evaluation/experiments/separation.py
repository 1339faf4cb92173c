"""Where in the layers the activations after two prefixes differ: probes, directions of mean differences, norms.

A probe that separates two prefixes may read nothing but their words. Compare its score with that of a prefix on
another subject, and with that of a copy of the neutral prefix.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from hookmap.activations import Key, call_of
from hookmap.analysis.probes.metrics import Floats
from hookmap.analysis.probes.pooling import chosen_positions, matrices
from hookmap.analysis.probes.run import Probing, probe
from hookmap.errors import SelectionError
from hookmap.evaluation.experiments.document import Reporting
from hookmap.stores.interface import Store


@dataclass(frozen=True)
class Geometry:
    """Means of one tensor, pooled one way."""

    point: str
    layer: int | None
    pool: str
    norms: dict[str, float]
    """of each prefix: mean L2 norm of a sample's pooled row"""
    moved: dict[str, float]
    """of each prefix but neutral: norm of (its mean minus neutral's), relative to neutral's norm"""
    cosines: dict[tuple[str, str], float]
    """of two prefixes' mean differences from neutral; nan where one did not move at all"""
    call: int | None = None
    """which run of a layer that runs several times; None where it runs once"""


def geometry(store: Store, names: Sequence[str], neutral: str, how: Reporting) -> Iterator[Geometry]:
    """The geometry of each pool, point and layer of the capture. One matrix is in memory at a time."""
    numbers = [sample.sample for sample in store.samples]
    prefix = np.array([(store.sample(number).labels or {})["prefix"] for number in numbers])
    memory = int(how.memory * 10**9)
    for pool in how.pools:
        chosen = chosen_positions(pool, how.positions)
        for key in _layered(store):
            ((_, matrix),) = matrices(store, key, numbers, pool, [None], memory, chosen)
            means = {name: matrix[prefix == name].mean(axis=0, dtype=np.float64) for name in names}
            norms = {name: float(np.linalg.norm(matrix[prefix == name], axis=1).mean()) for name in names}
            apart = {name: means[name] - means[neutral] for name in names if name != neutral}
            moved = {name: float(np.linalg.norm(delta)) / (norms[neutral] or 1.0) for name, delta in apart.items()}
            pairs = {pair: _cosine(apart[pair[0]], apart[pair[1]]) for pair in combinations(apart, 2)}
            yield Geometry(key[0], key[1], pool, norms, moved, pairs, call_of(key))


def probed(
    store: Store,
    name: str,
    neutral: str,
    pool: str,
    how: Reporting,
    progress: Callable[[int, int], None] | None = None,
) -> Probing:
    """Probes that separate the prefix from neutral, cross-validated by question. Raises SelectionError for too few."""
    label = f"prefix {name}"
    table = [
        {"id": sample.id, label: labels["prefix"] == name, "question": labels["question"]}
        for sample in store.samples
        if (labels := dict(sample.labels or {}))["prefix"] in (name, neutral)
    ]
    points = sorted({key[0] for key in _layered(store)}, key=store.points.index)
    return probe(
        store,
        label,
        points,
        labels=table,
        group="question",
        method=how.method,
        pool=pool,
        positions=how.positions,
        folds=how.folds,
        seed=how.seed,
        memory=int(how.memory * 10**9),
        progress=progress,
    )


def _layered(store: Store) -> list[Key]:
    found = [key for key in store.keys if key[1] is not None]
    if not found:
        raise SelectionError("the capture holds no tensor of a layer: name such points in captures.points.")
    return found


def _cosine(one: Floats, other: Any) -> float:
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size else float("nan")
