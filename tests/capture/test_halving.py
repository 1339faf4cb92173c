"""Rows run in smaller parts once memory has run out, each of them once."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookmap.capture.halving import in_parts


@given(st.integers(0, 40), st.integers(1, 40), st.none() | st.integers(1, 40))
def test_every_row_runs_once_and_in_order(count: int, fit: int, most: int | None) -> None:
    done: list[int] = []

    def run(part: Sequence[int]) -> Sequence[int]:
        if len(part) > fit:
            return part
        done.extend(part)
        return ()

    after = in_parts(range(count), run, most)
    assert done == list(range(count))
    assert after is None or after <= (most or count)


def test_rows_that_ended_before_memory_ran_out_do_not_run_again() -> None:
    parts = []

    def run(part: Sequence[str]) -> Sequence[str]:
        parts.append("".join(part))
        return part[1:] if len(part) > 2 else ()

    assert in_parts("abcdefg", run, 5) == 2
    assert parts == ["abcde", "bc", "de", "fg"]


def test_what_goes_wrong_is_raised() -> None:
    def run(part: Sequence[int]) -> Sequence[int]:
        raise MemoryError

    with pytest.raises(MemoryError):
        in_parts([1, 2], run)
