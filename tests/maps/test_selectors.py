"""Selecting: any points and layers, in any order, come out in the order of the forward pass, or with every problem."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.documents import hybrid
from support.raises import raises

from hookmap import CaptureError, SelectionError
from hookmap.maps.document import ArchitectureMap
from hookmap.maps.parsing import parse
from hookmap.maps.points import POINTS, parse_point
from hookmap.maps.selectors import Selector, select
from hookmap.maps.templates import Heads
from hookmap.maps.terms import Term

MAP = parse(hybrid())

# The forward pass of tests/support/documents.py's model, written out by hand: (module, side) in the order of execution.
_SEQUENTIAL = [
    "block.input",
    "norm_1.output",
    "mixer.output",
    "norm_2.input",
    "norm_2.output",
    "mlp.output",
    "block.output",
]
_PARALLEL = ["block.input", "mixer.output", "mlp.output", "add.output"]
FORWARD = ["embed"] + [f"{i}.{e}" for i in range(6) for e in (_PARALLEL if i == 3 else _SEQUENTIAL)] + ["final_norm"]


def event(selector: Any) -> str:
    """Where in FORWARD a selector's last tensor is."""
    if selector.layer is None:
        return str(selector.point)
    module = selector.module.removeprefix(f"model.layers.{selector.layer}").removeprefix(".") or "block"
    module = {"self_attn": "mixer", "mamba": "mixer"}.get(module, module)
    return f"{selector.layer}.{module}.{selector.side}"


points_on_every_layer = st.lists(
    st.sampled_from(["resid_pre", "mixer_out", "mlp_out", "resid_post", "embed", "final_norm"]), min_size=1
)
any_layers = st.lists(st.integers(-6, 5), min_size=1)


@given(points_on_every_layer, any_layers)
def test_any_points_and_layers_in_any_order_come_out_in_forward_order(points: list[str], layers: list[int]) -> None:
    selectors = select(MAP, points, layers)
    places = [FORWARD.index(event(s)) for s in selectors]
    assert places == sorted(places)
    assert [s.forward_index for s in selectors] == sorted(s.forward_index for s in selectors)
    wanted = {(p, layer % 6) if POINTS[p].per_layer else (p, None) for p in points for layer in layers}
    assert {(s.point, s.layer) for s in selectors} == wanted
    assert len(selectors) == len(wanted), "each tensor once, however often it was named"


@pytest.mark.slow
@given(points_on_every_layer, any_layers, st.randoms())
def test_the_order_in_which_things_are_asked_for_changes_nothing(
    points: list[str], layers: list[int], random: Any
) -> None:
    shuffled = random.sample(points, len(points)), random.sample(layers, len(layers))
    assert select(MAP, *shuffled) == select(MAP, points, layers)


@pytest.mark.slow
@given(st.lists(st.sampled_from(list(POINTS)), min_size=1), st.lists(st.integers(-9, 9), min_size=1))
def test_a_selection_is_whole_or_an_error_never_a_part(points: list[str], layers: list[int]) -> None:
    try:
        selectors = select(MAP, points, layers)
    except SelectionError:
        return
    for point in points:
        for layer in layers:
            assert MAP.unavailable(point, layer if POINTS[point].per_layer else None) is None
    assert {s.point for s in selectors} == set(points)


def test_all_is_every_point_on_the_layers_that_have_it() -> None:
    everything = {(s.point, s.layer) for s in select(MAP, "all", "all")}
    by_hand = {(name, layer) for kind in MAP.kinds for layer in kind.layers for name in kind.points}
    assert everything == by_hand | {("embed", None), ("final_norm", None)}


def test_every_layer_skips_those_without_a_point_that_others_have() -> None:
    assert [s.layer for s in select(MAP, "resid_mid")] == [0, 1, 2, 4, 5]
    assert [s.layer for s in select(MAP, "attn_out")] == [0, 1, 3, 4]


def test_one_layer_and_one_point_need_no_list() -> None:
    assert [(s.point, s.layer) for s in select(MAP, "resid_pre", -1)] == [("resid_pre", 5)]


def test_all_problems_are_in_one_message_with_near_matches_reasons_and_the_next_command() -> None:
    with pytest.raises(SelectionError) as caught:
        select(MAP, ["resid_midd", "resid_mid", "hook_mlp_in", "logits"], [3, 99, -7])
    message = str(caught.value)
    for part in (
        "did you mean resid_mid",
        "layer 3 of HybridForCausalLM has no resid_mid: attention and MLP run in parallel",
        "layer 99 is out of range: the model has layers 0 to 5",
        "layer -7 is out of range",
        "the stream before the norm",
        "HybridForCausalLM has no logits: this model has no head",
        "hookmap show",
    ):
        assert part in message


@pytest.mark.parametrize("layers", [["8"], [1.0], [True], "0,1", [None]])
def test_a_layer_that_is_no_number_is_refused(layers: Any) -> None:
    with raises(SelectionError, "not a whole number"):
        select(MAP, "resid_pre", layers)


def test_no_points_is_an_error_and_not_an_empty_selection() -> None:
    with raises(SelectionError, "no points given"):
        select(MAP, [])


def test_no_layers_is_an_error_unless_no_point_needs_one() -> None:
    with raises(SelectionError, "no layers given"):
        select(MAP, "resid_pre", [])
    assert [s.point for s in select(MAP, "embed", [])] == ["embed"]


@pytest.mark.parametrize("points", [None, 3, [3], [None, "resid_pre"]])
def test_a_point_that_is_no_name_is_refused(points: Any) -> None:
    with raises(SelectionError, "is not a name"):
        select(MAP, points, 0)


def test_a_mapping_gives_each_point_layers_of_its_own() -> None:
    asked = {
        "resid_post": [3, -1],
        "blocks.0.hook_resid_pre": None,
        "layers_output": 1,
        "embed": "all",
        "mlp_out": "all",
    }
    by_hand = {*select(MAP, "resid_post", [1, 3, 5]), *select(MAP, "resid_pre", 0), *select(MAP, ["embed", "mlp_out"])}
    found = select(MAP, asked)
    assert set(found) == by_hand and list(found) == sorted(found, key=lambda s: s.forward_index)


@pytest.mark.parametrize(
    ("points", "layers", "message"),
    [
        ({"resid_post": [3]}, [3], "points name layers of their own: leave layers out"),
        ({"embed": [3]}, "all", "embed says itself where it is, and takes no layers"),
        ({"blocks.2.hook_resid_pre": [3]}, "all", "says itself where it is"),
        ({"resid_post": [99], "resid_mdi": [1]}, "all", r"(?s)99 is out of range.*did you mean resid_mid"),
        ({"resid_post": [3], "resid_pre": []}, "all", "no layers given for resid_pre"),
        ({"resid_post": "8,12"}, "all", "'8,12' is not a whole number"),
        ({3: [3]}, "all", "point 3 is not a name"),
        ({}, "all", "no points given"),
        (["embed", "resid_pre"], [], "no layers given for resid_pre"),
    ],
)
def test_a_mapping_that_says_two_things_or_none_is_refused(points: Any, layers: Any, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select(MAP, points, layers)


def test_layers_are_read_for_each_point_also_from_an_iterator() -> None:
    assert select(MAP, ["resid_pre", "resid_post"], iter([1, 3])) == select(MAP, ["resid_pre", "resid_post"], [1, 3])


def test_layers_may_be_an_array_or_its_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    for layers in (numpy.array([1, 0]), [numpy.int64(1), numpy.int64(0)], range(2)):
        assert [s.layer for s in select(MAP, "resid_pre", layers)] == [0, 1]


@pytest.mark.parametrize(
    ("alias", "point", "layer"),
    [
        ("blocks.4.hook_resid_mid", "resid_mid", 4),
        ("hook_resid_pre", "resid_pre", None),
        ("layers_output", "resid_post", None),
        ("mlps_input", "mlp_in", None),
        ("hook_embed", "embed", None),
        ("blocks.3.attn.hook_rot_q", "q_rot", 3),
        ("blocks.3.attn.hook_rot_k", "k_rot", 3),
        ("attn.hook_attn_scores", "attn_scores", None),
        ("blocks.0.mlp.hook_pre", "mlp_pre", 0),
        ("mlp.hook_pre_linear", "mlp_pre_linear", None),
        (" resid_mid ", "resid_mid", None),
    ],
)
def test_names_of_other_tools_are_understood(alias: str, point: str, layer: int | None) -> None:
    parsed = parse_point(alias)
    assert not isinstance(parsed, str)
    assert (parsed.point, parsed.layer) == (point, layer)


def test_a_name_that_holds_a_layer_selects_that_layer_alone() -> None:
    selectors = select(MAP, ["blocks.4.hook_resid_mid", "resid_pre"], [1])
    assert [(s.point, s.layer) for s in selectors] == [("resid_pre", 1), ("resid_mid", 4)]


def test_resolve_finds_the_tensor_in_what_a_plain_hook_sees() -> None:
    class Tensor:
        shape = (1, 2, 16)

    x, y = Tensor(), Tensor()
    (from_keyword,) = select(MAP, "resid_pre", 3)
    assert from_keyword.resolve((), {"hidden_states": x}, None) is x
    (from_tuple,) = select(MAP, "mixer_out", 0)
    assert from_tuple.resolve((), {}, (y, None)) is y and from_tuple.scale == 0.5
    (bare,) = select(MAP, "mlp_out", 0)
    assert bare.resolve((x,), {}, y) is y


def test_heads_are_a_view_of_the_tensor_that_the_model_has() -> None:
    term = Term("attn.c_attn", "output", None, heads=Heads(start=32, stop=64, d_head=8))
    selector, whole = Selector("k", 0, (term,), 0), torch.randn(2, 5, 96)
    assert selector.is_view and not select(MAP, "mlp_out", 0)[0].is_view
    assert selector.whole((), {}, whole) is whole
    assert torch.equal(selector.resolve((), {}, whole), whole[..., 32:64].unflatten(-1, (4, 8)))
    assert torch.equal(selector.view(whole), selector.resolve((), {}, whole))
    (summed,) = select(MAP, "resid_post", 3)
    with raises(CaptureError, "sum of 2 tensors"):
        summed.whole((), {}, None)


@pytest.mark.parametrize(("args", "kwargs", "output"), [((), {}, None), ((None,), {"x": 1}, ()), ((), {}, "text")])
def test_resolve_says_what_it_found_where_the_tensor_is_not(args: Any, kwargs: Any, output: Any) -> None:
    for point in ("resid_pre", "mixer_out", "mlp_out"):
        (selector,) = select(MAP, point, 3)
        with raises(CaptureError, "hookmap discover"):
            selector.resolve(args, kwargs, output)


def test_a_point_that_is_a_sum_shows_its_terms_and_refuses_to_be_one_tensor() -> None:
    (selector,) = select(MAP, "resid_post", 3)
    assert [str(t) for t in selector.terms] == ["model.layers.3.input['hidden_states']", "model.layers.3.add.output"]
    with raises(CaptureError, "sum of 2 tensors"):
        selector.resolve((), {}, None)


def test_unavailable_gives_the_reason_or_none() -> None:
    assert MAP.unavailable("resid_mid", 3) == "attention and MLP run in parallel"
    assert MAP.unavailable("resid_mid", 0) is None
    assert MAP.unavailable("resid_mid") is None, "some layer has it"
    assert MAP.unavailable("resid_mid", -6) is None
    assert "out of range" in str(MAP.unavailable("resid_mid", 6))
    for no_layer in (1.5, True, "0", "all"):
        assert f"layer {no_layer!r} is not a whole number" in str(MAP.unavailable("resid_mid", no_layer))  # type: ignore[arg-type]
    assert "did you mean resid_mid" in str(MAP.unavailable("resid_midd"))
    assert isinstance(MAP, ArchitectureMap)
