"""Why no list of blocks was found: what was seen instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from hookmap.discovery.added_outside import sum_behind
from hookmap.discovery.dataflow import ModuleCall, Place
from hookmap.discovery.layer_list import Numbered
from hookmap.discovery.linear_steps import steps
from hookmap.discovery.values import Values


def why_no_list(values: Values, groups: list[Numbered], seq: int) -> str:
    """What was seen of lists of modules, where none of them hands a stream on."""
    lists = [group for group in groups if group.length > 1]
    seen = {group.path: group.length for group in lists} or _parts_of_lists(values)
    names = [f"{path} ({count} modules)" for path, count in seen.items()]
    said = next((f" {reason}" for group in lists if (reason := _why_no_chain(values, group, seq))), "")
    return (
        "no blocks were found: expected modules, or a method that calls modules of several lists, which add one behind "
        "the other to a tensor [batch, pos, d_model] that leads to the logits. "
        f"Seen: {', '.join(names[:5]) or 'no lists of modules'}.{said} If this is a causal language model, please "
        "report it with its config."
    )


def _parts_of_lists(values: Values) -> dict[str, int]:
    """Modules in the entries of lists whose entries are never called: template over `{i}` -> how many there are."""
    found: dict[str, set[str]] = {}
    for call in values.flow.calls:
        if (match := re.fullmatch(r"(.*?)\b(\d+)(\..+)", call.path)) is not None:
            found.setdefault(f"{match[1]}{{i}}{match[3]}", set()).add(match[2])
    outermost = [path for path in found if path.rpartition(".")[0] not in found]
    return {path: len(found[path]) for path in outermost if len(found[path]) > 1}


def _why_no_chain(values: Values, group: Numbered, seq: int) -> str | None:
    """What stands between the modules, where what leaves each is used there; None where it is not."""
    calls = [group.calls[run] for run in group.order]
    if all(sum_behind(values, call, seq) for call in calls):
        return f"What leaves a module of {group.path} is added to the stream outside it, and more than that."
    between = [_obstacles(values, here, after) for here, after in pairwise(calls)]
    if not all(between):
        return None
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(name for each in between for name in each))
    return f"What leaves a module of {group.path} enters the next only through {names}."


def _obstacles(values: Values, here: ModuleCall, after: ModuleCall) -> list[str]:
    """The operators that are no linear steps, between what one module gives and what enters the next."""
    between = replace(here, enter=here.exit, exit=after.enter)
    given = _values(values, here.outputs)
    ops = [op for value in _values(values, after.entered) for op in values.cone(value, given, between)[0]]
    return [op.name for op in ops if not any(True for t in op.outputs for _ in steps(values, values.value(t)))]


def _values(values: Values, tensors: Mapping[Place, int]) -> set[int]:
    return set(map(values.value, tensors.values()))
