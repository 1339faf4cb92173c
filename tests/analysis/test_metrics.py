"""Metrics and losses are what transformers' own logits give, by hand, in padded batches and with interventions."""

from typing import Any

import pytest
import torch
from support.opened import EACH_STRUCTURE, RAGGED, opened
from support.raises import raises

import hookmap
from hookmap import metrics


def logits(name: str, ids: list[int]) -> torch.Tensor:
    """Of one text alone, by transformers: [pos, d_vocab]."""
    with torch.no_grad():
        return opened(name).model(torch.tensor([ids]), use_cache=False).logits[0]


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", EACH_STRUCTURE)
def test_a_loss_is_that_of_transformers_for_each_token(name: str) -> None:
    hm = opened(name)
    found = hm.loss(RAGGED)
    for ids, own in zip(RAGGED, found, strict=True):
        by_hand = -logits(name, ids)[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        close(own, by_hand)
    close(hm.measure(RAGGED, metrics.loss()), [float(own.mean()) for own in found])


def test_a_loss_is_the_one_that_the_model_computes_itself() -> None:
    hm = opened("llama")
    for ids, own in zip(RAGGED, hm.loss(RAGGED), strict=True):
        given = torch.tensor([ids])
        close(own.mean(), hm.model(given, labels=given).loss.detach())


def test_metrics_of_the_next_token_and_of_answers_of_several_tokens() -> None:
    hm = opened("llama")
    last = [logits("llama", ids)[-1] for ids in RAGGED]
    close(hm.measure(RAGGED, metrics.logit_difference(5, 9)), [float(row[5] - row[9]) for row in last])
    each = metrics.logit_difference([5, 6, 7], 9)
    close(hm.measure(RAGGED, each), [float(row[right] - row[9]) for row, right in zip(last, (5, 6, 7), strict=True)])
    close(hm.measure(RAGGED, metrics.probability(5)), [float(row.softmax(-1)[5]) for row in last])
    answers = [(5, 6, 7), (8,), (9, 10)]
    expected = []
    for ids, answer in zip(RAGGED, answers, strict=True):
        rows = logits("llama", [*ids, *answer]).log_softmax(-1)
        expected.append(float(sum(rows[len(ids) - 1 + n, token] for n, token in enumerate(answer))))
    close(hm.measure(RAGGED, metrics.log_probability(answers)), expected)
    close(hm.measure(RAGGED, metrics.probability(answers)).log(), expected)


def test_metrics_of_runs_with_interventions() -> None:
    hm = opened("llama")
    edit = {"do": "ablate", "point": "mlp_out", "layers": 1}
    clean, changed = (hm.capture(RAGGED, ["logits"], max_new_tokens=0, interventions=i) for i in ((), [edit]))
    expected = [
        float(
            torch.nn.functional.kl_div(
                changed.read(n, "logits")[-1].log_softmax(-1), clean.read(n, "logits")[-1].softmax(-1), reduction="sum"
            )
        )
        for n in range(3)
    ]
    assert min(expected) > 0.01
    close(hm.measure(RAGGED, metrics.kl_divergence(), [edit]), expected)
    close(hm.edited([edit]).measure(RAGGED, metrics.kl_divergence(), ()), [0.0, 0.0, 0.0])
    own = hm.measure(RAGGED, lambda logits, at: logits[0, at.tokens[0]] + at.positions[-1], [edit])
    close(own, [float(changed.read(n, "logits")[0, ids[0]]) + len(ids) - 1 for n, ids in enumerate(RAGGED)])
    losses = hm.loss(RAGGED, [edit])
    close(losses[1], -changed.read(1, "logits")[:-1].log_softmax(-1)[range(2), RAGGED[1][1:]])


def test_tokens_are_texts_where_there_is_a_tokenizer() -> None:
    hm = opened("llama")
    word, other = (hm.tokenizer.decode([token]) for token in (20, 30))
    ids = [hm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, other)]
    assert all(len(each) == 1 for each in ids)
    by_text = hm.measure(RAGGED, metrics.logit_difference(word, other))
    close(by_text, hm.measure(RAGGED, metrics.logit_difference(ids[0][0], ids[1][0])))


@pytest.mark.parametrize(
    "metric, said",
    [
        (metrics.logit_difference([5, 6], 9), "right: expected one, or a list of 3, one for each prompt, got 2"),
        (metrics.logit_difference(5, 10_000), "wrong 10000"),
        (metrics.log_probability(()), "answer (): expected a text"),
        (metrics.log_probability((5, 10_000)), "token ids [10000] are not in the model's vocabulary of 97"),
        (metrics.kl_divergence([[1, 2]]), "clean: expected 3 prompts, one for each, got 1"),
        ("loss", "metric: expected one of hookmap.metrics, or a function of (logits, at), got str"),
        (lambda logits, at: logits[-1], "expected a tensor of one number, got torch.float32 [97]"),
        (lambda logits, at: logits[99], "raised IndexError: index 99"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(metric: Any, said: str) -> None:
    with pytest.raises(hookmap.SelectionError) as found:
        opened("llama").measure(RAGGED, metric)
    assert said in str(found.value)


def test_a_text_of_one_token_has_no_loss() -> None:
    with raises(hookmap.SelectionError, "texts [1] are one token"):
        opened("llama").loss([[1, 2], [3]])
