"""What an engine shows is held against what the model was fed, on every forward pass: what does not fit is no row."""

from typing import Any

import pytest
import torch
from support.raises import raises

from hookmap.activations import Activation
from hookmap.capture.engines.observation import Observer
from hookmap.capture.engines.pass_rows import BatchLayout
from hookmap.capture.rows import RowSelection, row_selection
from hookmap.errors import CaptureError
from hookmap.maps.selectors import Selector
from hookmap.maps.terms import Term

STREAM = Selector("resid_post", 0, (Term("block", "output", None),), 0)
WIDTH = 4


class Run:
    """An observer of prompts of 4 and 3 tokens, and what it wrote."""

    def __init__(self, keep: RowSelection | None = None) -> None:
        self.rows: list[Activation] = []
        self.observer = Observer([STREAM], BatchLayout((0, 1), (WIDTH, WIDTH - 1)), self.rows.append, selection=keep)
        self.watch = self.observer.watcher("block", "output")

    def feed(self, width: int, rows: int = 2, **kwargs: Any) -> None:
        self.observer.begin_pass((), kwargs or {"input_ids": torch.zeros(rows, width, dtype=torch.long)})

    def show(self, width: int, rows: int = 2) -> None:
        self.watch((), {}, torch.arange(rows * width * 5.0).view(rows, width, 5))


def test_rows_are_of_the_tokens_whether_they_are_given_by_name_by_place_or_as_vectors() -> None:
    ids = torch.zeros(2, WIDTH, dtype=torch.long)
    for args, kwargs in (((), {"input_ids": ids}), ((ids,), {}), ((), {"inputs_embeds": torch.zeros(2, WIDTH, 5)})):
        run = Run()
        run.observer.begin_pass(args, kwargs)
        run.show(WIDTH)
        run.observer.sampled(WIDTH + 1, [True, True])
        assert run.observer.finish(WIDTH + 1) == (1, 1)
        first, second = (written.tensor[:, 0].tolist() for written in run.rows)
        assert first == [0, 5, 10, 15] and second == [25, 30, 35]  # the pad before the second prompt is no row


def test_rows_come_in_the_order_of_the_tokens_whatever_a_pass_brings() -> None:
    """One column waits in a block for more; three at once must not go past it."""
    run = Run()
    for width in (1, 3):
        run.feed(width)
        run.show(width)
    run.observer.sampled(WIDTH + 1, [True, True])
    run.observer.finish(WIDTH + 1)
    starts = [(a.sample, a.start, len(a.tensor)) for a in run.rows]
    assert [part for part in starts if part[0] == 0] == [(0, 0, 1), (0, 1, 3)]
    assert [part for part in starts if part[0] == 1] == [(1, 0, 3)]


@pytest.mark.parametrize(
    ("fed", "said"),
    [
        ({"width": WIDTH, "rows": 4}, "fed 4 rows, expected 2.*no row for each prompt"),
        ({"width": WIDTH + 1}, "fed 5 tokens, expected at most 4.*takes tokens back"),
        ({"width": 0, "attention_mask": torch.ones(2, WIDTH)}, "without input_ids: it got attention_mask"),
    ],
)
def test_what_is_fed_must_be_the_next_tokens(fed: dict[str, Any], said: str) -> None:
    with pytest.raises(CaptureError, match=f"(?s){said}"):
        Run().feed(**fed)


def test_a_pass_that_takes_tokens_back_is_refused() -> None:
    """Assisted generation feeds a guess of three tokens, and then again what of it was wrong."""
    run = Run()
    run.feed(WIDTH)
    run.show(WIDTH)
    run.observer.sampled(WIDTH + 1, [False, False])
    with raises(CaptureError, "fed 3 tokens, expected at most 1", "or 5 (all of them)"):
        run.feed(3)


@pytest.mark.parametrize(("rows", "width"), [(2, WIDTH + 1), (2, WIDTH - 1), (1, WIDTH), (3, WIDTH)])
def test_a_tensor_that_is_not_of_the_tokens_fed_is_refused(rows: int, width: int) -> None:
    run = Run()
    run.feed(WIDTH)
    with pytest.raises(CaptureError, match=rf"expected a tensor of \[2, 4, ...\].*got \[{rows}, {width}, 5\]"):
        run.show(width, rows)
    assert not run.rows


def decoding() -> Run:
    """A run that has read its prompts, and is fed one token of each row."""
    run = Run()
    run.feed(WIDTH)
    run.show(WIDTH)
    run.observer.sampled(WIDTH + 1, [False, False])
    run.feed(1)
    return run


def test_each_token_that_is_generated_has_the_row_that_was_shown() -> None:
    run = decoding()
    with run.observer.aside():
        run.watch((), {}, torch.full((2, 1, 5), 7.0))  # somebody else runs the model
    run.show(1)
    run.observer.sampled(WIDTH + 2, [True, True])
    run.observer.finish(WIDTH + 2)
    assert [(a.sample, a.start, a.tensor[:, 0].tolist()) for a in run.rows[2:]] == [(0, 4, [0]), (1, 3, [5])]


@pytest.mark.parametrize(("rows", "width"), [(2, 2), (1, 1), (4, 1)])
def test_a_token_that_is_generated_has_a_tensor_of_one_column(rows: int, width: int) -> None:
    with pytest.raises(CaptureError, match=r"expected a tensor of \[2, 1, \.\.\.\]"):
        decoding().show(width, rows)


def test_a_module_that_runs_twice_for_a_token_is_refused() -> None:
    run = decoding()
    run.show(1)
    with pytest.raises(CaptureError, match="called more than once in forward pass 1"):
        run.show(1)


def test_a_module_that_runs_before_the_model_does_is_refused() -> None:
    with raises(CaptureError, "block.output was reached outside a forward pass"):
        Run().show(WIDTH)


@pytest.mark.parametrize(("passes", "columns"), [(0, WIDTH), (1, WIDTH + 2), (2, WIDTH + 1)])
def test_all_tokens_but_the_last_were_fed(passes: int, columns: int) -> None:
    """A model that generates elsewhere than the capture listens would leave rows out, or have too many."""
    run = Run()
    for number in range(passes):
        run.feed(WIDTH if number == 0 else 1)
        run.show(WIDTH if number == 0 else 1)
        run.observer.sampled(WIDTH + number + 1, [False, False])
    with raises(CaptureError, "did not run"):
        run.observer.finish(columns)


def test_rows_of_certain_tokens_need_their_ids() -> None:
    with raises(CaptureError, "without token ids"):
        Run(row_selection(positions="text=the")).feed(WIDTH, inputs_embeds=torch.zeros(2, WIDTH, 5))
