"""Checks of scans: what is changed at one position moves what depends on it, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from hookmap.maps.terms import Term
from hookmap.verification.check import Check
from hookmap.verification.context import Context
from hookmap.verification.heads import times
from hookmap.verification.runner import Hook, observe

_POINTS = ("scan_in", "scan_out", "mixer_gate")
_PROJECTED = {"q_latent": "q", "k_latent": "v"}
"""what is compressed -> what proves it, where that is there"""


def scans(run: Context) -> Iterator[Check]:
    """Of another `mixer_in` at one position the gate moves there alone, the scan's output there and behind; of another
    gate, the mixer's output there alone.
    """
    for kind in run.map.kinds:
        layer, place = kind.layers[0], run.given.positions // 2
        names = (*_POINTS, *(name for name, made in _PROJECTED.items() if (made, layer) not in run.values))
        there = [run.selector[name, layer] for name in names if (name, layer) in run.values]
        read = run.selector.get(("mixer_in", layer))
        if not there or read is None or read.side != "output" or len(read.terms) > 1:
            continue
        after, _ = observe(run.model, run.given, there, [_turning(run, read.terms[0], place)])
        for selector in there:
            name = selector.point
            change = (after[name, layer] - run.values[name, layer]).abs().flatten(2).amax((0, 2))
            moved = (change > run.tolerance).nonzero().flatten().tolist()
            behind = bool(moved) and moved[0] == place and (name == "scan_in" or moved[-1] > place)
            alone = moved in ([place], [place, place + 1])  # the next one too: a token shift (RWKV)
            right = alone if name == "mixer_gate" or name in _PROJECTED else behind
            detail = f"the sign of mixer_in at position {place} turned: {name} moves at {moved}"
            yield Check("scan", (layer,), right, detail)
        yield from _gated(run, layer, place)


def _gated(run: Context, layer: int, place: int) -> Iterator[Check]:
    gate, out = (run.selector.get((name, layer)) for name in ("mixer_gate", "mixer_out_raw"))
    if gate is None or out is None or gate.side != "output" or out.key not in run.values:
        return
    term = gate.terms[0]
    one = times(run, "mixer_gate", layer, 0, place, -1.0)
    turning = _turning(run, term, place) if term.heads is None else one
    after, _ = observe(run.model, run.given, [out], [turning])
    change = (after[out.point, layer] - run.values[out.point, layer]).abs().flatten(2).amax((0, 2))
    moved = (change > run.tolerance).nonzero().flatten().tolist()
    detail = f"the sign of mixer_gate at position {place} turned: mixer_out_raw moves at {moved}"
    yield Check("scan", (layer,), moved == [place], detail)


def _turning(run: Context, term: Term, place: int) -> Hook:
    """A hook that turns the sign of what a module gives at one position."""

    def act(args: Any, kwargs: Any, output: Any) -> Any:
        tensor: Tensor = output if term.index is None else output[term.index]
        turned = tensor.clone()
        rows = turned.view(-1, run.given.positions, *turned.shape[1:]) if term.flat else turned
        rows = rows if term.axes is None else rows.movedim(term.axes.index("pos"), 1)
        rows[:, place] *= -1  # writes to `turned`, also where `rows` is a view of it
        if term.index is None:
            return turned
        return tuple(turned if number == term.index else each for number, each in enumerate(output))

    return Hook(term.module, "output", act)
