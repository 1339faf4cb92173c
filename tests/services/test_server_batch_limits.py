"""Which requests share a batch, decided without a model."""

from typing import Any

import pytest

pytest.importorskip("fastapi")

from transformers import GenerationConfig

from hookmap.loading.prompts import Prompt
from hookmap.services.server.batch_limits import BatchLimits, read_together
from hookmap.services.server.jobs import Job

LIMITS = BatchLimits(rows=4, tokens=100, columns=20, padded=20)


def job(*lengths: int, choices: int = 1, new: int = 5, **more: Any) -> Job:
    """One with a prompt of each length."""
    prompts = tuple(Prompt("", (1,) * length) for length in lengths for _ in range(choices))
    return Job("id", prompts, choices, GenerationConfig(), new, (), more.pop("seed", None), **more)


def test_those_that_wait_join_in_their_order_while_there_is_room() -> None:
    first, short, two, last = job(5), job(3), job(4, 4, 4), job(9)
    assert LIMITS.companions(first, [short, two, last]) == [short, last]


@pytest.mark.parametrize(
    "other",
    [job(5, seed=1), job(5, interventions=("any",)), job(5, prompt_logprobs=0), job(16), job(5, new=16)],
    ids="seed intervention echo prompt completion".split(),
)
def test_what_may_not_or_does_not_fit_runs_alone(other: Job) -> None:
    assert LIMITS.companions(job(5), [other]) == []


def test_lengths_differ_only_where_the_model_may_be_padded() -> None:
    unpadded = BatchLimits(rows=4, tokens=100)
    same = job(5)
    assert unpadded.companions(job(5), [job(6), same]) == [same]


def test_the_choices_of_a_prompt_are_never_separated() -> None:
    big, small = job(5, choices=6), job(5)
    assert [[number for _, number in batch] for batch in LIMITS.batches([big, small])] == [[0, 1, 2, 3, 4, 5], [0]]
    prompts = job(5, 6, 7, choices=2)
    assert [[number for _, number in batch] for batch in LIMITS.batches([prompts])] == [[0, 1, 2, 3], [4, 5]]


def test_prompts_of_a_request_with_a_seed_run_one_after_another() -> None:
    seeded = job(5, 5, choices=2, seed=1)
    assert [[number for _, number in batch] for batch in LIMITS.batches([seeded])] == [[0, 1], [2, 3]]


def test_prompts_of_much_the_same_length_are_read_in_one_pass() -> None:
    assert read_together([40, 500, 20, 510, 41, 8]) == [[0, 2, 4], [1, 3], [5]]
    assert read_together([]) == []
