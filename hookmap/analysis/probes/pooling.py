"""Reads rows of a capture, sample by sample, into one matrix [samples, features] at a time.

Memory is bounded: it holds one matrix and what a fit makes of it; of single positions, as many matrices as fit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hookmap.activations import Key, Sample
from hookmap.capture.finiteness import kept_in
from hookmap.capture.rows import RowSelection, row_selection
from hookmap.errors import SelectionError
from hookmap.maps.points import PointName
from hookmap.stores.interface import Store, position_of, rows_of
from hookmap.stores.ledger import tensor_name

POOLS = {
    "last": "the last token that was fed to the model",
    "last_prompt": "the last token of the prompt, before anything is answered",
    "mean": "the mean over all tokens that the capture holds",
    "mean_prompt": "the mean over those of the prompt",
    "mean_answer": "the mean over those of the answer",
    "each": "each position by itself, counted from the end of the prompt (-1 is its last token, 0 the first answered)",
}
COPIES = 6
"""of a matrix while a probe is fitted: itself, its training part, that standardised, and up to three in the solver"""
_ROWS = 256
Matrix = NDArray[np.float32]
FAR = 10
"""a row norm of this many times the median one dominates a mean"""


@dataclass
class RowLengths:
    """Compares the norms of the rows in each mean: an attention sink has 100 times the norm of the others."""

    shares: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, norms: torch.Tensor) -> None:
        """Add the L2 norms of one sample's rows, [n]; a single row is ignored."""
        if len(norms) > 1 and (middle := float(norms.median())) > 0:
            self.shares.append(float(norms.max() / norms.sum()))
            self.times.append(float(norms.max()) / middle)

    @property
    def share(self) -> float | None:
        """The largest norm as a share of the sum of norms, mean over samples."""
        return float(np.mean(self.shares)) if self.shares else None

    @property
    def ratio(self) -> float | None:
        """The largest norm divided by the median one, median over samples."""
        return float(np.median(self.times)) if self.times else None


def chosen_positions(pool: str, positions: Any) -> RowSelection | None:
    """The positions that a pool is restricted to; None for all. Raises SelectionError."""
    if positions is None or pool == "each":
        return None
    found = row_selection(positions=positions)
    if found.reads_tokens or found.positions in ("last", "last_prompt"):
        raise SelectionError(
            f'positions {positions!r} of a pool: expected a span such as "1:", positions, "prompt" or "generated". '
            "One token alone is a pool: pool=last (--pool last)."
        )
    return found


def probed_positions(samples: Sequence[Sample], pool: str, positions: Any = None) -> tuple[int | None, ...]:
    """The positions to probe: those that every sample has with pool="each", else (None,).

    positions: with pool="each", only this slice of them, such as slice(-8, 4). Raises SelectionError.
    """
    if pool not in POOLS:
        raise SelectionError(f"pool {pool!r}: expected one of {', '.join(POOLS)}.")
    if pool != "each":
        return (None,)
    if not isinstance(positions, slice | None):
        raise SelectionError(f'positions {positions!r}: with pool="each" expected a slice such as slice(-8, 4).')
    common: set[int] | None = None
    for sample in samples:
        if sample.positions == "mean":
            raise SelectionError("the capture holds a mean over positions: it has no single ones. Use pool=mean.")
        mine = {position - sample.prompt_tokens for position in sample.row_positions}
        common = mine if common is None else common & mine
    low, high = (None, None) if positions is None else (positions.start, positions.stop)
    found = sorted(p for p in common or () if (low is None or p >= low) and (high is None or p < high))
    if not found:
        raise SelectionError("there is no position, counted from the end of the prompt, that every sample has.")
    return tuple(found)


def matrices(
    store: Store,
    key: Key,
    numbers: Sequence[int],
    pool: str,
    wanted: Sequence[int | None],
    memory: int,
    chosen: RowSelection | None = None,
    lengths: RowLengths | None = None,
) -> Iterator[tuple[int | None, Matrix]]:
    """For each position (None for a pool) a float32 matrix [samples, features].

    `chosen`: the positions that a pool is restricted to. `lengths`: gets the row norms of each mean.
    Raises SelectionError where a matrix does not fit `memory`.
    """
    if "key" in PointName.of(key[0]).definition.axes:
        raise SelectionError(f"{key[0]} is as wide as its sample is long: a probe needs rows of one width.")
    width = store.rows_at(numbers[0], key, [0]).numel()
    size = len(numbers) * width * 4
    if COPIES * size > memory:
        most = memory // (COPIES * width * 4)
        raise SelectionError(
            f"{len(numbers)} samples of {width} numbers need {COPIES * size:,} bytes to fit a probe, {memory:,} are "
            f"allowed: take {most} samples (--limit {most}), or allow more (--memory)."
        )
    if pool != "each":
        yield None, _pooled(store, key, numbers, pool, width, chosen, lengths)
        return
    step = max(1, (memory - (COPIES - 1) * size) // size)
    for start in range(0, len(wanted), step):
        yield from _at(store, key, numbers, [p for p in wanted[start : start + step] if p is not None], width)


def _pooled(
    store: Store,
    key: Key,
    numbers: Sequence[int],
    pool: str,
    width: int,
    chosen: RowSelection | None,
    lengths: RowLengths | None,
) -> Matrix:
    found = np.empty((len(numbers), width), dtype=np.float32)
    for index, number in enumerate(numbers):
        rows = pooled_rows(store.sample(number), pool, chosen)
        total, norms = np.zeros(width, dtype=np.float64), []
        for start in range(0, len(rows), _ROWS):
            read = _flat(store.rows_at(number, key, rows[start : start + _ROWS])).double()
            total += read.sum(0).numpy()
            norms.append(read.norm(dim=1))
        if not np.isfinite(total).all():
            raise _not_finite(store, key, number, rows)
        found[index] = total / len(rows)
        if lengths is not None:
            lengths.add(torch.cat(norms))
    return found


def _at(
    store: Store, key: Key, numbers: Sequence[int], wanted: Sequence[int], width: int
) -> Iterator[tuple[int, Matrix]]:
    found = np.empty((len(wanted), len(numbers), width), dtype=np.float32)
    for index, number in enumerate(numbers):
        sample = store.sample(number)
        rows = store.rows_at(number, key, rows_of([position + sample.prompt_tokens for position in wanted], sample))
        flat = _flat(rows)
        if not bool(flat.isfinite().all()):
            raise _not_finite(store, key, number, range(sample.rows))
        found[:, index] = flat.numpy()
    for index, position in enumerate(wanted):
        yield position, found[index].copy()  # a view would keep all positions in memory


def _not_finite(store: Store, key: Key, number: int, rows: Sequence[int]) -> SelectionError:
    """The error that names the first of these rows with an infinity or nan."""
    sample = store.sample(number)
    bad = next((row for row in rows if not bool(_flat(store.rows_at(number, key, [row])).isfinite().all())), rows[0])
    at = position_of(sample, bad)
    where = "its mean" if at is None else f"position {at}"
    return SelectionError(
        f"no probe: {tensor_name(key)} of sample {number} is not finite, first at {where}. {kept_in(store)}"
    )


def pooled_rows(sample: Sample, pool: str, chosen: RowSelection | None) -> Sequence[int]:
    """The rows of a sample that the pool averages. Raises SelectionError where the capture holds none of them."""
    positions = sample.positions
    if positions == "mean" and chosen is not None:
        raise SelectionError(
            f"sample {sample.sample} is one mean over positions: none can be left out of it. Capture without mean, or "
            'with positions: hookmap capture --mean --positions "1:"'
        )
    if positions == "mean":
        if pool != "mean":
            raise SelectionError(
                f"sample {sample.sample} is one mean over positions: pool={pool} cannot be told. Use pool=mean."
            )
        return range(1)
    own = sample.row_positions
    end = sample.prompt_tokens
    found: Sequence[int]
    if pool == "last":
        last = sample.rows - 1 if positions is None else max(end, len(sample.token_ids) - 1) - 1
        found = [len(own) - 1] if own and own[-1] >= last else []
    elif pool == "mean":
        found = range(len(own))
    elif pool == "last_prompt":
        found = [row for row, position in enumerate(own) if position == end - 1]
    else:
        found = [row for row, position in enumerate(own) if (position < end) == (pool == "mean_prompt")]
    if not found:
        raise SelectionError(f"sample {sample.sample} has no rows of {POOLS[pool]}: pool={pool} cannot be told.")
    if chosen is not None:
        wanted = chosen.wanted(end, marked=sample.image_positions or ())
        found = [row for row in found if wanted(own[row], -1)]
    if not found:
        raise SelectionError(
            f"sample {sample.sample} has no rows of {POOLS[pool]} at the positions asked for (--positions)."
        )
    return found


def _flat(rows: torch.Tensor) -> torch.Tensor:
    return (rows.to_dense() if rows.is_sparse else rows.flatten(1)).float()
