"""A block that adds all of its branches at once, `x + (a + f)`, where `f` reads `x + a`: two steps of the stream."""

from __future__ import annotations

from collections.abc import Iterator

from hookmap.discovery.dataflow import ModuleCall
from hookmap.discovery.linear_steps import Step, steps
from hookmap.discovery.values import Values


def unfolded(values: Values, call: ModuleCall, path: list[Step]) -> list[Step]:
    """The path with an addition for each term of a sum that is added, where later terms read the sum with the earlier.

    The numbers are the same up to rounding: the block adds in another order.
    """
    return [each for step in path for each in _additions(values, call, step)]


def _additions(values: Values, call: ModuleCall, step: Step) -> list[Step]:
    if step.branch is None or (step.factor, step.source_factor, step.gate) != (1.0, 1.0, None):
        return [step]
    found, state, rest = list[Step](), step.source, step.branch
    while (part := next(_first_terms(values, call, state, rest), None)) is not None:
        term, rest, total = part
        found.append(Step("add", state, total, term))
        state = total
    return [*found, Step("add", state, step.result, rest)] if found else [step]


def _first_terms(values: Values, call: ModuleCall, state: int, added: int) -> Iterator[tuple[int, int, int]]:
    """A term of a sum, the other one, and the state with the first added, which the other is computed from."""
    for step in steps(values, added):
        plain = step.kind == "add" and (step.factor, step.source_factor, step.gate) == (1.0, 1.0, None)
        if not plain or step.branch is None or not values.made_in(added, call):
            continue
        for op in values.consumers.get(step.source, ()):
            total = values.value(op.outputs[0]) if op.outputs else state
            sums = [s for s in steps(values, total) if (s.kind, s.source, s.branch) == ("add", state, step.source)]
            is_plain = any(s.factor == 1.0 == s.source_factor for s in sums)
            if is_plain and total in values.cone(step.branch, [total], call)[1]:
                yield step.source, step.branch, total
