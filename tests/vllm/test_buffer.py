"""Rows that are kept: each is the sum of its shares, in the slot that it was given, whatever came with it."""

import pytest
import torch

from hookmap.vllm.buffer import Chosen, Slabs, Slots

KEY = ("resid_mid", 3)


@pytest.mark.parametrize("count", [1, 256, 257, 700])
@pytest.mark.parametrize("shares", [1, 2, 3])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_rows_are_the_sums_of_their_shares(count: int, shares: int, side_by_side: bool) -> None:
    torch.manual_seed(count)
    given = [torch.randn(count, 2, 8).bfloat16() for _ in range(shares)]
    before = [each.clone() for each in given]
    slots = [*range(100, 100 + count)] if side_by_side else torch.randperm(1000)[:count].tolist()
    slabs = Slabs()
    slabs.put(KEY, Chosen(slots), given)
    others = [torch.randn(count, 2, 8).bfloat16() for _ in range(shares)]
    slabs.put(("resid_pre", 3), Chosen(slots), others)
    expected = given[0]
    for each in given[1:]:
        expected = expected + each
    assert torch.equal(slabs.get(KEY, Chosen(slots)), expected)
    assert torch.equal(slabs.get(KEY, Chosen(slots[::-1])), expected.flip(0))
    assert all(map(torch.equal, given, before))  # the model goes on with them


def test_shares_of_two_dtypes_are_added_as_pytorch_adds_them() -> None:
    narrow, wide = torch.randn(300, 8).bfloat16(), torch.randn(300, 8)
    slabs = Slabs()
    slabs.put(KEY, Chosen(range(300)), [narrow, wide])
    assert torch.equal(slabs.get(KEY, Chosen(range(300))), narrow + wide)


def test_no_two_requests_have_a_slot_and_all_that_are_given_back_are_used_again() -> None:
    slots = Slots()
    first, second = slots.take(3), slots.take(4)
    slots.give_back(first)
    third = slots.take(5)
    assert not {*second} & {*third} and len({*second, *third}) == 9 == max(*second, *third) + 1
    slots.give_back(third)
    slots.give_back(second)
    assert slots.take(9) == [*range(9)]  # side by side again
