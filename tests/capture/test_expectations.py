"""What must hold after a write is decided from the map alone; a run that breaks it says so in words."""

import torch

import hookmap
from hookmap.capture.interventions.expectations import (
    AsUpstream,
    Changed,
    Expectation,
    NoSum,
    SumHolds,
    Trial,
    Unchanged,
)
from hookmap.capture.interventions.expectations import expectations as expected

LLAMA = hookmap.load_map("LlamaForCausalLM")
KIND = LLAMA.kinds[0]
SHOWN = [*((point, 0) for point in KIND.points), ("resid_pre", 1), ("resid_post", 1)]


def of(point: str, isolated: bool = True) -> list[Expectation]:
    """After the point was read back."""
    return list(expected(KIND, LLAMA.selectors(point, 0)[0], SHOWN, isolated))[2:]


def test_a_point_inside_a_branch_determines_the_branch_and_leaves_what_comes_before() -> None:
    found = of("z")
    assert found[-1] == AsUpstream(("mixer_out_raw", 0))
    before = {each.key[0] for each in found[:-1] if isinstance(each, Unchanged)}
    assert len(before) == len(found) - 1 and {"resid_pre", "mixer_in", "q", "k", "v"} <= before
    assert not before & {"z", "mixer_out", "resid_mid", "mlp_in", "resid_post"}


def test_a_point_that_is_one_of_several_inputs_changes_the_branch_only() -> None:
    assert of("q")[-1] == Changed(("mixer_out_raw", 0))


def test_the_stream_that_leaves_a_block_determines_all_that_follows() -> None:
    assert of("resid_post") == [AsUpstream(("resid_pre", 1)), AsUpstream(("resid_post", 1))]


def test_what_a_branch_adds_is_a_term_of_a_sum_or_nothing_shows_where_it_goes() -> None:
    sums = [each for each in of("mixer_out") if isinstance(each, SumHolds)]
    assert [each.relation.total for each in sums] == ["resid_mid"]
    bare = KIND.model_copy(update={"relations": ()})
    selector = LLAMA.selectors("mixer_out", 0)[0]
    assert list(expected(bare, selector, SHOWN, isolated=False))[-1] == NoSum()
    assert not any(isinstance(each, NoSum) for each in expected(bare, selector, SHOWN, isolated=True))


def test_a_broken_expectation_says_what_is_wrong() -> None:
    old, new, other = (torch.full((2, 3), value) for value in (1.0, 2.0, 3.0))

    def failure(expectation: Expectation, plain: torch.Tensor, upstream: torch.Tensor, written: torch.Tensor) -> str:
        runs = ({("z", 0): tensor} for tensor in (plain, upstream, written))
        return str(expectation.failure(Trial(LLAMA.selectors("z", 0)[0], *runs, repeats=True)))

    key = ("z", 0)
    assert failure(AsUpstream(key), old, new, new) == "None"
    assert failure(AsUpstream(key), old, new, old) == "z stays as it was: what reads the point reads another tensor"
    assert failure(AsUpstream(key), old, new, other).startswith("z is not what it would be with this value")
    assert failure(Unchanged(key, one_tensor=True), old, new, new).startswith("writing it writes z too: they are one")
    assert failure(Changed(key), old, new, old) == "nothing reads it there any more: z stays as it was"
