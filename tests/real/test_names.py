"""Which heads of SmolLM2-135M-Instruct choose the name, in pairs of indirect object identification.

They are what Wang et al. (2022) found in GPT-2: heads that look at the name which is there once and raise it ("name
movers"), and heads of the same layers or later that lower it ("negative name movers").
"""

from typing import Any

import pytest
import torch

from hookmap.datasets.ioi import ioi_pairs

pytestmark = pytest.mark.real

MOVERS = {(23, 0), (23, 7)}
AGAINST = {(24, 4), (29, 0)}


def test_gradients_find_the_heads_that_move_the_name_and_those_against_it(exact: Any) -> None:
    found = exact.attribution_patch(ioi_pairs(exact.tokenizer, 8), points="z", check=12)
    effects = found.by_head().flatten()
    assert found.check.correlation > 0.9, "with true patches"
    best, worst = ({divmod(n, 9) for n in (sign * effects).topk(6).indices.tolist()} for sign in (1, -1))
    assert best >= MOVERS and worst >= AGAINST


def test_patching_finds_them_too_and_they_look_at_the_name_that_is_there_once(exact: Any) -> None:
    """Where they look: by transformers' own weights."""
    pairs = ioi_pairs(exact.tokenizer, 8)
    swept = exact.sweep(pairs, point="z", over="heads", layers=[23, 24, 29])
    effect = dict(zip([(layer, head) for layer in (23, 24, 29) for head in range(9)],
                      swept.effect.values.flatten().tolist(), strict=True))  # fmt: skip
    order = sorted(effect, key=lambda head: effect[head])
    assert {*order[-4:]} >= MOVERS and {*order[:3]} >= AGAINST
    low, high = swept.interval()
    for (layer, head), row in (((23, 0), 0), ((24, 4), 1)):
        assert effect[layer, head] * float(low.values[row, head]) > 0, "its interval is on one side of 0"
        assert effect[layer, head] * float(high.values[row, head]) > 0

    exact.model.set_attn_implementation("eager")
    looks: dict[tuple[int, int], list[float]] = {head: [] for head in MOVERS}
    for pair in pairs:
        ids = exact.tokenizer(pair.clean, return_tensors="pt")["input_ids"]
        (name,) = exact.tokenizer(pair.answer)["input_ids"]
        with torch.no_grad():
            weights = exact.model(ids, output_attentions=True, use_cache=False).attentions
        for layer, head in MOVERS:
            looks[layer, head].append(float(weights[layer][0, head, -1, ids[0] == name].sum()))
    exact.model.set_attn_implementation("sdpa")
    for place, found in looks.items():
        assert sum(found) / len(found) > 0.4, place
