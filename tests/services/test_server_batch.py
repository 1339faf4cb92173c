"""Requests join the batch that runs, and nobody can tell: each gets what is its own."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from support.served import NAME, Served, demo, serving

import hookmap
from hookmap.loading.generation import settings
from hookmap.loading.memory import MemoryUse
from hookmap.loading.prompts import Prompt
from hookmap.services.server.batch_limits import BatchLimits
from hookmap.services.server.jobs import Job
from hookmap.services.server.running_batch import RunningBatch

pytestmark = pytest.mark.slow

PROMPTS = ["Tom has 3 apples.", "2 and 3?", "Ann buys 4 pens. She buys 5 more. How many?", "x"]


STEER = {"do": "steer", "point": "resid_post", "layers": [4], "vector": [3.0] * 64, "strength": 2.0}


@contextlib.contextmanager
def watched(before: Callable[[int, int], None]) -> Iterator[list[tuple[int, int]]]:
    """The (rows, width) of each forward pass; `before` is told them, and may wait or raise."""
    seen: list[tuple[int, int]] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        shape = tuple(kwargs["input_ids"].shape)
        seen.append(shape)
        before(*shape)

    hook = demo().model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def hooks_on(model: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def until(so: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not so():
        assert time.monotonic() < end
        time.sleep(0.005)


def together(
    served: Served, asks: list[Callable[[], Any]], before: Callable[[int, int], None] = lambda rows, width: None
) -> tuple[list[Any], list[tuple[int, int]]]:
    """What each call gets where all of them wait for the model at once, and the forward passes that ran for them."""
    scheduler, free = served.models.get(NAME).scheduler, threading.Event()
    first = []

    def hold(rows: int, width: int) -> None:
        if not first:
            first.append(free.wait(240))
        else:
            before(rows, width)

    with watched(hold) as seen, ThreadPoolExecutor(len(asks) + 1) as people:
        try:
            running = people.submit(served.chat, max_tokens=1)
            until(lambda: scheduler.running)
            waiting: list[Future[Any]] = []
            for ask in asks:
                waiting.append(people.submit(ask))
                until(lambda: scheduler.waiting + scheduler.running > len(waiting))  # they come in this order
        finally:
            free.set()
        assert running.result().status_code == 200
        answers = [each.result() for each in waiting]
        served.idle()
    return answers, seen[1:]


def decoding(seen: list[tuple[int, int]]) -> list[int]:
    """The rows of the passes that decode."""
    return [rows for rows, width in seen if width == 1]


def asked(number: int, **body: Any) -> dict[str, Any]:
    """A request of its own length, limit, stop string and logprobs."""
    own: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPTS[number % 4]}], "max_tokens": 9 + 7 * number}
    own |= {"temperature": 0} | ({"stop": "a"} if number == 2 else {})
    return {**own, **({"logprobs": True, "top_logprobs": number} if number in (1, 3) else {}), **body}


def whole(served: Served, **body: Any) -> Any:
    answer = served.post("/v1/chat/completions", **body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["choices"], found["usage"]


def streamed(served: Served, **body: Any) -> Any:
    """The same, put together of the chunks."""
    texts, reasons, logprobs, usage = "", None, [], None
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        options: Any = {"model": NAME, "stream": True, "stream_options": {"include_usage": True}, **body}
        for chunk in client.chat.completions.create(**options):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts += choice.delta.content or ""
                reasons = choice.finish_reason or reasons
                logprobs += choice.logprobs.content or [] if choice.logprobs else []
    assert usage is not None
    told = {"content": [each.model_dump() for each in logprobs], "refusal": None} if logprobs else None
    message = {"role": "assistant", "content": texts, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": reasons}
    return [{**choice, "logprobs": told}], usage.model_dump(exclude_unset=True)


def same(one: Any, other: Any) -> None:
    """But for the last bits of logprobs, and which of two equally likely tokens is named."""
    (choices, usage), (expected, expected_usage) = one, other
    assert usage == expected_usage
    for choice, alone in zip(choices, expected, strict=True):
        assert choice["message"]["content"] == alone["message"]["content"]
        assert (choice["index"], choice["finish_reason"]) == (alone["index"], alone["finish_reason"])
        found, own = choice.get("logprobs"), alone.get("logprobs")
        assert (found is None) == (own is None)
        for a, b in zip((found or {}).get("content", []), (own or {}).get("content", []), strict=True):
            assert a["token"] == b["token"] and a["logprob"] == pytest.approx(b["logprob"], abs=1e-3)
            tops = [[top["logprob"] for top in each["top_logprobs"]] for each in (a, b)]
            assert tops[0] == pytest.approx(tops[1], abs=1e-3)


def test_each_gets_what_it_gets_alone_streamed_or_whole(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hookmap.server")
    alone = [whole(served, **asked(number)) for number in range(4)]
    assert {choices[0]["finish_reason"] for choices, _ in alone} == {"stop", "length"}
    ways = [whole, streamed, streamed, whole]
    found, seen = together(served, [lambda n=n: ways[n](served, **asked(n)) for n in range(4)])
    assert decoding(seen)[0] == 4, "one batch"
    assert len(decoding(seen)) == max(usage["completion_tokens"] for _, usage in alone) - 1
    assert [rows for rows, width in seen if width > 1] == [2, 2], "those of much the same length in one pass"
    for one, other in zip(found, alone, strict=True):
        same(one, other)
    assert sum("in a batch of 4 requests" in record.getMessage() for record in caplog.records) == 4


def test_choices_and_lists_of_prompts_share_batches_too(served: Served) -> None:
    completions = {"prompt": ["2+2=", "Tom has", "Tom"], "max_tokens": 6, "temperature": 0, "logprobs": 1}
    alone = served.hm.capture(completions["prompt"], ["embed"], max_new_tokens=6, batch_size=1)
    asks = [
        lambda: served.post("/v1/completions", **completions).json(),
        lambda: whole(served, **asked(0, n=2)),
    ]
    (lists, (choices, usage)), seen = together(served, asks)
    assert decoding(seen)[0] == 5, "three prompts and two choices"
    assert [choice["text"] for choice in lists["choices"]] == alone.texts
    assert lists["usage"]["prompt_tokens"] == sum(sample.prompt_tokens for sample in alone.samples)
    expected, one = whole(served, **asked(0))
    assert [choice["message"]["content"] for choice in choices] == [expected[0]["message"]["content"]] * 2
    assert usage == {**one, "completion_tokens": 2 * one["completion_tokens"], "total_tokens": usage["total_tokens"]}


def test_rows_that_are_drawn_are_drawn_from_their_own_distribution(served: Served) -> None:
    """Of the likeliest token only, a draw is greedy: a row that read another's logits would differ."""
    drawn = {"temperature": 1.0, "top_k": 1}
    alone = [whole(served, **asked(number)) for number in range(4)]
    found, seen = together(served, [lambda n=n: whole(served, **asked(n, **drawn)) for n in range(4)])
    assert decoding(seen)[0] == 4
    for one, other in zip(found, alone, strict=True):
        same(one, other)


@pytest.mark.parametrize(
    "body",
    [
        {"seed": 1, "temperature": 2.0},
        {"temperature": 0.5, "top_k": 1},
        {"repetition_penalty": 1.5},
        {"hookmap": {"points": ["resid_mid", "q"], "layers": [3, 9], "return": "inline"}},
        {"hookmap": {"interventions": [STEER], "return": "none"}},
        {"hookmap": {"return": "none", "summary": {"point": "resid_post", "of": "lens", "layers": [3, -1]}}},
    ],
    ids="seed temperature penalty capture intervention summary".split(),
)
def test_each_has_settings_captures_and_interventions_of_its_own(served: Served, body: dict[str, Any]) -> None:
    asks = [lambda: whole(served, **asked(0, max_tokens=60)), lambda: whole(served, **asked(1, **body))]
    alone = [ask() for ask in asks]
    found, seen = together(served, asks)
    assert max(decoding(seen)) == 2, "a session may open some steps later"
    for one, other in zip(found, alone, strict=True):
        same(one, other)


@pytest.mark.parametrize(
    "body",
    [
        {"hookmap": {"points": ["pattern"], "layers": [2], "return": "inline"}},
        {"hookmap": {"points": ["logits"], "return": "inline"}},
        {"max_tokens": 900, "stop": "T"},
    ],
    ids="pattern logits tokens".split(),
)
def test_what_cannot_be_shared_runs_alone(tmp_path: Path, body: dict[str, Any]) -> None:
    with serving(tmp_path, batch_tokens=1000) as served:
        asks = [lambda: whole(served, **asked(0)), lambda: whole(served, **asked(1, **body))]
        found, seen = together(served, asks)
        assert {rows for rows, _ in seen} == {1}
        same(found[1], whole(served, **asked(1, **body)))


def test_a_row_at_the_last_position_of_the_model_runs_beside_a_short_one(served: Served) -> None:
    wide = asked(0, messages=[{"role": "user", "content": "x" * 990}], max_tokens=None, stop="zz")
    asks = [lambda: whole(served, **wide), lambda: whole(served, **asked(1, max_tokens=100))]
    alone = [ask() for ask in asks]
    assert 1000 < alone[0][1]["total_tokens"] <= 1024
    found, seen = together(served, asks)
    assert max(decoding(seen)) == 2
    for one, other in zip(found, alone, strict=True):
        same(one, other)


def test_with_a_batch_of_one_nobody_shares(tmp_path: Path) -> None:
    with serving(tmp_path, batch=1) as served:
        found, seen = together(served, [lambda: whole(served, **asked(0))] * 2)
        assert {rows for rows, _ in seen} == {1}
        assert found[0] == found[1] == whole(served, **asked(0)), "to the last bit"


def test_a_row_that_ends_is_answered_while_others_go_on(served: Served) -> None:
    answered, passes = threading.Event(), []

    def wait_for_the_short_one(rows: int, width: int) -> None:
        passes.append(rows)
        assert len(passes) != 14 or answered.wait(240), "the short answer waits for the long one"

    def short() -> Any:
        found = whole(served, **asked(0, max_tokens=3))
        answered.set()
        return found

    found, seen = together(served, [lambda: whole(served, **asked(3)), short], wait_for_the_short_one)
    assert decoding(seen)[0] == 2 and len(seen) > 14
    same(found[0], whole(served, **asked(3)))


def test_who_leaves_a_batch_does_not_end_it(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hookmap.server")
    passes: list[int] = []
    scheduler = served.models.get(NAME).scheduler

    def leave() -> None:
        body = asked(2, stream=True, max_tokens=60, stop=None)
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=240) as answer:
            lines = (line for line in answer.iter_lines() if "content" in line)
            for _ in zip(range(4), lines, strict=False):
                pass

    def give_the_server_time(rows: int, width: int) -> None:
        passes.append(rows)
        if len(passes) > 6 and scheduler.running == 2:  # it has not noticed yet
            time.sleep(0.2)

    found, seen = together(served, [leave, lambda: whole(served, **asked(3))], give_the_server_time)
    assert decoding(seen)[0] == 2
    same(found[1], whole(served, **asked(3)))
    assert sum(": cancelled in" in record.getMessage() for record in caplog.records) == 1


def test_memory_that_runs_out_halves_the_batch_and_nothing_is_lost(served: Served) -> None:
    """Also after some tokens: they were sent, so the rows go on from there."""

    def refuse(rows: int, width: int) -> None:
        passes.append(rows)
        if rows > 2 and len(passes) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory (forced by a test)")

    passes: list[int] = []
    alone = [whole(served, **asked(number)) for number in range(4)]
    ways = [whole, streamed, streamed, whole]
    found, seen = together(served, [lambda n=n: ways[n](served, **asked(n)) for n in range(4)], refuse)
    rows = decoding(seen)
    refused = next(place for place, count in enumerate(rows) if count < 4)
    assert rows[:refused] == [4] * refused and refused >= 4 and max(rows[refused:]) == 2
    for one, other in zip(found, alone, strict=True):
        same(one, other)


def test_drawn_rows_that_are_halved_draw_on(served: Served) -> None:
    """Four choices of one request with a seed: 20 tokens at temperature 4, equal by chance in less than 1 of 10^6."""

    def refuse(rows: int, width: int) -> None:
        passes.append(rows)
        if rows > 2 and len(passes) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory (forced by a test)")

    passes: list[int] = []
    body = asked(0, n=4, seed=11, temperature=4.0, max_tokens=20)
    choices, usage = whole(served, **body)
    [found], seen = together(served, [lambda: whole(served, **body)], refuse)
    assert {rows for rows, _ in seen} == {4, 2, 1}
    assert (found[0], found[1]) == (choices, usage)
    assert len({choice["message"]["content"] for choice in choices}) == 4


def test_prompts_that_do_not_fit_together_are_read_one_by_one_and_their_rows_kept_once(served: Served) -> None:
    """Memory runs out in a late layer: rows of an earlier one have been seen by then."""
    record = {"points": ["resid_mid"], "layers": [2], "return": "store"}
    bodies = [asked(number, hookmap=record) for number in range(4)]
    refused: list[tuple[int, int]] = []

    def refuse(_: Any, args: Any) -> None:
        rows, width = args[0].shape[:2]
        if rows > 1 and width > 1:
            refused.append((rows, width))
            raise torch.OutOfMemoryError("CUDA out of memory (forced by a test)")

    def open_all(rows: int, width: int) -> None:
        until(lambda: len(served.sessions.all()) == len(older) + 4)

    alone, before = [whole(served, **asked(number)) for number in range(4)], hooks_on(demo().model)
    older = served.sessions.all()
    hook = demo().model.get_submodule("model.layers.10").register_forward_pre_hook(refuse)
    try:
        asks = [lambda body=body: served.post("/v1/chat/completions", **body).json() for body in bodies]
        found, seen = together(served, asks, open_all)
    finally:
        hook.remove()
    assert refused and max(decoding(seen)) == 4
    assert hooks_on(demo().model) == before, "those of the pass that failed are gone too"
    for number, answer in enumerate(found):
        same((answer["choices"], answer["usage"]), alone[number])
        store = hookmap.open_store(served.root / answer["session_id"])
        run = demo().capture(
            [bodies[number]["messages"]], ["resid_mid"], [2], max_new_tokens=bodies[number]["max_tokens"]
        )
        own = store.read(0, "resid_mid", 2)
        assert len(own) == answer["usage"]["total_tokens"] - 1
        torch.testing.assert_close(own, run.read(0, "resid_mid", 2)[: len(own)], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kept", [False, True], ids=["plain", "kept"])
def test_the_one_that_does_not_fit_alone_is_the_only_one_refused(served: Served, kept: bool) -> None:
    def refuse(rows: int, width: int) -> None:
        if width > 200:
            raise torch.OutOfMemoryError("CUDA out of memory (forced by a test)")

    before = {session.id for session in served.sessions.all()}
    wide = asked(0, messages=[{"role": "user", "content": "x" * 400}], store_activations=kept)
    asks: list[Any] = [lambda n=n: whole(served, **asked(n)) for n in range(3)]
    asks.insert(1, lambda: served.post("/v1/chat/completions", **wide))
    found, seen = together(served, asks, refuse)
    assert max(decoding(seen)) >= 2, "those behind it wait for its turn, and run together"
    refused = found.pop(1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "out_of_memory")
    for number, one in enumerate(found):
        same(one, whole(served, **asked(number)))
    assert {session.id for session in served.sessions.all()} == before


def test_what_breaks_before_a_batch_runs_is_told_and_the_next_request_runs(tmp_path: Path) -> None:
    """The thread of a model never ends with a request."""
    with serving(tmp_path) as served:
        scheduler, told = served.models.all[0].scheduler, queue.SimpleQueue[Any]()
        config = settings(served.hm.root.generation_config, None, max_new_tokens=1, do_sample=False, options={})
        job = Job("broken", (Prompt("", (5,)),), 1, config, 1, stop=("\ud800",), seed=None, emit=told.put)
        scheduler.submit(job)
        assert told.get(timeout=120).status == 500
        assert served.chat(max_tokens=1).status_code == 200
        assert scheduler.running == 0


def test_one_that_breaks_when_its_first_token_is_chosen_does_not_touch_those_that_are_read_with_it(
    tmp_path: Path,
) -> None:
    """The other was given its first token before: it is not read once more, with that token behind its prompt."""
    hm, ended, told = demo(), dict[str, Any](), list[Any]()
    batch = RunningBatch(
        hm, BatchLimits(rows=8, tokens=2_000), lambda job, event, together: ended.update({job.id: event})
    )
    config = settings(hm.root.generation_config, None, max_new_tokens=3, do_sample=False, options={})
    for name, top in (("right", 1), ("broken", -1)):
        job = Job(name, (Prompt("", (5, 6, 7)),), 1, config, 3, stop=(), seed=None, top_logprobs=top, emit=told.append)
        batch.begin(job, MemoryUse())
    while not batch.idle:
        batch.step()
    batch.close()
    assert ended["broken"].status == 500
    expected = hm.root.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    assert ended["right"].new == (tuple(expected),)
    assert [token.id for tokens in told for token in tokens] == expected
