"""Tensors of a decoding step are copied together when it has shown the last: only those that nothing writes over."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import plain_hooks
from support.opened import RAGGED
from support.raises import raises

import hookmap
from hookmap.capture.engines.collectors import EveryRow
from hookmap.capture.engines.pass_rows import PassRows
from hookmap.capture.engines.step_rows import StepRows
from hookmap.capture.engines.transfer import Transfer
from hookmap.capture.result import Capture
from hookmap.maps.selectors import Selector
from hookmap.maps.terms import Term
from hookmap.model import HookedModel

NEW = 6
LAYER = "model.layers.1"
"""the module whose input is tapped, and written over when the block has read it"""


@contextmanager
def written_over(model: Any, write: Callable[[torch.Tensor, int], object]) -> Iterator[None]:
    """What the block got is written over behind it, with the number of the pass: no result of the model changes."""
    number = 0

    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal number
        write(args[0] if args else kwargs["hidden_states"], number)
        number += 1

    handle = model.get_submodule(LAYER).register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def captured(hm: HookedModel, **options: Any) -> Capture:
    return hm.capture(RAGGED, ["resid_pre", "resid_mid", "logits"], max_new_tokens=NEW, **options)


def equal(one: Capture, other: Capture) -> bool:
    return all(
        torch.equal(one.read(number, *key), other.read(number, *key))
        for key in one.keys
        for number in range(len(RAGGED))
    )


Write = Callable[[torch.Tensor], object]


class Steps:
    """Two tensors of one observer, shown step by step; what reaches the first one's sample."""

    def __init__(self, may_wait: bool = True) -> None:
        self.rows: list[torch.Tensor] = []
        self.steps = StepRows()
        self.steps.may_wait = may_wait
        selectors = [Selector("resid_pre", layer, (Term(f"b.{layer}", "input", 0),), 0) for layer in range(2)]
        self.takers = [EveryRow(each, Transfer(), self.deliver, None, self.steps) for each in selectors]
        self.number = 0

    def deliver(self, row: int, first: int, rows: torch.Tensor) -> None:
        self.rows.append(rows)

    def step(self, *tensors: torch.Tensor, between: Write = lambda tensor: None) -> None:
        rows = PassRows(1, 1, (range(1),), (self.number,))
        for taker, tensor in zip(self.takers, tensors, strict=True):
            taker.take(rows, tensor)
            between(tensor)
        self.steps.end()
        self.number += 1


def column(value: float, width: int = 3) -> torch.Tensor:
    return torch.full((1, 1, width), float(value))


def test_what_nothing_writes_over_waits() -> None:
    run = Steps()
    for value in range(3):
        run.step(column(value), column(value + 10.0))
    run.steps.flush()
    assert run.steps.waiting == set(run.takers)
    assert [rows[:, 0].tolist() for rows in run.rows] == [[0, 1, 2], [10, 11, 12]]


@pytest.mark.parametrize(
    "write",
    [lambda tensor: tensor.zero_(), lambda tensor: tensor.numpy().fill(0.0), lambda tensor: tensor.mul_(1.0)],
    ids=["as autograd counts it", "behind autograd's back", "with what it was"],
)
def test_what_a_pass_writes_over_never_waits(write: Write) -> None:
    run = Steps()
    for value in range(1, 4):
        run.step(column(value), column(value), between=write)
    run.steps.flush()
    assert not run.steps.waiting
    assert [rows[:, 0].tolist() for rows in run.rows] == [[1, 2, 3], [1, 2, 3]]


def test_nothing_waits_where_something_may_write_and_where_nothing_counts_writes() -> None:
    edited, uncounted = Steps(may_wait=False), Steps()
    edited.step(column(1), column(2))
    with torch.inference_mode():
        uncounted.step(column(1), column(2))
    assert not edited.steps.waiting and not uncounted.steps.waiting


def test_tensors_of_several_widths_and_dtypes_keep_their_own() -> None:
    run = Steps()
    for value in (0.5, 1.5):
        run.step(column(value), column(value + 10, width=2).bfloat16())
    run.step(column(2.5, width=4), column(12.5, width=2).bfloat16())  # what comes later may be another
    run.steps.flush()
    assert [(tuple(rows.shape), rows.dtype) for rows in run.rows] == [
        ((2, 3), torch.float32), ((2, 2), torch.bfloat16), ((1, 4), torch.float32), ((1, 2), torch.bfloat16),
    ]  # fmt: skip
    assert [rows[:, 0].tolist() for rows in run.rows] == [[0.5, 1.5], [10.5, 11.5], [2.5], [12.5]]


@pytest.mark.parametrize("last", [0, 1, 4])
def test_what_a_model_writes_over_is_not_kept_wrong(last: int) -> None:
    """`last`: the number of the first pass that writes; what only a later one writes over is refused."""
    model = plain_hooks.build("qwen3")
    hm = hookmap.open(model)
    expected = captured(hm)

    def write(tensor: torch.Tensor, number: int) -> None:
        if number >= last:
            tensor.zero_()

    with written_over(model, write):
        if last == 4:
            with raises(hookmap.CaptureError, "resid_pre[1]", "written over", "--engine nnsight"):
                captured(hm)
        else:
            assert equal(captured(hm), expected)
    with written_over(model, write):
        assert equal(captured(hm, engine="nnsight"), expected)
