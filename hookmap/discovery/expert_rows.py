"""Inside a mixture of experts: what each chosen expert's down projection reads, what it gives, and the shared experts.

A mixture's experts are told by their weights: one parameter holds those of all of them, along its first axis. In which
order their rows are computed, a run shows: see `hookmap.loading.expert_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from hookmap.discovery import aten
from hookmap.discovery.dataflow import Operation
from hookmap.discovery.locate import Location
from hookmap.discovery.operation_places import at_output, before_casts
from hookmap.discovery.wiring import Missing, Places, Wiring, attempt, is_product
from hookmap.maps.reading import BY_DATAFLOW
from hookmap.maps.templates import TermTemplate

EXPERTS = ("expert_post", "expert_out", "shared_expert_out")
_SAME_SUM = {*aten.MOVES, "alias_update", "copy"}


@dataclass(frozen=True)
class _Weights:
    """A parameter with the weights of all experts."""

    path: str
    experts: int


def expert_points(wiring: Wiring, choice: Operation, indices: Location | str) -> Places:
    """expert_post, expert_out and shared_expert_out. `indices`: where the choice of experts is."""
    products = dict(_last_products(wiring))
    found: Places = {"shared_expert_out": attempt(lambda: _shared(wiring, set(products)))}
    try:
        parameter = _parameter(wiring, choice, products)
        if isinstance(indices, str):
            raise Missing(f"in which order a token's experts are is not to be told: router_indices: {indices}")
        time = min(op.time for op in wiring.branch.ops if op.time in products)
        for name, side, index in (("expert_post", "input", 0), ("expert_out", "output", None)):
            term = _term(wiring, parameter, indices.terms[0], products).model_copy(
                update={"side": side, "index": index}
            )
            found[name] = Location((term,), time, BY_DATAFLOW)
    except Missing as reason:
        found |= dict.fromkeys(("expert_post", "expert_out"), str(reason))
    return found


def _last_products(wiring: Wiring) -> Iterator[tuple[int, _Weights]]:
    """The products with experts' weights behind which none is: time -> the weights."""
    stack = [wiring.tensor_of(wiring.block.raw(part)) for part in wiring.branch.parts]
    seen, states = set[int](), {*wiring.block.states}
    while stack:
        here = stack.pop()
        op = wiring.block.values.flow.producer(here)
        beyond = op is None or op.time < wiring.block.call.enter or wiring.block.values.value(here) in states
        if here in seen or op is None or beyond:
            continue
        seen.add(here)
        weights = _of_experts(wiring, op) if is_product(op) else None
        if weights is not None:
            yield op.time, weights
        else:
            stack += op.inputs


def _of_experts(wiring: Wiring, op: Operation) -> _Weights | None:
    """The parameter with all experts' weights that a product multiplies by; None where it does not."""
    flow = wiring.block.values.flow
    for tensor in op.inputs if op.name != "convolution" else ():
        shapes = [wiring.shape(tensor)]
        while (path := flow.parameters.get(tensor)) is None:
            made = flow.producer(tensor)
            if made is None or made.name not in {*aten.MOVES, "index", "index_select"}:
                break
            tensor = made.inputs[0]
            shapes.append(wiring.shape(tensor))
        whole = [shape for shape in shapes if len(shape) == 3 and prod(shape) == prod(shapes[-1])]
        if path is not None and whole:
            return _Weights(path, whole[-1][0])
    return None


def _parameter(wiring: Wiring, choice: Operation, products: Mapping[int, _Weights]) -> str:
    found = list(dict.fromkeys(products.values()))
    if len(found) > 1:
        paths = ", ".join(wiring.locator.templated(each.path) for each in found)
        raise Missing(f"several parameters make the experts' outputs: {paths}")
    # Experts without weights may be all that a layer's router happens to choose: the reason is the same then.
    if not found or found[0].experts != wiring.shape(choice.inputs[0])[-1]:
        raise Missing("no parameter holds the weights of all its experts")
    return found[0].path


def _term(wiring: Wiring, parameter: str, choice: TermTemplate, products: Mapping[int, _Weights]) -> TermTemplate:
    """The experts' rows in the smallest module that holds the choice, the weights and the products."""
    if choice.axes is not None:
        raise Missing("the router's choice has axes of its own")
    flow, locator = wiring.block.values.flow, wiring.locator
    ops = [op for op in wiring.branch.ops if op.time in products]
    paths = [locator.templated(parameter).rpartition(".")[0], choice.module]
    paths += [locator.templated(flow.calls[op.call].path) for op in ops]
    common = paths[0].split(".")
    for path in paths[1:]:
        parts = path.split(".")
        common = [a for n, a in enumerate(common) if parts[: n + 1] == common[: n + 1]]
    module = ".".join(common)
    around = [c for c in flow.calls if locator.templated(c.path) == module and c.enter < ops[0].time < c.exit]
    if not around or not locator.is_of_one_layer(around[0]):
        raise Missing("the experts run in a module that several layers share")
    calls = locator.calls_of[id(around[0].module)]
    return TermTemplate(
        module=module,
        side="output",
        experts=locator.templated(parameter),
        call=calls.index(around[0]) if len(calls) > 1 else None,
    )


# The experts that every token has -----------------------------------------------------------------------------------


def _shared(wiring: Wiring, products: set[int]) -> Location:
    """What is added to the sum of the chosen experts' outputs."""
    parts = [wiring.tensor_of(wiring.block.raw(part)) for part in wiring.branch.parts]
    others = [part for part in parts if not _comes_of(wiring, part, products)]
    if len(parts) > 1 and len(others) == 1:
        return _placed(wiring, others[0])
    tensor = parts[0] if len(parts) == 1 else None
    while tensor is not None and (op := wiring.block.values.flow.producer(tensor)) is not None:
        if op.name == "add" and len(op.inputs) == 2:
            beside = [t for t in op.inputs if not _comes_of(wiring, t, products)]
            constant = [t for t in beside if wiring.block.values.is_constant(wiring.block.values.value(t))]
            if len(beside) == 1 and not constant:
                return _placed(wiring, beside[0])
            if len(beside) != len(constant) or not beside:
                break
            tensor = next(t for t in op.inputs if t not in beside)
        elif op.name in _SAME_SUM and op.inputs:
            tensor = op.inputs[-1 if op.name in ("copy", "alias_update") else 0]
        else:  # through a norm behind the sum (A.X K1), along what has its shape
            alike = [t for t in op.inputs if wiring.shape(t) == wiring.shape(tensor) and _comes_of(wiring, t, products)]
            tensor = alike[0] if op.name in aten.LIGHT and alike else None
    raise Missing("every token has only the experts that the router chooses for it")


def _comes_of(wiring: Wiring, tensor: int, products: set[int]) -> bool:
    """Whether a tensor is computed from what the chosen experts give."""
    stack, seen = [tensor], set[int]()
    while stack:
        here = stack.pop()
        op = wiring.block.values.flow.producer(here)
        if here in seen or op is None or op.time < wiring.block.call.enter:
            continue
        if op.time in products:
            return True
        seen.add(here)
        stack += op.inputs
    return False


def _placed(wiring: Wiring, tensor: int) -> Location:
    for alike in before_casts(wiring.locator, tensor):
        places = [e for e in wiring.locator.places(wiring.block.values.value(alike)) if e.side == "output"]
        if places:
            return wiring.locator.at(min(places, key=lambda each: each.call.path.count(".")))
        found = at_output(wiring.locator, alike, None)
        if found is not None and wiring.block.seq in wiring.shape(alike)[:-1]:
            return found
    raise Missing("the operation that makes it does not run in the same way for every text")
