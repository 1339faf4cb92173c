"""How much of what a model does a circuit does alone: faithfulness, and its integral over sizes (Mueller et al. 2025).

f(C) = (m(C) - m(∅)) / (m(N) - m(∅)): m(C) is the metric of the clean prompts where only the circuit's edges carry
them, and all others carry the corrupted ones; N has all edges, ∅ none. CPR is the area under f over the share of edges,
CMD the area between f and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookmap.analysis.branches import branches_of, last_of
from hookmap.analysis.circuit_runs import CircuitRuns
from hookmap.analysis.circuits import Circuit
from hookmap.analysis.edge_attribution import EdgeScores
from hookmap.analysis.edge_scores import keys_of
from hookmap.analysis.pairs import encode_pairs
from hookmap.analysis.sides import sides_of
from hookmap.capture.options import TemplateOptions, with_defaults
from hookmap.errors import CaptureError, SelectionError
from hookmap.wording import counted

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""of the edges: the sizes of circuits that the benchmark MIB integrates over"""
_CLOSE = 1e-3
"""of the difference between clean and corrupted: how much a run by edges may differ from a plain one"""


@dataclass(frozen=True)
class Faithfulness:
    """What circuits do alone, of the same pairs."""

    circuits: tuple[Circuit, ...]
    metrics: torch.Tensor
    """of each circuit and pair, float32 [circuits, pairs]"""
    clean: torch.Tensor
    """the metric of the clean prompts, [pairs]: of all edges"""
    corrupted: torch.Tensor
    """that of the corrupted prompts, [pairs]: of no edge"""
    metric: str

    @property
    def shares(self) -> torch.Tensor:
        """Of the model's edges, how many are in each circuit."""
        return torch.tensor([circuit.share for circuit in self.circuits])

    @property
    def values(self) -> torch.Tensor:
        """f of each circuit, of the mean metrics: 0 as corrupted, 1 as clean."""
        clean, corrupted = self.clean.mean(), self.corrupted.mean()
        return (self.metrics.mean(1) - corrupted) / (clean - corrupted)

    @property
    def value(self) -> float:
        """f of the only circuit."""
        if len(self.circuits) != 1:
            raise SelectionError(f"these are {len(self.circuits)} circuits: see .values.")
        return float(self.values[0])

    @property
    def pairs(self) -> torch.Tensor:
        """f of each circuit and pair, [circuits, pairs]."""
        return (self.metrics - self.corrupted) / (self.clean - self.corrupted)

    def area(self, shares: Sequence[float]) -> float:
        """CPR: the area under f over the shares that the circuits were asked for, by trapezoids."""
        return float(torch.trapezoid(self.values, torch.tensor(shares)))

    def distance(self, shares: Sequence[float]) -> float:
        """CMD: the area between f and 1, by trapezoids."""
        return float(torch.trapezoid((1 - self.values).abs(), torch.tensor(shares)))

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        tensors = {name: getattr(self, name).tolist() for name in ("shares", "values", "metrics", "clean", "corrupted")}
        return {"metric": self.metric, **tensors}

    def __repr__(self) -> str:
        shown = ", ".join(f"{float(s):.1%}: {float(v):.3f}" for s, v in zip(self.shares, self.values, strict=True))
        return f"<Faithfulness, {self.metric}, {counted(len(self.clean), 'pair')}; {shown}>"


@dataclass(frozen=True)
class CircuitCurve:
    """Faithfulness over the size of circuits, by two rules of choosing edges."""

    shares: tuple[float, ...]
    signed: Faithfulness
    """edges that help the clean answer most"""
    absolute: Faithfulness
    """edges that matter most, whichever way"""

    @property
    def cpr(self) -> float:
        """The area under the faithfulness of `signed`: higher is better."""
        return self.signed.area(self.shares)

    @property
    def cmd(self) -> float:
        """The area between the faithfulness of `absolute` and 1: lower is better, 0 the least."""
        return self.absolute.distance(self.shares)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        both = {"signed": self.signed.as_json(), "absolute": self.absolute.as_json()}
        return {"shares": list(self.shares), "cpr": self.cpr, "cmd": self.cmd, **both}

    def __repr__(self) -> str:
        sizes = f"{counted(len(self.signed.clean), 'pair')}, {counted(len(self.shares), 'size')}"
        return f"<CircuitCurve of {self.signed.metric}, {sizes}: CPR {self.cpr:.3f}, CMD {self.cmd:.3f}>"


def faithfulness(
    hm: Hooked,
    pairs: Any,
    circuits: Circuit | Sequence[Circuit],
    metric: Any = "logit_difference",
    *,
    progress: Callable[[int, int], None] | None = None,
    **template: Any,
) -> Faithfulness:
    """See `HookedModel.faithfulness`."""
    chosen = (circuits,) if isinstance(circuits, Circuit) else tuple(circuits)
    if not chosen or not all(isinstance(each, Circuit) for each in chosen):
        raise SelectionError("circuits: expected one or several of EdgeScores.circuit(…).")
    if hm.standing:
        raise SelectionError("circuits run on the model itself, not on a view with interventions that stay.")
    sides = sides_of(encode_pairs(hm, pairs, with_defaults(TemplateOptions, template)), metric, noising=True)
    branches = branches_of(hm.map)
    corrupted, source = sides.run("source", keys_of(branches, last_of(hm.map))[0])
    clean, _ = sides.run("base")
    prepared = hm.prepare(list(sides.base.prompts), ["resid_pre"], [0], 0, engine="hooks", batch_size=8)
    runs = CircuitRuns(hm, sides.base, source, chosen[0].nodes, prepared)
    every = Circuit(chosen[0].nodes, chosen[0].exists, chosen[0].exists)
    none = Circuit(chosen[0].nodes, torch.zeros_like(every.kept), every.exists)
    for found, wanted in ((runs.measured(every, all_again=True), clean), (runs.measured(none), corrupted)):
        apart = (found - wanted).abs()
        if not bool((apart <= _CLOSE * (1 + (clean - corrupted).abs())).all()):
            raise CaptureError(
                f"a run by edges does not give a plain run's metric (up to {float(apart.max()):.2g} apart): the blocks "
                f"of {hm.map.architecture} do not give the same when they run again on other streams."
            )
    metrics = []
    for number, circuit in enumerate(chosen):
        metrics.append(runs.measured(circuit))
        if progress is not None:
            progress(number + 1, len(chosen))
    return Faithfulness(chosen, torch.stack(metrics), clean, corrupted, sides.base.name)


def circuit_curve(
    hm: Hooked,
    pairs: Any,
    scores: EdgeScores,
    metric: Any = "logit_difference",
    *,
    shares: Sequence[float] = SHARES,
    progress: Callable[[int, int], None] | None = None,
    **template: Any,
) -> CircuitCurve:
    """See `HookedModel.circuit_curve`."""
    sizes = tuple(float(share) for share in shares)
    if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] < 0 or sizes[-1] > 1:
        raise SelectionError(f"shares {shares!r}: expected at least two ascending shares from 0 to 1.")
    wanted = [scores.circuit(share, absolute) for absolute in (False, True) for share in sizes]
    found = faithfulness(hm, pairs, wanted, metric, progress=progress, **template)
    halves = [
        Faithfulness(tuple(wanted[part]), found.metrics[part], found.clean, found.corrupted, found.metric)
        for part in (slice(0, len(sizes)), slice(len(sizes), None))
    ]
    return CircuitCurve(sizes, *halves)
