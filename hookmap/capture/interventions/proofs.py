"""A point may be written only after a trial on this model showed that writing it changes what it should, and no more.

The stream is changed where the block reads it (run `upstream`), and what the point holds there is written into a run
without that change (`written`). What depends only on this point must then be as in `upstream`, bit for bit; what does
not depend on it must be as in `plain`; and the block's sums must hold. One trial for each point and kind of block, and
each of its runs where it has several.
"""

import threading
from dataclasses import dataclass

import torch

from hookmap.capture.engines import Engine
from hookmap.capture.interventions.expectations import (
    BRANCHES,
    OUTS,
    Trial,
    beside,
    expectations,
    not_read_back,
    same,
)
from hookmap.capture.interventions.trial_runs import Measured, TrialRuns, changed
from hookmap.capture.interventions.writable import refusal
from hookmap.capture.run import reads_attention, running
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.points import PointName, is_place
from hookmap.maps.selectors import Selector
from hookmap.maps.templates import BlockKind

_FOLLOWS = {"embed": "resid_pre", "final_norm": "logits", "logits_raw": "logits"}
"""point of the whole model -> what is computed from it"""


@dataclass(frozen=True)
class Proof:
    """The result of the trial of a point in one kind of block, in one of its runs."""

    reason: str | None
    """why it must not be written; None where writing it is proved"""
    row: tuple[int, ...] = ()
    """shape of one row"""
    dtype: torch.dtype = torch.float32


class Proofs:
    """The proofs of one opened model, each made when it is first asked for."""

    def __init__(self, engine: Engine, architecture_map: ArchitectureMap, measured: Measured = tuple) -> None:
        """`measured`: see `hookmap.capture.places.Places`."""
        self._engine, self._map, self._measured = engine, architecture_map, measured
        self._found: dict[tuple[str, str, int | None], Proof] = {}
        self._runs: dict[tuple[str, int | None, bool], TrialRuns] = {}
        self._eager = False
        """whether attention is eager now: its numbers are others in their last bits"""
        self._lock = threading.RLock()

    def of(self, selector: Selector) -> Proof:
        """Whether this point may be written in this kind of block."""
        kind = None if selector.layer is None else self._map.kind_of(selector.layer)
        eager = reads_attention([selector])
        with self._lock, running(self._engine, eager):
            self._eager = eager
            return self._proof(PointName.of(selector.point).as_mixer(), kind, selector.call)

    def _proof(self, point: str, kind: BlockKind | None, call: int | None) -> Proof:
        key = (point, "" if kind is None else kind.name, call)
        if key not in self._found:
            place = point if is_place(point) else None
            eager = point if place is None and PointName.of(point).definition.eager else None
            runs = TrialRuns(self._engine, self._map, kind, call, place, eager, self._measured)
            runs = runs if place or eager else self._runs.setdefault((*key[1:], self._eager), runs)
            selector = runs.selector(point)
            reason = refusal(selector)
            try:
                proof = Proof(reason) if reason else self._tried(runs, selector, kind)
            except Exception as error:  # a model's own code raises what it likes
                proof = Proof(f"writing it failed when it was tried ({type(error).__name__}: {error})")
            self._found[key] = proof
        return self._found[key]

    def _tried(self, runs: TrialRuns, selector: Selector, kind: BlockKind | None) -> Proof:
        if (reason := runs.why_not_finite()) is not None:
            return Proof(reason)
        value = runs.plain[selector.key]
        if not value.is_floating_point():
            return Proof(f"it holds {value.dtype}, which are no values to be changed a little")
        if kind is None or is_place(selector.point):
            failure = _of_model(runs, selector)
        else:
            failure = self._of_block(runs, selector, kind)
        return Proof(failure, tuple(value.shape[1:]), value.dtype)

    def _of_block(self, runs: TrialRuns, selector: Selector, kind: BlockKind) -> str | None:
        """What is wrong with writing a point of a block."""
        reads = self._isolates(selector.point, kind, selector.call)
        if reads is not None and reads not in runs.patched:
            read = runs.selector(reads)
            runs.patched[reads] = runs.run({read: runs.upstream[read.key]})
        upstream = runs.upstream if reads is None else runs.patched[reads]
        written = runs.run({selector: upstream[selector.key]})
        runs.patched[selector.point] = written
        trial = Trial(selector, runs.plain, upstream, written, runs.repeats)
        for expectation in expectations(kind, selector, runs.plain.keys(), isolated=reads is not None):
            if (failure := expectation.failure(trial)) is not None:
                return failure
        return _leak(runs, selector, kind)

    def _isolates(self, point: str, kind: BlockKind, call: int | None) -> str | None:
        """What the point's branch reads, if it is proved that writing it changes nothing else."""
        name = PointName.of(point)
        for branch, points in BRANCHES.items():
            reads = name.numbered(f"{branch}_in")
            if name.base in points[1:] and reads in kind.points:
                return reads if self._proof(reads, kind, call).reason is None else None
        return None


def _of_model(runs: TrialRuns, selector: Selector) -> str | None:
    """What is wrong with writing a point of the whole model."""
    key = selector.key
    value = changed(runs.plain[key])
    written = runs.run({selector: value})
    behind = runs.end if is_place(selector.point) else _FOLLOWS.get(selector.point)
    follows = next((k for k in written if k[0] == behind), None)
    if follows is not None and torch.equal(written[follows], runs.plain[follows]):
        return f"nothing behind it changed ({follows[0]})"
    return not_read_back(selector, written[key], value)


def _leak(runs: TrialRuns, selector: Selector, kind: BlockKind) -> str | None:
    """With the branch's output put back, what was written inside the branch must not be seen behind it."""
    name = PointName.of(selector.point)
    branch = next((b for b, points in BRANCHES.items() if name.base in points and name.base not in OUTS), None)
    out = name.numbered(f"{branch}_out")
    if branch is None or out not in kind.points or refusal(back := runs.selector(out)):
        return None  # where the output is a sum, the block's relations were held against it
    written = {
        selector: runs.upstream[selector.key],
        back: runs.plain[back.key],
    }
    key, exact = beside(selector, "resid_post"), runs.repeats and back.terms[0].scale == 1.0
    if same(runs.run(written)[key], runs.plain[key], exact):
        return None
    return f"it is read outside of the branch too: resid_post changes even with {out} put back"
