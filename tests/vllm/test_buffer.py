"""Rows that are kept: each is the sum of its shares, in the slot that it was given, whatever came with it."""

import pytest
import torch

from hookmap.vllm.buffer import Chosen, Slabs

KEY = ("resid_mid", 3)


@pytest.mark.parametrize("count", [1, 256, 257, 700])
@pytest.mark.parametrize("shares", [1, 2, 3])
def test_rows_are_the_sums_of_their_shares(count: int, shares: int) -> None:
    torch.manual_seed(count)
    given = [torch.randn(count, 2, 8).bfloat16() for _ in range(shares)]
    before = [each.clone() for each in given]
    slots = torch.randperm(1000)[:count].tolist()
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
