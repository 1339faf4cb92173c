"""The order in which layers run, as text."""

from __future__ import annotations

import random

import pytest
from support.raises import raises

from hookmap.maps.layer_order import layers_of, text_of


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([0, 1, 2, 3], "0-3"),
        ([0, 1, 2, 3, 2, 3, 2, 3, 4, 5], "0-1, 3 x (2-3), 4-5"),
        ([0, 0, 0], "3 x (0)"),
        ([0, 1, 2, 0, 1, 2], "2 x (0-2)"),
        ([*[0, 1] * 3, 2, 3] * 2, "2 x (3 x (0-1), 2-3)"),
        ([2, 1, 0], "2, 1, 0"),
        ([0, 1, 0, 1, 2, 3, 2, 3], "2 x (0-1), 2 x (2-3)"),
        ([0, 1, 2, 0, 1, 2, 0, 1], "2 x (0-2), 0-1"),
        ([0, 2, 3], "0, 2-3"),
        ([], ""),
    ],
)
def test_a_repeated_range_is_written_once(layers: list[int], text: str) -> None:
    assert text_of(layers) == text
    assert list(layers_of(text)) == layers


def test_what_is_written_is_read_again() -> None:
    draw = random.Random(3)
    for _ in range(300):
        part = [draw.randrange(4) for _ in range(draw.randrange(5))]
        layers = [*part * draw.randrange(4), *(draw.randrange(4) for _ in range(draw.randrange(6))), *part]
        assert list(layers_of(text_of(layers))) == layers


@pytest.mark.parametrize("text", ["0-1, 3 x (2", "0; 1", "a", "0)"])
def test_what_is_no_order_is_refused(text: str) -> None:
    with raises(ValueError, "is no order of layers"):
        layers_of(text)
