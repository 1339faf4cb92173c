"""Path patching: what a branch does to the logits by way of certain others alone.

Wang et al., "Interpretability in the Wild" (2022), appendix B: in one run the sender is patched and every attention
layer behind it is held at what it was, MLPs being computed anew; what then arrives at the receivers is put into a run
without any other change. With MLPs held too it is the direct path of Goldowsky-Dill et al., "Localizing Model Behavior
with Path Patching" (2023). The receiver `logits` is the end of the first run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hookmap.activations import Key
from hookmap.capture.interventions.edits import Edit, why_not_heads
from hookmap.capture.interventions.operations import Patched
from hookmap.capture.interventions.plan import EditPlan
from hookmap.capture.result import Capture
from hookmap.errors import InterventionError, SelectionError
from hookmap.loading.prompts import Prompt
from hookmap.maps.points import PointName
from hookmap.maps.selectors import Selector
from hookmap.maps.summands import summands

if TYPE_CHECKING:
    from hookmap.capture.hooked import Hooked

SENDERS = {"z": "mixer_out", "mixer_out": "mixer_out", "mlp_post": "mlp_out", "mlp_out": "mlp_out", "resid_pre": ""}
"""points that a path may begin at, and the branch that each is a part of"""
_RECEIVER = re.compile(r"(?P<point>[^@]+?)(?:@(?P<layer>-?[0-9]+)(?:\.(?P<head>[0-9]+))?)?")


@dataclass(frozen=True)
class Receiver:
    """A tensor that paths lead to."""

    selector: Selector
    heads: tuple[int, ...] | None

    @property
    def name(self) -> str:
        where = f"{self.selector.point}@{self.selector.layer}"
        return where if self.heads is None else ",".join(f"{where}.{head}" for head in self.heads)


@dataclass(frozen=True)
class Paths:
    """Where paths lead, and what is held on the way."""

    hm: Hooked
    receivers: tuple[Receiver, ...]
    """empty: the logits"""
    held: tuple[Selector, ...]
    """the branches that are held, where they are behind the sender"""
    through_mlps: bool
    rows: dict[Key, tuple[torch.Tensor, list[int]]] | None = None
    """the held branches of the runs that are patched: the rows of all pairs, and where those of each begin"""
    batch_size: int = 1

    @property
    def name(self) -> str:
        """In words."""
        where = ", ".join(each.name for each in self.receivers) or "logits"
        return f"on the path to {where}, {'through' if self.through_mlps else 'not through'} MLPs"

    def frozen(self, prompts: Sequence[Prompt], batch_size: int) -> Paths:
        """With the held branches as they are in the runs of these prompts."""
        run: Capture | None = None
        if self.held:
            points = dict.fromkeys((each.point for each in self.held), "all")
            run = self.hm.capture(list(prompts), points, max_new_tokens=0, engine="hooks", batch_size=batch_size)
        rows = {}
        for each in self.held:
            assert run is not None
            parts = [run.read(number, *each.key) for number in range(len(prompts))]
            begins = [0]
            for part in parts:
                begins.append(begins[-1] + len(part))
            rows[each.key] = torch.cat(parts), begins
        return Paths(self.hm, self.receivers, self.held, self.through_mlps, rows, batch_size)

    def plan(self, sender: Selector, patch: EditPlan, prompts: Sequence[Prompt], pairs: Sequence[int]) -> EditPlan:
        """What is written for the metric: where receivers are named, what arrives at them when `patch` is written.

        pairs: the pair of each prompt.
        """
        edits = [*patch.edits, *self._holding(sender, prompts, pairs)]
        if not self.receivers:
            return EditPlan(tuple(edits), [])
        behind = [each for each in self.receivers if each.selector.forward_index > sender.forward_index]
        points: dict[str, list[int]] = {}
        for each in behind:
            assert each.selector.layer is not None
            points.setdefault(each.selector.point, []).append(each.selector.layer)
        run = self.hm.capture(
            list(prompts), points, max_new_tokens=0, engine="hooks", interventions=EditPlan(tuple(edits), []),
            batch_size=self.batch_size, batch_tokens=self.batch_size * max(len(p.token_ids) for p in prompts),
        )  # fmt: skip
        return EditPlan(tuple(self._arrived(run, each) for each in behind), [])

    def _holding(self, sender: Selector, prompts: Sequence[Prompt], pairs: Sequence[int]) -> list[Edit]:
        """Edits that keep the branches behind the sender as they were."""
        assert self.rows is not None and sender.layer is not None
        name = PointName.of(sender.point)
        own = (name.numbered(SENDERS[name.base]), sender.layer)
        last = max((each.selector.layer or 0 for each in self.receivers), default=None)
        found = []
        for selector in self.held:
            if selector.layer is None or selector.layer < sender.layer or selector.key == own:
                continue
            if last is not None and selector.layer > last:
                continue
            values, begins = self.rows[selector.key]
            maps = [
                {place: begins[pair] + place for place in range(len(prompt.token_ids))}
                for pair, prompt in zip(pairs, prompts, strict=True)
            ]
            found.append(Edit(selector, Patched(values, maps.__getitem__)))
        return found

    def _arrived(self, run: Capture, receiver: Receiver) -> Edit:
        """An edit that writes what the run shows at a receiver."""
        selector, heads = receiver.selector, receiver.heads
        values, begins = run.rows(*selector.key)
        taken = values if heads is None else values[:, list(heads)]
        count = len(begins) - 1
        maps = [{n: begins[i] + n for n in range(begins[i + 1] - begins[i])} for i in range(count)]
        return Edit(selector, Patched(taken, maps.__getitem__), heads=heads)


def paths_to(
    hm: Hooked, to: str | Sequence[str], senders: Sequence[Selector], through_mlps: bool, named: bool
) -> tuple[Paths, tuple[Selector, ...]]:
    """The paths from these senders, and those senders that are before a receiver.

    named: whether the senders' layers were named: then each must be. Raises SelectionError and InterventionError.
    """
    found = summands(hm.map)
    if isinstance(found, str):
        raise SelectionError(f"no path patching of {hm.map.architecture}: {found}. Patch without a path.")
    if any(kind.calls > 1 for kind in hm.map.kinds):
        raise SelectionError(f"no path patching of {hm.map.architecture}: its layers run several times in one pass.")
    for sender in senders:
        if PointName.of(PointName.of(sender.point).as_mixer()).base not in SENDERS:
            raise SelectionError(f"a path begins at {', '.join(SENDERS)}, not at {sender.point}.")
    receivers = _receivers(hm, to)
    last = max((each.selector.forward_index for each in receivers), default=None)
    before = tuple(each for each in senders if last is None or each.forward_index < last)
    if not before or (named and len(before) < len(senders)):
        after = next(each for each in senders if each not in before)
        raise SelectionError(
            f"{after.point} of layer {after.layer} is not before {', '.join(each.name for each in receivers)}: nothing "
            "leads from one to the other. Name earlier layers."
        )
    branches = [s for key in found[1:] for s in hm.selectors([key[0]], [key[1]])]
    held = tuple(b for b in branches if not (through_mlps and PointName.of(b.point).base == "mlp_out"))
    wrong = [(s, hm.proofs.of(s).reason) for s in (*held, *(each.selector for each in receivers))]
    if refused := list(dict.fromkeys(f"  - {s.point}: {reason}" for s, reason in wrong if reason is not None)):
        raise InterventionError("a path needs these written, and they are not:\n" + "\n".join(refused))
    return Paths(hm, receivers, held, through_mlps), before


def _receivers(hm: Hooked, to: str | Sequence[str]) -> tuple[Receiver, ...]:
    """The receivers that are named, `q@9.6`, `mlp_in@4`; none for `logits`."""
    texts = [text.strip() for text in (to.split(",") if isinstance(to, str) else to)]
    if texts == ["logits"]:
        return ()
    asked: dict[tuple[str, int], list[int | None]] = {}
    for text in texts:
        match = _RECEIVER.fullmatch(text)
        if match is None or match["layer"] is None:
            raise SelectionError(
                f"to {text!r}: expected logits, by itself, or a point of a layer, with or without a head: mlp_in@4, "
                "q@9.6 (head 6 of layer 9)."
            )
        asked.setdefault((match["point"], int(match["layer"])), []).append(
            None if match["head"] is None else int(match["head"])
        )
    found = []
    for (point, layer), heads in asked.items():
        [selector] = hm.selectors([point], [layer])
        chosen = None if None in heads else tuple(head for head in dict.fromkeys(heads) if head is not None)
        if chosen is not None and (wrong := why_not_heads(chosen, selector.point, hm.proofs.of(selector).row)):
            raise InterventionError(f"to {point}@{layer}: {wrong}")
        found.append(Receiver(selector, chosen))
    return tuple(found)
