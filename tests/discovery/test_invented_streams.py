"""Invented architectures: streams that are no plain sums, and blocks with more than an attention and an MLP."""

from __future__ import annotations

import pytest
from support import invented_coupled as coupled
from support import invented_streams as streams
from support.invented import Ladder, check

from hookmap.discovery.discover import discover

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seeded")]


@pytest.mark.parametrize(
    "block",
    [
        streams.Step, streams.StepBack, streams.StepOfEach, streams.StepLearned, streams.StepComputed,
        streams.Interpolated, streams.InterpolatedOfEach,
    ],
)  # fmt: skip
def test_a_step_towards_the_branch_adds_some_of_the_stream(block: type[streams.Joined]) -> None:
    check(Ladder(block))


def test_a_step_is_a_sum_of_two_boundaries() -> None:
    (kind,) = check(Ladder(streams.Step)).kinds
    assert [t.text() for t in kind.points["mixer_out"].terms] == [
        "0.3 * rungs.{i}.blend.output", "-0.3 * rungs.{i}.input[0]"
    ]  # fmt: skip
    assert kind.relations[:2] == ("resid_mid = resid_pre + mixer_out", "resid_post = resid_mid + mlp_out")


@pytest.mark.parametrize(
    "block", [streams.Kept, streams.KeptOfEach, streams.Weighted, streams.InOneOperation, streams.Side]
)
def test_factors_are_learned(block: type[streams.Joined]) -> None:
    check(Ladder(block))


def test_a_term_names_the_parameter_that_multiplies_it() -> None:
    (kind,) = check(Ladder(streams.Weighted)).kinds
    assert kind.relations[0] == "resid_mid = rungs.{i}.rate * resid_pre + mixer_out"
    assert [t.text() for t in kind.points["mixer_out"].terms] == ["0.5 * rungs.{i}.rates * rungs.{i}.blend.output"]


@pytest.mark.parametrize(
    "block", [streams.Sphere, streams.SphereByLength, streams.SphereBySize, streams.SphereOfGroups]
)
def test_norms_on_the_stream_are_written_out(block: type[streams.Sphere]) -> None:
    found = check(Ladder(block), dict.fromkeys(("mixer_out", "mlp_out"), "no module hands it over: the operation"))
    assert found.kinds[0].branch_order == "sequential" and found.kinds[0].norm_placement == "post"


def test_norms_on_the_stream_are_modules() -> None:
    check(Ladder(streams.SphereOfModules))


@pytest.mark.parametrize("block", [streams.WithFirst, streams.WithFirstByConstants])
def test_the_first_stream_is_mixed_in_again(block: type[streams.WithFirst]) -> None:
    check(streams.First(block))


def test_rows_of_another_table_are_added() -> None:
    check(streams.Tables())


@pytest.mark.parametrize(
    "block",
    [
        streams.Squashed, streams.SquashedByWeights, streams.Normed, streams.Smeared, streams.SquashedBetween,
        streams.SquashedBehind,
    ],
)  # fmt: skip
def test_what_multiplies_with_no_matrix_is_no_mlp(block: type[streams.Joined]) -> None:
    (kind,) = check(Ladder(block)).kinds
    assert "mlp_out.0" not in kind.points and kind.mlp.modules == ("rungs.{i}.think",)


@pytest.mark.parametrize("block", [streams.Canon, streams.CanonPadded, streams.CanonInside])
def test_a_short_convolution_is_not_the_mixer_beside_an_attention(block: type[streams.Canon]) -> None:
    (kind,) = check(Ladder(block)).kinds
    assert kind.points["attn_out"].terms == kind.points["mixer_out"].terms
    assert not {"attn_out.0", "attn_out.2"} & kind.points.keys()


@pytest.mark.parametrize("block", [streams.Adapted, streams.AdaptedBetween, streams.AdaptedBeside])
def test_the_mlp_is_the_one_that_does_most_of_the_work(block: type[streams.Adapted]) -> None:
    check(Ladder(block))


@pytest.mark.parametrize("model", [coupled.Both, coupled.First])
def test_a_reversible_block_has_two_streams(model: type[coupled.Both]) -> None:
    found = check(model(coupled.Reversible))
    last = found.kinds[-1]
    assert last.coupled and last.branch_order == "sequential"
    assert last.relations[:2] == ("resid_mid = other_of_tokens + mixer_out", "resid_post = resid_pre + mlp_out")


def test_a_convolution_behind_pads_is_one() -> None:
    (kind,) = check(Ladder(streams.CanonPadded)).kinds
    assert kind.name == "convolution+attention+dense" and not {"mlp_out.0", "mlp_out.1"} & kind.points.keys()


@pytest.mark.parametrize("model", [coupled.ValuesOfFirst, coupled.ValuesOfPrevious])
def test_values_that_are_handed_on_are_no_stream(model: type[Ladder]) -> None:
    found = check(model(coupled.Values))
    assert not any(kind.coupled for kind in found.kinds)


def test_keys_of_the_layer_before_are_said_to_enter() -> None:
    found = discover(coupled.ValuesOfPrevious(coupled.Borrowed).eval())
    assert {found.unavailable(point, 1) for point in "kv"} == {
        "it is computed before this block, and enters it beside the stream"
    }
    assert found.unavailable("k", 0) is None and found.unavailable("q", 1) is None


@pytest.mark.parametrize("block", [coupled.Braided, coupled.ReadTogether])
def test_streams_in_several_tensors_that_are_mixed_have_no_branches(block: type[streams.Joined]) -> None:
    reason = "several residual streams with one another, each in a tensor of its own"
    points = ("mixer_in", "mixer_out", "resid_mid", "mlp_in", "mlp_out", "q", "mlp_post")
    check(coupled.Both(block), dict.fromkeys(points, reason))


@pytest.mark.parametrize(("block", "operator"), [(coupled.InHalves, "`cat`"), (coupled.Forgetting, "`mul`")])
def test_what_is_no_addition_is_named(block: type[streams.Joined], operator: str) -> None:
    reason = f"no residual addition was found.*{operator}"
    points = ("mixer_in", "mixer_out", "resid_mid", "mlp_in", "mlp_out", "q", "mlp_post")
    check(Ladder(block), dict.fromkeys(points, reason))


@pytest.mark.parametrize("block", [coupled.Hyper, coupled.HyperByConstants])
def test_streams_in_one_tensor_are_mixed_by_fixed_numbers(block: type[coupled.Hyper]) -> None:
    reason = "no module hands it over: the operation"
    found = check(coupled.Streams(block), dict.fromkeys(("mixer_out", "resid_mid", "mlp_out"), reason))
    assert found.kinds[0].axes == ("batch", "pos", "stream", "d_model")
    assert (found.kinds[0].branch_order, found.kinds[0].norm_placement) == ("sequential", "pre")


def test_what_decides_how_a_branch_joins_streams_may_make_what_it_reads() -> None:
    (kind,) = check(coupled.Streams(coupled.HyperOfTokens)).kinds
    assert kind.mixer.modules == ("rungs.{i}.one", "rungs.{i}.blend")
    assert (kind.branch_order, kind.norm_placement) == ("sequential", "pre")


@pytest.mark.parametrize("model", [coupled.OfAllBefore, coupled.OfAStack, coupled.AttendingToDepth])
def test_what_enters_a_block_is_made_of_all_before(model: type[coupled.OfAllBefore]) -> None:
    assert not check(model()).joined
