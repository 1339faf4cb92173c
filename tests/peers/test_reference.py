"""What benchmarks/correctness.py holds programs against, found by numbers alone: it is what is known by hand."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import questions as q
import torch
from support import plain_hooks
from support.opened import EACH_FAMILY
from support.plain_hooks import FAMILIES
from truth import watched

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "benchmarks" / "asked"))

from askers import Said
from judge import SUPPORTED, WRONG, judged
from reference import Reference
from watched import close


@cache
def reference(name: str) -> Any:
    model = plain_hooks.build(name).eval()
    model.set_attn_implementation("eager")
    return Reference(model, q.TOKENS)


def by_hand(name: str) -> Said:
    true = watched(reference(name).model, FAMILIES[name], q.TOKENS)
    said = Said({key.removeprefix("read "): tensor[None] for key, tensor in true.items()})
    return said


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_numbers_alone_find_the_blocks_and_branches_that_are_known(name: str) -> None:
    found, true = reference(name), by_hand(name).tensors
    assert found.layers
    for number, layer in found.layers.items():
        own = {"resid_pre": layer.pre, "resid_post": layer.post}
        own |= {"mixer_out": layer.mixer and layer.mixer.adds, "mlp_out": layer.mlp and layer.mlp.adds}
        for point, tensor in own.items():
            if f"{point} {number}" in true:
                assert tensor is not None and close(tensor, true[f"{point} {number}"]), (point, number)


@pytest.mark.parametrize("name", ["bert", "cohere", "deepseek_v3", "gemma2", "gpt2", "llama"])
def test_right_tensors_are_judged_right_and_a_neighbour_wrong(name: str) -> None:
    said = by_hand(name)
    told = judged(reference(name), said)
    asked = {key.split()[0] for key in said.tensors} & {
        "logits",
        "resid_pre",
        "resid_mid",
        "resid_post",
        "mixer_out",
        "mlp_out",
    }
    assert {point: told[point].state for point in asked} == dict.fromkeys(asked, SUPPORTED)
    moved = {
        f"{point} {n}": said.tensors[f"{point} {(n + 1) % q.LAYERS}"]
        for point in asked - {"logits"}
        for n in range(q.LAYERS)
    }
    told = judged(reference(name), Said({**moved, "logits": said.tensors["logits"] * 2}))
    assert {point: told[point].state for point in asked} == dict.fromkeys(asked, WRONG)


def test_heads_are_told_apart_by_what_turning_their_sign_does() -> None:
    """Keys for queries, heads in another order, weights for scores: each is seen."""
    found = reference("llama")
    number = next(iter(found.layers))
    block = found.model.model.layers[number].self_attn
    read = found.run.once(f"model.layers.{number}.self_attn").given[0]
    heads = {
        name: getattr(block, f"{name}_proj")(read).detach().unflatten(-1, (-1, block.head_dim))
        for name in ("q", "k", "v")
    }
    scores, weights = found.attention(number)[0]
    z = found.layers[number].heads[1].unflatten(-1, (-1, block.head_dim))

    def told(**tensors: torch.Tensor) -> dict[str, str]:
        all_of_them = {f"{point} {n}": tensor for point, tensor in tensors.items() for n in [number]}
        verdicts = judged(found, Said(all_of_them))
        return {point: verdicts[point].state for point in tensors}

    right = {**heads, "pattern": weights, "attn_scores": scores, "z": z}
    assert told(**right) == dict.fromkeys(right, SUPPORTED)
    wrong = {
        "q": heads["k"],
        "k": heads["q"],
        "v": heads["k"],
        "pattern": scores,
        "attn_scores": weights,
        "z": z.flip(-1),
    }
    assert told(**wrong) == dict.fromkeys(wrong, WRONG)
    assert told(q=heads["q"].flip(2)) == {"q": WRONG}
