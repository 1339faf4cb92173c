"""A run by edges is what plain hooks give: one edge, one node, no edge, and every edge."""

from typing import Any

import pytest
import torch
from support.by_edges import PAIRS, WIRING, at, change_of_head, change_of_mlp, difference, hooks, seen, wide, with_shift
from support.raises import raises

import hookmap
from hookmap.analysis.circuits import Circuit, of_edges

QUICK = ("gpt2", "llama")
EACH = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WIRING if WIRING[name].post is None
]


def near(found: Any, expected: Any, what: Any = "", close: float = 1e-5) -> None:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert float((found - expected).abs().max()) < close * (1 + float(expected.abs().max())), (what, found, expected)


def without(circuit: Circuit, edges: list[tuple[str, str]]) -> Circuit:
    gone = of_edges(circuit.nodes, circuit.exists, edges)
    return Circuit(circuit.nodes, circuit.kept & ~gone.kept, circuit.exists)


@pytest.mark.parametrize("name", EACH)
def test_without_one_edge_its_reader_alone_sees_the_corrupted_writer(name: str) -> None:
    hm = wide(name)[1]
    every = hm.edge_attribution(PAIRS, check=4).circuit(1.0)
    edges = {
        ("mlp_out[0]", "q[2] head 1"): (change_of_mlp, (0,), ("q", 2, 1)),
        ("mixer_out[0] head 2", "v[1] head 1"): (change_of_head, (0, 2), ("v", 1, 1)),
        ("mixer_out[1] head 0", "mlp_in[2]"): (change_of_head, (1, 0), ("mlp", 2, 0)),
    }
    found = hm.faithfulness(PAIRS, [without(every, [edge]) for edge in edges])
    for row, (change, where, reader) in enumerate(edges.values()):
        for number, pair in enumerate(PAIRS):
            moved = change(name, *where, pair, "clean", "corrupted")
            near(found.metrics[row, number], with_shift(name, reader, moved, pair["clean"], pair), (row, number))


@pytest.mark.parametrize("name", EACH)
def test_without_the_edges_of_a_node_every_reader_sees_it_corrupted(name: str) -> None:
    model, hm = wide(name)
    scores = hm.edge_attribution(PAIRS, check=4)
    every = scores.circuit(1.0)
    row = scores.writers.index("mlp_out[0]")
    kept = every.kept.clone()
    kept[row] = False
    found = hm.faithfulness(PAIRS, Circuit(every.nodes, kept, every.exists))
    for number, pair in enumerate(PAIRS):
        module = at(model, name, 0, WIRING[name].mlp)
        corrupted = seen(model, module, "output", pair["corrupted"])[None]

        def put(_: Any, args: Any, output: Any, corrupted: Any = corrupted) -> Any:
            return (corrupted, *output[1:]) if isinstance(output, tuple) else corrupted

        with hooks(module.register_forward_hook(put)), torch.no_grad():
            near(found.metrics[0, number], difference(model, pair["clean"], pair), number)


def test_faithfulness_is_0_without_edges_and_1_with_all() -> None:
    hm = wide("llama")[1]
    scores = hm.edge_attribution(PAIRS, check=4)
    found = hm.faithfulness(PAIRS, [scores.circuit(0), scores.circuit(1.0)])
    near(found.values, [0.0, 1.0])
    assert found.circuits[0].edges() == [] and len(found.circuits[1].edges()) == scores.edges


@pytest.mark.slow
def test_cpr_and_cmd_are_areas_by_trapezoids() -> None:
    hm = wide("gpt2")[1]
    scores = hm.edge_attribution(PAIRS, check=4, steps=2)
    shares = (0.0, 0.1, 0.5, 1.0)
    curve = hm.circuit_curve(PAIRS, scores, shares=shares)
    signed, absolute = curve.signed.values.tolist(), curve.absolute.values.tolist()
    by_hand = [
        sum(
            (b - a) * (f(one) + f(other)) / 2
            for a, b, one, other in zip(shares, shares[1:], own, own[1:], strict=False)
        )
        for own, f in ((signed, lambda value: value), (absolute, lambda value: abs(1 - value)))
    ]
    near([curve.cpr, curve.cmd], by_hand, close=1e-6)
    assert f"CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}" in repr(curve)
    best = curve.signed.circuits[1]
    lowest = scores.mean[best.kept].min()
    assert int(best.kept.sum()) == int(0.1 * scores.edges) and not bool(
        (scores.mean[best.exists & ~best.kept] > lowest).any()
    )


@pytest.mark.slow
def test_what_cannot_be_run_apart_is_refused_with_the_reason() -> None:
    hm = wide("gemma2")[1]
    scores = hm.edge_attribution(PAIRS, check=4)
    with raises(hookmap.SelectionError, "cannot be run apart"):
        hm.faithfulness(PAIRS, scores.circuit(10))
    llama = wide("llama")[1]
    own = llama.edge_attribution(PAIRS, check=4)
    with raises(hookmap.SelectionError, "expected a number from 0 to"):
        own.circuit(10**6)
    with raises(hookmap.SelectionError, "ascending shares"):
        llama.circuit_curve(PAIRS, own, shares=(0.5,))
    with raises(hookmap.SelectionError, "no edge from"):
        of_edges(own.nodes, own.circuit(0).exists, [("mlp_out[2]", "mlp_in[0]")])
