"""Scores of heads are held against loops in NumPy over transformers' own `output_attentions`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from support import plain_hooks
from support.opened import opened
from support.raises import raises

import hookmap
from hookmap.analysis.charts import head_scores as chart_of
from hookmap.analysis.heads import KINDS
from hookmap.cli.main import main

TEXTS = [[5, 17, 17, 60, 5, 17, 9], [11, 2, 33, 11, 2], [7, 7, 7, 90, 1, 7, 3, 4, 1]]
"""tokens that repeat at once, in pairs and far apart"""


def looked_at(kind: str, tokens: list[int], query: int) -> list[int]:
    """The keys of a kind of head, by its definition in words."""
    earlier = [key for key in range(query) if tokens[key] == tokens[query]]
    return {
        "induction": [key + 1 for key in earlier],
        "previous_token": [query - 1] if query else [],
        "duplicate_token": earlier,
        "attention_sink": [0] if query else [],
    }[kind]


def by_hand(model: Any, kind: str, texts: list[list[int]]) -> np.ndarray:
    """[layers, heads]"""
    paid = []
    for tokens in texts:
        with torch.no_grad():
            layers = model(torch.tensor([tokens]), output_attentions=True, use_cache=False).attentions
        weights = np.stack([layer[0].numpy() for layer in layers if layer is not None])  # [layers, heads, query, key]
        for query in range(len(tokens)):
            if keys := looked_at(kind, tokens, query):
                paid.append(weights[:, :, query, keys].sum(-1))
    return np.mean(paid, axis=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "falcon_7b", pytest.param("bert", marks=pytest.mark.slow)])
def test_scores_are_those_of_a_loop_over_the_models_own_attention_weights(name: str) -> None:
    hm, model = opened(name), plain_hooks.build(name, attn_implementation="eager")
    found = hm.head_scores(TEXTS)
    assert set(found.scores) == set(KINDS) and found.layers == (0, 1, 2) and not found.missing
    for kind, scores in found.scores.items():
        np.testing.assert_allclose(scores.numpy(), by_hand(model, kind, TEXTS), atol=1e-5)


def test_random_tokens_differ_and_come_twice_behind_what_begins_a_text() -> None:
    hm = opened("llama")
    found = hm.head_scores(length=6, samples=3, seed=1)
    begins = hm.tokenizer("a")["input_ids"][:-1]
    special = set(hm.tokenizer.all_special_ids)
    assert len(found.tokens) == len(set(found.tokens)) == 3
    for tokens in found.tokens:
        own = list(tokens[len(begins) :])
        assert list(tokens[: len(begins)]) == begins
        assert own[:6] == own[6:] and len(set(own)) == 6 and not special & set(own)
    assert found.tokens == hm.head_scores(length=6, samples=3, seed=1).tokens
    assert found.tokens != hm.head_scores(length=6, samples=3, seed=2).tokens
    # The one earlier occurrence of each token lies `length` before it.
    pattern = hm.capture([list(found.tokens[0])], "pattern", 1, max_new_tokens=0)["pattern", 1][0]
    alone = hm.head_scores([list(found.tokens[0])], 1)
    queries = range(len(begins) + 6, len(begins) + 12)
    for kind, offset in (("induction", 5), ("duplicate_token", 6)):
        expected = torch.stack([pattern[:, q, q - offset] for q in queries]).mean(0)
        torch.testing.assert_close(alone[kind][0], expected)


@pytest.mark.slow
def test_layers_without_attention_say_why() -> None:
    found = opened("jamba").head_scores(TEXTS)
    assert found.missing and sorted([*found.layers, *found.missing]) == [0, 1, 2]
    assert all(found.missing.values())
    with raises(hookmap.SelectionError, "pattern"):
        opened("mamba").head_scores(TEXTS)


def test_an_encoder_decoder_gives_the_heads_of_its_decoder() -> None:
    config = tf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
                         decoder_start_token_id=0, eos_token_id=1)  # fmt: skip
    torch.manual_seed(7)
    hm = hookmap.open(plain_hooks.redrawn(tf.T5ForConditionalGeneration(config)))
    found = hm.head_scores(length=5, samples=1)
    assert found["induction"].shape == (2, 4) and found.tokens[0][0] == 0 and len(found.tokens[0]) == 11


def test_the_best_heads_come_first_and_a_wrong_name_says_which_there_are() -> None:
    found = opened("gpt2").head_scores(TEXTS)
    best = found.top("attention_sink", 4)
    assert [head.score for head in best] == found["attention_sink"].flatten().sort(descending=True).values[:4].tolist()
    assert all(found["attention_sink"][head.layer, head.head] == head.score for head in best)
    with raises(hookmap.SelectionError, "inductoin", "attention_sink", "mean induction"):
        found["inductoin"]
    with raises(hookmap.SelectionError, "length 999"):
        opened("gpt2").head_scores(length=999)
    with raises(hookmap.SelectionError, "samples", "0"):
        opened("gpt2").head_scores(samples=0)


def test_one_token_has_no_score_and_one_text_without_repeats_no_induction() -> None:
    found = opened("gpt2").head_scores([[1, 2, 3]])
    assert bool(found["induction"].isnan().all()) and not found.top("induction")
    assert bool(found["previous_token"].isfinite().all())
    assert found.as_json()["scores"]["induction"][0][0] is None


def test_the_picture_holds_every_score() -> None:
    found = opened("gpt2").head_scores(TEXTS)
    rows = chart_of(found).to_dict()["data"]["values"]
    held = {(row["kind"], row["layer"], row["head"]): row["value"] for row in rows}
    assert len(rows) == len(held) == 4 * 3 * 4
    for kind, scores in found.scores.items():
        for layer in range(3):
            for head in range(4):
                value = held[kind.replace("_", " "), str(layer), head]
                assert value == pytest.approx(float(scores[layer, head]), rel=1e-4)


@pytest.mark.slow
def test_the_command_prints_the_heads_and_draws_them(tmp_path: Path, own_folder: None) -> None:
    files = [f"--{end}={tmp_path / 'heads'}.{end}" for end in ("png", "svg", "html")]
    done = CliRunner().invoke(main, ["heads", "--length", "10", "--samples", "1", "--top", "2", *files])
    assert done.exit_code == 0, done.stderr
    assert "eager attention, on 1 text of repeated random tokens, 20 tokens" in done.stderr
    assert {path.suffix for path in tmp_path.glob("heads.*")} == {".png", ".svg", ".html"}
    read = CliRunner().invoke(main, ["heads", "--prompt", "1+1=2", "--layers", "0-1", "--json"])
    found = json.loads(read.stdout)
    assert found["layers"] == [0, 1] and len(found["tokens"]) == 1
