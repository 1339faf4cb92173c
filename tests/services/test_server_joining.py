"""Joining a batch that runs: the cache that takes rows in, which models allow it, and what each request keeps of it."""

import base64
import inspect
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import safetensors.torch
import torch
from support.opened import opened
from support.plain_hooks import build
from support.served import NAME, Served, demo
from support.tiny_tokenizer import tiny_tokenizer

import hookmap
from hookmap.services.server.joining import tried, why_no_joins
from hookmap.services.server.row_batch import RowBatch

pytestmark = pytest.mark.slow

STEER = {"do": "steer", "point": "resid_post", "layers": [4], "vector": [3.0] * 64, "strength": 2.0}
MEAN = {"do": "ablate", "point": "mlp_out", "layers": [2], "to": "mean"}


def texts(count: int, longest: int = 40) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(0, 250, (length + 12,), generator=draw).tolist() for length in lengths]


def test_rows_that_come_and_go_have_the_logits_of_their_text() -> None:
    """Against one pass over each text, without a cache. Rows join and leave at random, 300 times."""
    root = demo().model
    told = [*texts(30), *texts(2, longest=200)]
    with torch.no_grad():
        expected = [root(torch.tensor([text])).logits[0] for text in told]
    batch, rows = RowBatch(root), list[list[int]]()
    draw, waiting, seen = torch.Generator().manual_seed(2), list(range(len(told))), 0
    while waiting or rows:
        while waiting and len(rows) < int(torch.randint(1, 9, (1,), generator=draw)):
            coming = [waiting.pop() for _ in range(min(len(waiting), int(torch.randint(1, 4, (1,), generator=draw))))]
            lengths = [len(told[number]) - 12 for number in coming]
            logits, read = batch.read([told[number][:length] for number, length in zip(coming, lengths, strict=True)])
            for got, number, length in zip(logits, coming, lengths, strict=True):
                torch.testing.assert_close(got, expected[number][length - 1], atol=2e-4, rtol=1e-4)
            batch.join(read, lengths)
            rows += [[number, length] for number, length in zip(coming, lengths, strict=True)]
        logits = batch.step([told[number][place] for number, place in rows])
        for got, row in zip(logits, rows, strict=True):
            torch.testing.assert_close(got, expected[row[0]][row[1]], atol=2e-4, rtol=1e-4)
            row[1] += 1
            seen += 1
        for place in range(len(rows) - 1, -1, -1):
            if rows[place][1] == len(told[rows[place][0]]) or int(torch.randint(0, 20, (1,), generator=draw)) == 0:
                batch.leave(place)
                rows[place] = rows[-1]
                rows.pop()
    assert seen > 200 and batch.columns == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral"])
def test_requests_join_where_the_trial_shows_it(family: str) -> None:
    hm = opened(family)
    found = why_no_joins(hm)
    assert found is None or hm.why_no_pads is not None, found


@pytest.mark.parametrize(("family", "why"), [("mamba", "cache"), ("gemma2", "sliding")])
def test_where_the_cache_holds_something_else_requests_do_not_join(family: str, why: str) -> None:
    found = why_no_joins(opened(family))
    assert found is not None and (why in found.lower() or "pads" in found), found


def test_a_model_whose_rows_would_differ_is_found_out() -> None:
    """A model that takes the column for the position, as pads would have it: the trial sees it."""
    hm = hookmap.open(build("llama"), tokenizer=tiny_tokenizer())
    own = hm.hooks.root.forward

    def forward(input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> Any:
        held = more.get("cache", more.get("past_key_values"))
        if held is not None and held.get_seq_length():
            position_ids = torch.full_like(position_ids, held.get_seq_length())
        return own(input_ids, attention_mask=attention_mask, position_ids=position_ids, **more)

    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    hm.hooks.root.forward = forward  # type: ignore[method-assign]
    found = tried(hm)
    assert found is not None and "rows that join others differ" in found


def kept(number: int) -> dict[str, Any]:
    """A request that keeps, edits and draws as its number says."""
    edits = [[], [STEER], [MEAN]][number % 3]
    points = (["resid_mid", "q"], ["mlp_out", "resid_post"], ["attn_out"])[number % 3]
    record = {"points": points, "layers": [number % 20], "return": "inline", "interventions": edits}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": f"{number}+{number * 7}? " * (number + 1)}]}
    body |= {"max_tokens": 5 + 3 * number, "temperature": (0, 3.0)[number % 2], "seed": number, "hookmap": record}
    return {**body, "n": 2} if number == 4 else body


def tensors(answer: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    samples = answer["activations_meta"]["samples"]
    return [safetensors.torch.load(base64.b64decode(each["safetensors"])) for each in samples]


def test_captures_and_interventions_beside_others_are_those_of_a_run_alone(served: Served) -> None:
    """In float32 a batch changes the last bits only; rows of another request, or of pads, would be far away."""
    count = 9
    scheduler, free, first = served.models.get(NAME).scheduler, threading.Event(), list[bool]()
    seen: list[tuple[int, int]] = []

    def hold(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))
        if not first:
            first.append(free.wait(240))

    hook = demo().model.register_forward_pre_hook(hold, with_kwargs=True)
    try:
        with ThreadPoolExecutor(count + 1) as people:
            people.submit(served.chat, max_tokens=1)
            while not scheduler.running:
                time.sleep(0.005)
            asked = [people.submit(served.post, "/v1/chat/completions", **kept(n)) for n in range(count)]
            while scheduler.waiting < count:
                time.sleep(0.005)
            free.set()
            answers = [each.result() for each in asked]
    finally:
        free.set()
        hook.remove()
    assert [answer.status_code for answer in answers] == [200] * count, [answer.text[:300] for answer in answers]
    assert max(rows for rows, width in seen if width == 1) == count + 1, "they ran together"
    assert max(rows for rows, width in seen if width > 1) > 2, "and were read together, with pads"
    for number, answer in enumerate(answers):
        assert answer.status_code == 200, answer.text
        body = kept(number)
        drawn = {"do_sample": True, "temperature": 3.0, "top_k": 0, "top_p": 1.0} if body["temperature"] else {}
        record, rows = body["hookmap"], body.get("n", 1)
        run = demo().capture(
            [body["messages"]] * rows,
            record["points"],
            record["layers"],
            max_new_tokens=body["max_tokens"],
            seed=body["seed"],
            interventions=record["interventions"],
            batch_size=rows,
            **drawn,
        )
        found = answer.json()
        assert [choice["message"]["content"] for choice in found["choices"]] == run.texts, number
        for sample, held in enumerate(tensors(found)):
            for point, layer in run.keys:
                expected = run.read(sample, point, layer)
                got = held[f"{point}.{layer}"]
                torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_the_first_token_of_a_short_request_does_not_wait_for_a_long_one(served: Served) -> None:
    scheduler, answered, late = served.models.get(NAME).scheduler, threading.Event(), list[bool]()
    passes = 0

    def wait_for_the_short_one(*_: Any) -> None:
        nonlocal passes
        passes += 1
        while passes == 5 and scheduler.running + scheduler.waiting < 2 and not answered.is_set():
            time.sleep(0.005)
        if passes == 100:
            late.append(not answered.wait(60))

    body = {"messages": [{"role": "user", "content": "1+1?"}], "temperature": 5.0, "seed": 0, "max_tokens": 200}
    hook = demo().model.register_forward_pre_hook(wait_for_the_short_one)
    try:
        with ThreadPoolExecutor(1) as people:
            long = people.submit(served.chat, **body, ignore_eos=True)
            while passes < 5:
                time.sleep(0.005)
            assert served.chat(max_tokens=3).status_code == 200
            answered.set()
            assert long.result().json()["usage"]["completion_tokens"] == 200 and late == [False]
    finally:
        answered.set()
        hook.remove()


def test_a_session_that_opens_slowly_keeps_no_other_waiting(served: Served) -> None:
    begin, opens, free = served.sessions.begin, threading.Event(), threading.Event()

    def slow(*given: Any) -> Any:
        opens.set()
        assert free.wait(60)
        return begin(*given)

    served.sessions.begin = slow  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(2) as people:
            kept = people.submit(served.chat, max_tokens=2, store_activations=True)
            assert opens.wait(60)
            assert people.submit(served.chat, max_tokens=2).result(30).status_code == 200
            assert not kept.done()
            free.set()
            assert kept.result().json()["session_id"] is not None
    finally:
        free.set()
        del served.sessions.begin


def test_what_goes_wrong_with_one_request_is_told_to_that_one(served: Served) -> None:
    """Scores that are no numbers in the middle of an answer; the others of the batch go on."""
    late = {"do": "scale", "point": "resid_post", "layers": [8], "factor": 3e38, "steps": [3]}
    alone = served.chat(max_tokens=20).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(3) as people:
        wrong = people.submit(served.chat, max_tokens=20, hookmap={"return": "none", "interventions": [late]})
        right = [people.submit(served.chat, max_tokens=20) for _ in range(2)]
        assert [each.result().json()["choices"][0]["message"]["content"] for each in right] == [alone] * 2
    told = wrong.result()
    assert (told.status_code, told.json()["error"]["code"]) == (400, "not_finite")
    assert told.json()["error"]["param"] == "hookmap.interventions"
    assert "scale of resid_post, layers 8" in told.json()["error"]["message"]


def test_the_models_own_scores_that_are_no_numbers_are_the_servers_error(served: Served) -> None:
    """A weight that is no number, as in a broken checkpoint: greedy or drawn, plain or kept."""
    weight = demo().model.get_submodule("model.layers.3.mlp.down_proj").weight
    own = weight.data[0, 0].clone()
    try:
        weight.data[0, 0] = float("nan")
        for body in ({}, {"temperature": 1.0}, {"stream": True}, {"hookmap": {"points": ["embed"]}}):
            told = served.chat(**body)
            assert (told.status_code, told.json()["error"]["code"]) == (500, "not_finite"), body
        edit = {"do": "scale", "point": "resid_post", "layers": [8], "factor": 2.0}
        told = served.chat(hookmap={"return": "none", "interventions": [edit]})
        assert told.status_code == 500, "the intervention is not to blame"
    finally:
        weight.data[0, 0] = own
    assert served.chat(max_tokens=1).status_code == 200
