"""Layers that run several times in one forward pass: which of their runs a selection names."""

from typing import Any

import numpy as np
import pytest
from support.documents import hybrid
from support.raises import raises

from hookmap import SelectionError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import parse

ONCE = parse(hybrid())


def looped(calls: int = 3) -> ArchitectureMap:
    """Six layers, of which 1, 4 and 5 (one kind) run several times."""
    kinds = [k.model_copy(update={"calls": calls if 4 in k.layers else 1}) for k in ONCE.kinds]
    return ONCE.model_copy(update={"kinds": tuple(kinds)})


LOOPED = looped()
AGAIN = next(kind.layers for kind in LOOPED.kinds if kind.calls == 3)
OTHERS = tuple(layer for layer in range(6) if layer not in AGAIN)


def keys(*asked: Any, **calls: Any) -> list[tuple[Any, ...]]:
    return [each.key for each in LOOPED.selectors(*asked, **calls)]


def test_every_run_is_selected_under_its_number_unless_some_are_named() -> None:
    found = keys("resid_post")
    assert sorted(found) == sorted(
        [("resid_post", i, call) for i in AGAIN for call in range(3)] + [("resid_post", i) for i in OTHERS]
    )
    assert keys("resid_post", AGAIN[0]) == [("resid_post", AGAIN[0], call) for call in range(3)]
    assert [s.call for s in LOOPED.selectors("resid_post", OTHERS[0])] == [None]
    assert all(s.call is None for s in ONCE.selectors())


@pytest.mark.parametrize(
    ("calls", "expected"),
    [("all", [0, 1, 2]), ("last", [2]), (0, [0]), (-1, [2]), ([0, -1], [0, 2]), (np.array([2, 0, 2]), [0, 2]),
     (range(2), [0, 1])],
)  # fmt: skip
def test_calls_are_all_the_last_or_numbers(calls: Any, expected: list[int]) -> None:
    assert keys("resid_post", AGAIN[0], calls=calls) == [("resid_post", AGAIN[0], call) for call in expected]


@pytest.mark.parametrize("calls", ["all", "last", 0, -1, [0, -1]])
def test_a_layer_that_runs_once_has_call_0(calls: Any) -> None:
    assert keys("resid_post", OTHERS[0], calls=calls) == [("resid_post", OTHERS[0])]
    assert [s.key for s in ONCE.selectors("embed", calls=calls)] == [("embed", None)]


def test_all_layers_leaves_out_those_that_do_not_run_so_often() -> None:
    assert sorted(keys("resid_post", calls=1)) == [("resid_post", i, 1) for i in AGAIN]
    assert sorted(keys({"resid_post": "all", "embed": "all"}, calls=2)) == [
        ("embed", None), *(("resid_post", i, 2) for i in AGAIN)
    ]  # fmt: skip


def test_all_points_are_those_of_the_layers_that_run_so_often() -> None:
    found = LOOPED.selectors(calls=1)
    assert {s.layer for s in found} == {*AGAIN, None} and all(s.call == 1 for s in found if s.layer is not None)
    with pytest.raises(SelectionError, match=rf"layer {OTHERS[0]} of .* runs once in one forward pass: no call 1"):
        LOOPED.selectors("all", [AGAIN[0], OTHERS[0]], calls=1)


def test_a_term_names_the_call_of_its_module() -> None:
    assert [(t.call, t.calls) for s in LOOPED.selectors("resid_post", AGAIN[0]) for t in s.terms] == [
        (0, 3), (1, 3), (2, 3)
    ]  # fmt: skip
    assert {(t.call, t.calls) for s in ONCE.selectors() for t in s.terms} == {(None, None)}


def test_a_module_that_is_called_several_times_in_each_run_is_counted_on() -> None:
    kind = LOOPED.kind_of(AGAIN[0])
    (term,) = kind.points["resid_post"].terms
    point = kind.points["resid_post"].model_copy(
        update={"terms": (term.model_copy(update={"call": 1, "calls_per_run": 2}),)}
    )
    changed = kind.model_copy(update={"points": {**kind.points, "resid_post": point}})
    found = LOOPED.model_copy(update={"kinds": tuple(changed if k is kind else k for k in LOOPED.kinds)})
    assert [t.call for s in found.selectors("resid_post", AGAIN[0]) for t in s.terms] == [1, 3, 5]
    assert parse(found.to_json()) == found


def test_the_selectors_come_in_the_order_of_the_runs() -> None:
    stack = ONCE.model_copy(update={"kinds": tuple(k.model_copy(update={"calls": 2}) for k in ONCE.kinds)})
    found = [s.key[1:] for s in stack.selectors("resid_post", calls="all")]
    assert found == [(layer, call) for call in range(2) for layer in range(6)], "the whole stack, then again"
    indices = [s.forward_index for s in stack.selectors()]
    assert indices == sorted(indices)
    assert stack.selectors(["embed", "final_norm", "resid_pre"])[-1].point == "final_norm"


@pytest.mark.parametrize(
    ("layers", "calls", "message"),
    [
        (AGAIN[0], 3, "call 3 is out of range: layers .* run 3 times in one forward pass, calls 0 to 2"),
        (AGAIN[0], -4, "call -4 is out of range"),
        (OTHERS[0], 1, rf"layer {OTHERS[0]} of .* runs once in one forward pass: no call 1"),
        ("all", "first", "calls 'first': give 'all', 'last', or numbers from 0 to 2"),
        ("all", [], "no calls given"),
        ("all", True, "call True is not a whole number"),
        ("all", [1.0], "call 1.0 is not a whole number"),
        ("all", None, "call None is not a whole number"),
    ],
)
def test_what_is_no_call_is_refused(layers: Any, calls: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        keys("resid_post", layers, calls=calls)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(SelectionError) as caught:
        keys(["resid_post", "resid_pos"], [*OTHERS, 99], calls=[1, 7])
    told = str(caught.value)
    assert all(word in told for word in ("resid_pos'", "layer 99", "call 7", "problems"))
    with raises(SelectionError, "each layer of", "runs once in one forward pass, which is call 0"):
        ONCE.selectors("resid_post", calls=1)
