"""What vLLM's clients set besides OpenAI's fields, against the scores that the model itself gives."""

from collections import Counter
from typing import Any

import pytest
import torch
from openai import OpenAI
from support.served import MESSAGES, NAME, Served, demo
from tokenizers.processors import TemplateProcessing

from hookmap.loading.prompts import encode


def greedy(change: Any, count: int, ends: tuple[int, ...]) -> list[int]:
    """Tokens chosen one by one, without a cache; `change(scores, new)` changes the scores of each."""
    (prompt,) = encode([MESSAGES], demo().tokenizer)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < count and not (new and new[-1] in ends):
            scores = demo().model(torch.tensor([[*prompt.token_ids, *new]])).logits[0, -1].clone()
            change(scores, new)
            new.append(int(scores.argmax()))
    return new


def tokens(served: Served, **body: Any) -> list[int]:
    answer = served.chat(**body, return_token_ids=True)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


ALONE = {"hookmap": {"points": ["logits"], "return": "inline"}}
"""such a request joins no batch"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, ALONE], ids=["joined", "alone"])
def test_penalties_and_biases_change_the_scores_as_openai_documents_it(served: Served, more: dict[str, Any]) -> None:
    def change(scores: torch.Tensor, new: list[int]) -> None:
        for token, count in Counter(new).items():
            scores[token] -= 1.5 * count + 0.5
        scores[97] += 7.0
        scores[32] -= 100.0

    body = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {"97": 7.0, "32": -100}}
    eos = demo().tokenizer.eos_token_id
    expected = greedy(change, 24, (eos,))
    found = tokens(served, max_tokens=24, **body, **more)
    assert found == expected != tokens(served, max_tokens=24)


@pytest.mark.slow
@pytest.mark.parametrize(("frequency", "presence"), [(2.0, 0.0), (0.0, 2.0)])
def test_one_penalty_counts_and_the_other_does_not(served: Served, frequency: float, presence: float) -> None:
    """A token that is wanted again and again is given up where its penalty grows."""

    def change(scores: torch.Tensor, new: list[int]) -> None:
        scores[97] += 20.0
        for token, count in Counter(new).items():
            scores[token] -= frequency * count + presence

    expected = greedy(change, 12, (demo().tokenizer.eos_token_id,))
    assert (expected.count(97) == 12) == (frequency == 0)
    body = {"frequency_penalty": frequency, "presence_penalty": presence, "logit_bias": {"97": 20.0}}
    assert tokens(served, max_tokens=12, **body) == expected


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, ALONE], ids=["joined", "alone"])
def test_the_end_comes_neither_too_early_nor_where_it_is_ignored(served: Served, more: dict[str, Any]) -> None:
    eos, plain = demo().tokenizer.eos_token_id, tokens(served, max_tokens=60)
    assert plain[-1] == eos and len(plain) < 60

    # The end is token number len(plain), so one of these lets it come there.
    for least in (len(plain) - 1, len(plain), len(plain) + 3):

        def later(scores: torch.Tensor, new: list[int], least: int = least) -> None:
            if len(new) < least:
                scores[eos] = -torch.inf

        found = tokens(served, max_tokens=80, min_tokens=least, **more)
        assert found == greedy(later, 80, (eos,)) and (found == plain) == (least < len(plain))
    going_on = tokens(served, max_tokens=60, ignore_eos=True, **more)
    assert len(going_on) == 60 and going_on == greedy(lambda scores, new: None, 60, ())
    stop = plain[4]
    answer = served.chat(max_tokens=60, stop_token_ids=[stop], return_token_ids=True, **more).json()["choices"][0]
    assert (answer["token_ids"], answer["finish_reason"]) == (plain[: plain.index(stop) + 1], "stop")


def test_logprobs_are_told_before_penalties_and_biases(served: Served) -> None:
    body = {"max_tokens": 1, "logprobs": True, "top_logprobs": 2}
    plain = served.chat(**body).json()["choices"][0]["logprobs"]["content"][0]
    biased = served.chat(**body, logit_bias={"97": 100}).json()["choices"][0]["logprobs"]["content"][0]
    assert biased["token"] == "a" and biased["top_logprobs"] == plain["top_logprobs"]


def test_prompt_logprobs_are_those_of_the_model_with_their_ranks(served: Served, client: OpenAI) -> None:
    (prompt,) = encode([MESSAGES], served.hm.tokenizer)
    with torch.no_grad():
        logits = served.hm.model(torch.tensor([list(prompt.token_ids)])).logits[0].log_softmax(-1)
    asked: Any = {"max_tokens": 1, "temperature": 0, "extra_body": {"prompt_logprobs": 2}}
    chat: Any = client.chat.completions.create(model=NAME, messages=MESSAGES, **asked)
    ids = list(prompt.token_ids)
    completion: Any = client.completions.create(model=NAME, prompt=ids, **asked)
    assert completion.choices[0].logprobs is None
    for told in (chat.prompt_logprobs, completion.choices[0].prompt_logprobs):
        assert told[0] is None and len(told) == len(ids)
        for place, each in enumerate(told[1:]):
            row, token = logits[place], ids[place + 1]
            own = each[str(token)]
            assert own["logprob"] == pytest.approx(float(row[token]), abs=1e-3)
            assert own["rank"] == int((row > row[token]).sum()) + 1
            assert own["decoded_token"] == served.hm.tokenizer.decode([token])
            best = row.topk(2)
            assert {int(id) for id in best.indices} | {token} == {int(id) for id in each}


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "8 that may be generated"),
        ({"stop_token_ids": [259]}, "stop_token_ids", "0 to 258"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"259": 1}}, "logit_bias", "0 to 258"),
        ({"logit_bias": {"²": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "0 to 258"),
        ({"logit_bias": {"3": 101}}, "logit_bias.3", "less than or equal to 100"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "one piece"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
    ],
)
def test_what_cannot_be_is_refused(served: Served, body: dict[str, Any], param: str, told: str) -> None:
    answer = served.chat(**body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param and told in answer.json()["error"]["message"]


def test_texts_and_messages_are_tokenized_as_vllm_does_it(served: Served) -> None:
    tokenizer = served.hm.tokenizer
    found = served.post("/tokenize", prompt="Tom has é", return_token_strs=True).json()
    ids = tokenizer("Tom has é")["input_ids"]
    expected = {"count": len(ids), "max_model_len": 1024, "tokens": ids}
    assert found == {**expected, "token_strs": tokenizer.convert_ids_to_tokens(ids)}
    for more, how in (({}, {"add_generation_prompt": True}), ({"add_generation_prompt": False}, {})):
        ids = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False, **how)
        assert served.post("/tokenize", messages=MESSAGES, **more).json()["tokens"] == ids
    assert served.post("/detokenize", tokens=ids).json() == {"prompt": tokenizer.decode(ids)}
    assert set(served.get("/version").json()) == {"version"}
    for body in ({}, {"prompt": "a", "messages": MESSAGES}, {"prompt": "a", "tools": []}, {"prompt": "\ud800"}):
        assert served.post("/tokenize", **body).status_code == 400, body
    assert served.post("/detokenize", tokens=[259]).status_code == 400
    assert served.post("/tokenize", prompt="x" * 10**6).json()["error"]["code"] == "context_length_exceeded"


def test_tokens_that_a_tokenizer_adds_are_left_out_where_that_is_asked(served: Served) -> None:
    tokenizer = served.hm.tokenizer
    backend, eos = tokenizer.backend_tokenizer, tokenizer.eos_token
    before, ids = backend.post_processor, tokenizer("Tom")["input_ids"]
    backend.post_processor = TemplateProcessing(
        single=f"{eos} $A", pair=f"{eos} $A $B", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    try:
        for more, expected in (({}, [tokenizer.eos_token_id, *ids]), ({"add_special_tokens": False}, ids)):
            assert served.post("/tokenize", prompt="Tom", **more).json()["tokens"] == expected
    finally:
        backend.post_processor = before


def test_an_intervention_of_no_kind_lists_the_kinds_one_line_for_each_problem(served: Served) -> None:
    wrong = [{"point": "resid_mid"}, {"do": "dance"}, {"do": "steer", "point": "resid_mid"}]
    error = served.chat(hookmap={"return": "none", "interventions": wrong}).json()["error"]
    lines = error["message"].splitlines()[1:]
    assert error["param"] == "hookmap.interventions" and len(lines) == 3
    kinds = "steer, ablate, patch, project_out, scale, clamp, noise, swap, replace, low_rank, skip"
    assert lines[0].endswith(f"expected do: one of {kinds}") and "got 'dance'" in lines[1] and "vector" in lines[2]
    error = served.chat(temperature=-1, n=0, hookmap={"point": 1}).json()["error"]
    assert [line.split(":")[0] for line in error["message"].splitlines()] == ["temperature", "n", "hookmap.point"]
    assert error["param"] == "temperature"
