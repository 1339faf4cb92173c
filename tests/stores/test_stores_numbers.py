"""A set of numbers by stretches is a set: held against Python's own."""

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookmap.stores.number_set import NumberSet

SMALL = st.integers(0, 30)  # so that stretches meet


@given(st.lists(SMALL), st.lists(st.tuples(st.booleans(), SMALL)))
def test_it_is_a_set_however_it_was_made_and_changed(first: list[int], changes: list[tuple[bool, int]]) -> None:
    for begun in (NumberSet(first), NumberSet(iter(first)), NumberSet(array("q", first))):
        expected = set(first)
        for adds, number in changes:
            (begun.add if adds else begun.discard)(number)
            (expected.add if adds else expected.discard)(number)
        assert (list(begun), len(begun)) == (sorted(expected), len(expected))
        assert [number in begun for number in range(-1, 32)] == [number in expected for number in range(-1, 32)]
        assert begun == expected and NumberSet(expected) == begun
        assert repr(begun) == repr(NumberSet(expected)), "stretches that touch are one"


@given(st.lists(SMALL), st.lists(SMALL))
def test_what_sets_do_together(one: list[int], other: list[int]) -> None:
    a, b = NumberSet(one), NumberSet(other)
    assert a - b == set(one) - set(other) and a | b == set(one) | set(other) and a & b == set(one) & set(other)
    kept = a.copy()
    both = NumberSet()
    both.update(one)
    both.update(other)
    assert both == set(one) | set(other)
    a -= set(other)
    assert a == set(one) - set(other) and kept == set(one)


def test_numbers_in_a_row_are_one_stretch_also_when_they_come_a_little_mixed() -> None:
    numbers = list(range(10_000))
    random.Random(0).shuffle(window := numbers[5000:5100])
    numbers[5000:5100] = window
    filled = NumberSet()
    for number in numbers:
        filled.add(number)
    assert repr(filled) == "NumberSet(0–9999)" and "x" not in filled


@pytest.mark.parametrize("wrong", ["7", 7.0, None])
def test_other_things_are_not_in_it(wrong: object) -> None:
    assert (wrong in NumberSet(range(10))) is False
